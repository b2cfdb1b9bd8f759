"""Peak memory of `apollo convert`, against the size of the largest shard.

    OMP_NUM_THREADS=1 python benchmarks/conversion.py

Writes a released-layout folder whose LLM has random weights and one large shard, converts it in a
fresh process and reads that process's peak resident memory (Linux). Writes
benchmarks/results/conversion.json; the bound is 1.5 x the largest shard + 1 GB.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apollo.runtime import environment

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "conversion.json"
VOCABULARY, WIDTH = 151_936, 1024  # of a shard of 311 MB in bfloat16, next to a small one

CONVERT = """
import re, sys, time
from pathlib import Path
from apollo.model.conversion import convert

def peak_bytes():
    # Not getrusage: its maximum is inherited from the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

imported, started = peak_bytes(), time.perf_counter()
report = convert(sys.argv[1], sys.argv[2])
print(imported, peak_bytes(), report.num_bytes, time.perf_counter() - started)
"""


def main() -> None:
    """Measure."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_conversion import write_released

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        write_released(
            source, "3B", vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=16
        )
        largest = max(path.stat().st_size for path in source.rglob("*.safetensors"))
        command = [sys.executable, "-c", CONVERT, str(source), str(target)]
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout
    imported, peak, converted, seconds = map(float, output.split())
    bound = 1.5 * largest + 1e9
    result = {
        "largest_shard_mb": round(largest / 1e6, 1),
        "converted_mb": round(converted / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "peak_of_imports_alone_mb": round(imported / 1e6, 1),
        "bound_mb": round(bound / 1e6, 1),
        "seconds": round(seconds, 2),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if peak > bound:
        sys.exit("the peak is over the bound")


if __name__ == "__main__":
    main()
