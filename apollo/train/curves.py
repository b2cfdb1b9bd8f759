"""Loss curves of a run, as a picture: `log.jsonl` in, `curves.png` out.

Read next: `trainer.py`, which writes the log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apollo.runtime import read_jsonl


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `log.jsonl`; an absent file is an empty log."""
    path = run_dir / "log.jsonl"
    if not path.exists():
        return []
    return list(read_jsonl(path))


def plot_curves(run_dir: Path) -> Path:
    """Draw loss (left) and learning rates (right) over the steps, one panel row per stage."""
    from matplotlib.figure import Figure

    lines = read_log(run_dir)
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    num_rows = max(1, len(stages))
    figure = Figure(figsize=(10, 3 * num_rows))
    axes = figure.subplots(num_rows, 2, squeeze=False, gridspec_kw={"hspace": 0.5, "wspace": 0.25})
    for (loss_axis, rate_axis), stage in zip(axes, stages, strict=False):
        rows = [line for line in lines if line["stage"] == stage]
        steps = [row["step"] for row in rows]
        loss_axis.plot(steps, [row["loss"] for row in rows])
        loss_axis.set(title=stage, xlabel="step", ylabel="loss")
        for part in rows[0]["learning_rates"]:
            rate_axis.plot(steps, [row["learning_rates"][part] for row in rows], label=part)
        rate_axis.set(title=stage, xlabel="step", ylabel="learning rate")
        rate_axis.legend()
    path, temporary = run_dir / "curves.png", run_dir / ".curves.png"
    figure.savefig(temporary, dpi=100)  # Figure without pyplot draws with Agg: no display needed
    return temporary.replace(path)
