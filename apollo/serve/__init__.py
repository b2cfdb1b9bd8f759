"""A model behind a URL: an OpenAI-compatible server and a page to talk to a video.

`apollo serve` starts it. A request goes through `guards.py` (what is let in), `api.py` (what it
asks for), `media.py` (its videos, decoded in other processes) and `engine.py`, whose one thread
owns the model and answers all requests together. Nothing else in apollo imports this package.
"""
