"""Attention of the micro models on a CPU: torch's fused kernel against plain products (bfloat16).

    OMP_NUM_THREADS=1 python benchmarks/attention.py

Forward and backward, the two ways in turn, medians. Writes benchmarks/results/attention.json; the
reason for `apollo.train.short_attention`.
"""

import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from apollo.runtime import environment
from apollo.train.short_attention import short_attention

RESULT = Path(__file__).parent / "results" / "attention.json"
SHAPES = {
    "image encoder, 256 frames": ((256, 2, 64, 64), False),
    "video encoder, 64 clips": ((64, 2, 65, 64), False),
    "resampler, 80 clips": ((80, 4, 12, 48), False),
    "LLM, 16 rows of 384": ((16, 3, 384, 64), True),
    "LLM, 8 rows of 640": ((8, 3, 640, 64), True),
}
"""What attends -> (batch, heads, length, head width), whether causally."""


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    rows = {}
    for name, (shape, is_causal) in SHAPES.items():
        query, key, value = (
            torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        gradient = torch.randn(shape, dtype=torch.bfloat16)

        def milliseconds(inputs=(query, key, value), is_causal=is_causal, gradient=gradient):
            started = time.perf_counter()
            F.scaled_dot_product_attention(*inputs, is_causal=is_causal).backward(gradient)
            return 1000 * (time.perf_counter() - started)

        fused, plain = [], []
        for _ in range(12):
            fused.append(milliseconds())
            with short_attention():
                plain.append(milliseconds())
        medians = statistics.median(fused[2:]), statistics.median(plain[2:])
        rows[name] = {
            "fused_ms": medians[0],
            "plain_ms": medians[1],
            "ratio": medians[0] / medians[1],
        }
    result = {"rows": rows, "date": time.strftime("%Y-%m-%d"), "environment": environment()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
