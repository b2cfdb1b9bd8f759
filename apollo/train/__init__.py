"""Training: recipes as values, one visible loop, checkpoints that resume exactly.

Read `trainer.py` first (the loop), then `recipes.py` (what the paper's three stages are) and
`run.py` (how a recipe becomes a run directory).
"""
