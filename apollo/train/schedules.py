"""The seventeen training schedules of the paper's Table 12.

Here because recipes are made of them at the paper's size, and studies at any size, which must not
load torch to name them. Read next: `recipes.py`.
"""

from __future__ import annotations

Rates = tuple[float, float, float]
"""Peak learning rates of encoders, connector and LLM; 0 where a part is frozen."""
SCHEDULES: dict[int, tuple[Rates, ...]] = {
    1: ((0, 1e-4, 3e-5),),
    2: ((1e-6, 1e-4, 3e-5),),
    3: ((5e-6, 1e-4, 3e-5),),
    4: ((1e-5, 1e-4, 3e-5),),
    5: ((0, 1e-4, 0), (0, 1e-4, 3e-5)),
    6: ((1e-6, 1e-4, 0), (0, 1e-4, 3e-5)),
    7: ((5e-6, 1e-4, 0), (0, 1e-4, 3e-5)),
    8: ((1e-5, 1e-4, 0), (0, 1e-4, 3e-5)),
    9: ((1e-6, 1e-4, 0), (1e-6, 1e-4, 3e-5)),
    10: ((5e-6, 1e-4, 0), (5e-6, 1e-4, 3e-5)),
    11: ((1e-5, 1e-4, 0), (1e-5, 1e-4, 3e-5)),
    12: ((0, 1e-4, 0), (1e-6, 1e-4, 0), (0, 1e-4, 3e-5)),
    13: ((0, 1e-4, 0), (5e-6, 1e-4, 0), (0, 1e-4, 3e-5)),
    14: ((0, 1e-4, 0), (1e-5, 1e-4, 0), (0, 1e-4, 3e-5)),
    15: ((0, 1e-4, 0), (1e-6, 1e-4, 0), (1e-6, 1e-4, 3e-5)),
    16: ((0, 1e-4, 0), (5e-6, 1e-4, 0), (5e-6, 1e-4, 3e-5)),
    17: ((0, 1e-4, 0), (1e-5, 1e-4, 0), (1e-5, 1e-4, 3e-5)),
}
"""Row of the paper's Table 12 -> the rates of each stage. Row 16 prints 5e-5 for the encoders of
its last stage; beside its neighbours that can only be 5e-6."""
