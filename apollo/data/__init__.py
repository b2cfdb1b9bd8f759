"""Data: records on disk, who comes next, and batches.

Read `formats.py` (what a training record is, and its layouts), `stores.py` (where media lie) and
`readers.py` (the files of records); then `mixture.py` (which record comes at which position),
`collate.py` (records -> batches), `packing.py` (batches without padding) and `features.py` (encode
each video only once). `check.py` is `apollo data check`.
"""
