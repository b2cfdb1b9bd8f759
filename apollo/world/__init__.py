"""The micro world: seeded moving scenes as MP4 files, with words and questions of known answer.

No public data set is needed to see the whole system work. `scene.py` plans, `render.py` draws,
`language.py`, `questions.py` and `corpus.py` speak, `check.py` recomputes the answers on its own,
`make.py` writes a data set. Start with `scene.py`.
"""
