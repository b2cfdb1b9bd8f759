"""The lab: the paper's ablations as studies anyone can run, and what holds from small to large.

`scaling.py` measures whether choices made on small models hold for large ones (`apollo
consistency`); `spec.py` says what a study is, `studies.py` has one for each table of the paper, and
`runner.py` runs them. Nothing imports this package but the command line.
"""
