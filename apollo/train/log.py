"""What a run shows of itself: log.jsonl, a line or a bar on the console, trackers, curves.png.

`log.jsonl` is the record, always written, one line every `log_every` steps, exact over stops and
resumes; the rest is drawn from its lines. Read next: `trainer.py`, which adds the steps.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apollo.runtime import append_jsonl
from apollo.train.checkpoint import TrainState, not_logged
from apollo.train.curves import plot_curves, read_log


@dataclass
class TrainLog:
    """Sums over the steps since the last line, the file they go to, and its picture at the end.

    Attributes:
        run_dir: Folder of the run.
        stage: Name of the stage.
        start: Where this process began; its open steps belong to the first line.
        accelerator: Its main process writes, its trackers get a copy.
        console: Where the lines are shown.
    """

    run_dir: Path
    stage: str
    start: TrainState
    accelerator: Accelerator
    console: Console
    losses: list[float] = field(default_factory=list)
    items: int = 0
    tokens: int = 0
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        self.losses, self.items = list(self.start.open_losses), self.start.open_items
        self.started = self.window_started = time.monotonic()

    def __enter__(self) -> Self:
        if self.accelerator.is_main_process:
            self._drop_lines_after_checkpoint()
        if self.accelerator.log_with:
            options = {
                "wandb": {"name": f"{self.run_dir.name} {self.stage}", "dir": str(self.run_dir)}
            }
            self.accelerator.init_trackers("apollo", init_kwargs=options)
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            try:
                plot_curves(self.run_dir)  # also of a run that was stopped or diverged
            except OSError as error:
                self.console.print(f"curves.png is not drawn: {error}", highlight=False)

    @property
    def elapsed_s(self) -> float:
        """Seconds trained in this stage, over all restarts."""
        return self.start.elapsed_s + time.monotonic() - self.started

    def add(self, loss: float, items: int, tokens: int, wait_s: float) -> None:
        """Add a step: its loss, supervised and fed tokens, and the wait for its data."""
        self.losses.append(loss)
        self.items += items
        self.tokens += tokens
        self.wait_s += wait_s

    def state(self, step: int) -> TrainState:
        """Say where the run stands after a step, for its checkpoint."""
        return TrainState(
            self.start.stage_index, step, self.elapsed_s, tuple(self.losses), self.items
        )

    def write(
        self, step: int, rates: dict[str, float], grad_norm: float, metrics: dict[str, float]
    ) -> dict[str, Any]:
        """Write the mean over the window as one line, and start the next window.

        Raises:
            NotSavedError: The disk is full.
        """
        window_s = max(time.monotonic() - self.window_started, 1e-9)
        line = {
            "stage": self.stage,
            "stage_index": self.start.stage_index,
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            "learning_rates": rates,
            "grad_norm": grad_norm,
            "items": self.items,
            "tokens_per_s": round(self.tokens / window_s, 1),
            "data_wait": round(self.wait_s / window_s, 4),
            "elapsed_s": round(self.elapsed_s, 2),
            "peak_memory_gib": round(peak_memory_gib(self.accelerator.device), 3),
            **metrics,
        }
        if self.accelerator.is_main_process:
            try:
                append_jsonl(self.run_dir / "log.jsonl", line)
            except OSError as error:
                raise not_logged(self.run_dir, error) from error
        self.accelerator.log(_flat(line), step=step)
        self.losses, self.items, self.tokens, self.wait_s = [], 0, 0, 0.0
        self.window_started = time.monotonic()
        return line

    def _drop_lines_after_checkpoint(self) -> None:
        """Remove what a stopped run logged past its checkpoint: those steps are taken again."""
        here = (self.start.stage_index, self.start.step)
        lines = read_log(self.run_dir)
        kept = [line for line in lines if (line["stage_index"], line["step"]) <= here]
        if len(kept) < len(lines):
            temporary = self.run_dir / ".log.jsonl"
            temporary.unlink(missing_ok=True)
            append_jsonl(temporary, *kept)
            temporary.replace(self.run_dir / "log.jsonl")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: on its GPU if it has one, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """Name a line's numbers for a tracker: `sft/loss`, `sft/learning_rates/llm`."""
    stage, rates = line["stage"], line["learning_rates"]
    values = {**line, **{f"learning_rates/{part}": rate for part, rate in rates.items()}}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return {
        f"{stage}/{name}": value
        for name, value in numbers.items()
        if name not in ("step", "stage_index")
    }


# ---- the console


def one_line(line: dict[str, Any], steps: int) -> str:
    """Say a log line in words, for consoles that cannot show a bar."""
    remaining_s = line["elapsed_s"] / line["step"] * (steps - line["step"])
    return (
        f"{line['stage']} {line['step']}/{steps}  loss {line['loss']:.4f}  "
        f"{line['tokens_per_s']:.0f} tokens/s  data wait {line['data_wait']:.0%}  "
        f"{line['peak_memory_gib']:.1f} GiB  {remaining_s / 60:.1f} min left"
    )


@contextmanager
def progress_bar(
    console: Console, stage: str, steps: int, done: int
) -> Iterator[Callable[[float, dict[str, Any] | None], None]]:
    """Show a bar with the time left on a terminal.

    Yields:
        The function to call after each step with its loss and, if one was written, its log line.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(stage, total=steps, completed=done, loss=math.nan, speed="")

        def advance(loss: float, line: dict[str, Any] | None) -> None:
            progress.update(task, advance=1, loss=loss)
            if line is None:
                return
            speed = f"{line['tokens_per_s']:.0f} tokens/s  data wait {line['data_wait']:.0%}"
            progress.update(task, speed=speed)
            if not console.is_terminal:
                console.print(one_line(line, steps), highlight=False)

        yield advance
