"""Put the shipped micro model's scores into the README's two tables, from a run's summary.json.

    python scripts/readme_table.py runs/eval_micro

Run by make_micro.sh after the evaluation; what the text says of them is for a person to check.
"""

import json
import re
import sys
from pathlib import Path

README = Path("README.md")
CONDITIONS = ("video", "frame", "text")
ROW = re.compile(r"^\| (\w+) \| \d+ \|( [\d.]+ \(\d+-\d+\) \|){3}$", re.MULTILINE)


def main() -> None:
    """Replace the rows."""
    scores = json.loads((Path(sys.argv[1]) / "summary.json").read_text())["scores"]
    rows = scores["class"] | scores["family"] | scores["overall"]

    def row(match: re.Match[str]) -> str:
        of_name = rows[match[1]]
        cells = (
            f"{100 * s['accuracy']:.1f} ({100 * s['low']:.0f}-{100 * s['high']:.0f})"
            for s in map(of_name.get, CONDITIONS)
        )
        return f"| {match[1]} | {of_name['video']['num_questions']} | {' | '.join(cells)} |"

    text, count = ROW.subn(row, README.read_text(encoding="utf-8"))
    assert count == len(scores["class"]) + len(scores["family"]) + 1, f"{count} rows were found"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
