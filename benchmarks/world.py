"""How fast a world is made: videos per second, and the time that 10,000 would take.

    python benchmarks/world.py --num-videos 600

Writes benchmarks/results/world.json with the machine's name. Several batches are made one after the
other and the median is given: shared machines are noisy.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from apollo.runtime import environment, num_available_cores
from apollo.world.make import make_world

RESULT = Path(__file__).parent / "results" / "world.json"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-videos", type=int, default=600, help="in all, in three batches")
    num_videos = parser.parse_args().num_videos // 3
    rates = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            make_world(Path(folder) / "world", num_videos, seed)
            rates.append(num_videos / (time.perf_counter() - started))
    result = {
        "videos_per_s": {"median": statistics.median(rates), "all": rates},
        "minutes_for_10000": 10_000 / statistics.median(rates) / 60,
        "cores": num_available_cores(),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
