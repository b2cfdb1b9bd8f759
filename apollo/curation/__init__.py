"""Audit a benchmark from predictions, and choose a small one that ranks models like the large one.

Here because many questions about videos need no video, and benchmarks repeat each other (paper,
Section 2): both show in the answers of a few models, whoever ran them. Nothing here loads a model
or imports torch. Read in this order: `records.py` (the one table that everything works on),
`readers.py` (files of four harnesses into it), `audit.py` and `redundancy.py` (`apollo audit`),
`curate.py` and `validate.py` (`apollo curate`). docs/curation.md has the method.
"""
