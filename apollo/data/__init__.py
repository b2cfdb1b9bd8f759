"""Data: records on disk, who comes next, and batches.

Read `formats.py` (what a training record is), then `mixture.py` (which record comes at which
position), then `collate.py` (records -> batches) and `features.py` (encode each video only once).
"""
