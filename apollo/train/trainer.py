"""The one training loop: everything that learns in this repository learns here.

`run_stage` trains any module that keeps one contract, `model(**batch, num_items_in_batch=n).loss`,
where n is the number of supervised tokens in the whole global step: Apollo, a language model alone,
or the contrastive pair that makes an image encoder. The loss is the summed token loss over n, so
that 1 batch of 8 and 8 batches of 1 give the same gradient. Every random choice is seeded by (seed,
stage, step) and batch i is a pure function of i, so that stop + resume equals a straight run.
Accelerate brings devices and ranks; the loop stays ours and readable. Read next: `optim.py`,
`checkpoint.py`, then `run.py`, which feeds this with a recipe.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, Dataset

from apollo.runtime import append_jsonl, keep_freed_memory, set_seed, short_attention
from apollo.train.checkpoint import Checkpoint, TrainState, latest_checkpoint, save_checkpoint
from apollo.train.curves import plot_curves, read_log
from apollo.train.optim import (
    build_optimizer,
    check_learning_rates,
    parts_of,
    schedule_factor,
    set_learning_rates,
)

Batch = Mapping[str, Any]
"""What the model takes: `input_ids`, `labels` (-100: not supervised) and so on; tensors, lists."""

IGNORED_LABEL = -100
AUTOCAST = {"no": None, "bf16": torch.bfloat16}


class DivergedError(ValueError):
    """The loss or the gradient is no longer a number."""


@dataclass(kw_only=True)
class Schedule:
    """What is learnt, how fast and for how long.

    Attributes:
        name: Name of the stage, for the log and the progress bar.
        steps: Optimiser steps.
        learning_rates: Peak rate of each part of the model, 0 freezes it; a module without
            `parts()` is the part "model".
        warmup_ratio: Share of the steps with a rising rate (paper, App. C.4).
        weight_decay: Decay of matrices; the paper states none.
        grad_clip: Largest norm of the gradient (paper, App. C.4).
        optimizer: "adamw", or "muon" for Muon on hidden matrices; see `build_optimizer`.
    """

    name: str
    steps: int
    learning_rates: dict[str, float]
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(kw_only=True)
class LoopSettings:
    """How the loop runs: precision, accumulation, and what it writes how often.

    Attributes:
        seed: Decides every random choice, together with stage and step.
        mixed_precision: "no" (float32) or "bf16" (bfloat16 matrix products, float32 weights).
        gradient_accumulation: Batches per process that make up one optimiser step.
        num_workers: Processes that load batches ahead of the loop; 0 loads in the loop.
        log_every: Steps between two lines of log.jsonl.
        save_every: Steps between two checkpoints; the last step of a stage is always saved.
        save_every_minutes: A checkpoint is also written when the last one is older than this.
        keep_checkpoints: Older checkpoints are removed.
        eval_every: Steps between two calls of the caller's evaluation; 0 for never.
    """

    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_accumulation: int = 1
    num_workers: int = 0
    log_every: int = 10
    save_every: int = 500
    save_every_minutes: float = 15.0
    keep_checkpoints: int = 2
    eval_every: int = 0


def run_stage(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    schedule: Schedule,
    loop: LoopSettings,
    run_dir: Path,
    *,
    stage_index: int = 0,
    resume: bool = False,
    on_eval: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> None:
    """Train one stage in place; log.jsonl, checkpoints and curves.png go into the run directory.

    Args:
        model: Anything with `model(**batch, num_items_in_batch=n).loss`; float32 where it is
            trained.
        batch_at: Gives batch number i of the stage; must depend on i alone. With several processes,
            process r of R takes the batches r, r + R, r + 2R and so on.
        schedule: What is learnt and how fast.
        loop: How the loop runs.
        run_dir: Folder of the run; made if absent.
        stage_index: Number of the stage in the run.
        resume: Go on from the newest checkpoint of the run: within this stage exactly where it
            stopped, from an earlier stage with its weights. A stage that is already finished is
            left as it is.
        on_eval: Called as `on_eval(model, step)` every `loop.eval_every` steps with the model in
            eval mode and without gradients; what it returns is put into the log.

    Raises:
        ValueError: Settings that cannot work, or a run directory that already holds this stage.
        DivergedError: The loss or the gradient is not finite.
    """
    parts = parts_of(model)
    _check_settings(parts, schedule, loop)
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = _find_start(run_dir, stage_index, resume)
    state = TrainState(stage_index, 0)
    if checkpoint:
        checkpoint.load_weights(model)
        if checkpoint.state.stage_index == stage_index:
            state = checkpoint.state
        else:
            checkpoint = None  # an earlier stage: its weights only
    if state.step >= schedule.steps:
        return

    accelerator = Accelerator()
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise ValueError(f"run_stage cannot shard over {accelerator.distributed_type} yet; use DDP")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    autocast_dtype = AUTOCAST[loop.mixed_precision]

    with _frozen(model, parts, schedule.learning_rates), short_attention():
        for line in _describe_parts(parts, schedule.learning_rates):
            console.print(line, highlight=False)
        optimizer = build_optimizer(
            parts, schedule.learning_rates, schedule.weight_decay, schedule.optimizer
        )
        wrapped, prepared_optimizer = accelerator.prepare(model, optimizer)
        if checkpoint:
            checkpoint.load_optimizer(optimizer)
        trainable = [p for p in model.parameters() if p.requires_grad]
        batches = _load_batches(batch_at, state.next_batch, schedule, loop, accelerator)
        last_save = time.monotonic()

        with (
            _Log(run_dir, state, accelerator.is_main_process) as log,
            _progress(console, schedule, state.step) as advance,
        ):
            for step in range(state.step, schedule.steps):
                # ---- data: all batches of the step, because the loss needs their number of items
                wait_start = time.monotonic()
                step_batches = [next(batches) for _ in range(loop.gradient_accumulation)]
                wait_s = time.monotonic() - wait_start
                num_items = int(_sum_over_ranks(accelerator, sum(map(count_items, step_batches))))
                if num_items == 0:
                    raise ValueError(
                        f"stage {schedule.name}, step {step}: no supervised token in the whole step"
                    )

                # ---- forward and backward
                set_seed(_step_seed(loop.seed, stage_index, step, accelerator.process_index))
                rates = set_learning_rates(
                    optimizer, schedule_factor(step, schedule.steps, schedule.warmup_ratio)
                )
                loss = torch.zeros((), device=accelerator.device)
                for i, batch in enumerate(step_batches):
                    last = i == len(step_batches) - 1
                    with nullcontext() if last else accelerator.no_sync(wrapped):
                        with torch.autocast(
                            accelerator.device.type,
                            autocast_dtype,
                            enabled=autocast_dtype is not None,
                        ):
                            batch = send_to_device(dict(batch), accelerator.device)
                            output = wrapped(**batch, num_items_in_batch=num_items)
                        # DDP takes the mean of the ranks' gradients; the sum over n is wanted.
                        accelerator.backward(output.loss * accelerator.num_processes)
                        loss += output.loss.detach()
                grad_norm = accelerator.clip_grad_norm_(trainable, schedule.grad_clip)
                loss_value = _sum_over_ranks(accelerator, loss.item())
                _check_finite(loss_value, float(grad_norm), schedule.name, step, run_dir)

                # ---- update
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()

                # ---- evaluation, log, checkpoint
                done = step + 1
                final = done == schedule.steps
                log.add(loss_value, num_items, sum(map(count_tokens, step_batches)), wait_s)
                metrics = {}
                if on_eval and loop.eval_every and (final or done % loop.eval_every == 0):
                    metrics = _evaluate(model, on_eval, done)
                    _set_modes(model, parts, schedule.learning_rates)
                if metrics or final or done % loop.log_every == 0:
                    row = log.write(schedule.name, done, rates, float(grad_norm), metrics)
                    if not console.is_terminal:
                        console.print(_one_line(row, schedule.steps), highlight=False)
                advance(loss_value)
                minutes = (time.monotonic() - last_save) / 60
                if final or done % loop.save_every == 0 or minutes > loop.save_every_minutes:
                    state = TrainState(
                        stage_index,
                        done,
                        done * loop.gradient_accumulation * accelerator.num_processes,
                        log.elapsed_s,
                    )
                    if accelerator.is_main_process:
                        save_checkpoint(run_dir, state, model, optimizer, loop.keep_checkpoints)
                    last_save = time.monotonic()
    accelerator.wait_for_everyone()


def count_items(batch: Batch) -> int:
    """Count what a batch's loss is summed over: supervised tokens, or rows if there are no labels.

    The first token of a row is never predicted, so that its label does not count.
    """
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    return len(next(iter(batch.values())))


def count_tokens(batch: Batch) -> int:
    """Count the tokens that a batch feeds in, for this process's speed; rows if it has no text."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else count_items(batch)


# ---- before the loop


def _check_settings(parts: dict[str, nn.Module], schedule: Schedule, loop: LoopSettings) -> None:
    check_learning_rates(parts, schedule.learning_rates)
    if loop.mixed_precision not in AUTOCAST:
        raise ValueError(
            f"mixed_precision is {loop.mixed_precision!r}; choose one of {sorted(AUTOCAST)}"
        )
    for name, value in (
        ("steps", schedule.steps),
        ("gradient_accumulation", loop.gradient_accumulation),
        ("log_every", loop.log_every),
        ("save_every", loop.save_every),
        ("keep_checkpoints", loop.keep_checkpoints),
    ):
        if value < 1:
            raise ValueError(f"stage {schedule.name}: {name} must be at least 1, got {value}")
    for name, part in parts.items():
        dtypes = {p.dtype for p in part.parameters()} if schedule.learning_rates[name] else set()
        if dtypes - {torch.float32}:
            # bfloat16 weights have 8 bits of mantissa: an update of 1e-5 of a weight is lost.
            raise ValueError(f"part {name!r} is trained but held in {dtypes}; load it as float32")


def _find_start(run_dir: Path, stage_index: int, resume: bool) -> Checkpoint | None:
    """Find the checkpoint to start from; without `resume` this stage must have none."""
    newest = latest_checkpoint(run_dir)
    if resume:
        if newest and newest.state.stage_index > stage_index:
            raise ValueError(f"{run_dir} is past stage {stage_index}: it holds {newest.path.name}")
        return newest
    if newest and newest.state.stage_index >= stage_index:
        raise ValueError(
            f"{run_dir} already holds {newest.path.name}; resume it or choose another folder"
        )
    return None


@contextmanager
def _frozen(
    model: nn.Module, parts: dict[str, nn.Module], rates: Mapping[str, float]
) -> Iterator[None]:
    """Freeze the parts with rate 0 for the length of the stage, then restore what was before."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, part in parts.items():
            if rates[name] == 0:
                part.requires_grad_(False)
        _set_modes(model, parts, rates)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for module, training in modes:
            module.training = training


def _set_modes(model: nn.Module, parts: dict[str, nn.Module], rates: Mapping[str, float]) -> None:
    model.train()
    for name, part in parts.items():
        part.train(rates[name] > 0)


def _describe_parts(parts: dict[str, nn.Module], rates: Mapping[str, float]) -> Iterator[str]:
    for name, part in parts.items():
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        status = f"trained at {rates[name]:g}" if rates[name] else "frozen"
        yield f"  {name:<12}{millions:10.2f}M parameters  {status}"


class _Positions(Dataset[Batch]):
    """A map-style data set over batch numbers: the loop starts anywhere, workers load ahead."""

    def __init__(self, batch_at: Callable[[int], Batch]) -> None:
        self.batch_at = batch_at

    def __getitem__(self, index: int) -> Batch:
        return self.batch_at(index)


def _load_batches(
    batch_at: Callable[[int], Batch],
    next_batch: int,
    schedule: Schedule,
    loop: LoopSettings,
    accelerator: Accelerator,
) -> Iterator[Batch]:
    """Iterate over this process's batches from `next_batch` to the end of the stage."""
    ranks = accelerator.num_processes
    end = schedule.steps * loop.gradient_accumulation * ranks
    numbers = range(next_batch + accelerator.process_index, end, ranks)
    loader = DataLoader(
        _Positions(batch_at),
        batch_size=None,
        sampler=numbers,
        num_workers=loop.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    # Workers are forked, and a video decoder's threads do not live on in a fork: were a decoder
    # among the garbage that a worker collects, it would wait for those threads for ever.
    gc.collect()
    return iter(loader)


# ---- within the loop


def _step_seed(seed: int, stage_index: int, step: int, rank: int) -> int:
    """Mix the four numbers into one seed."""
    return (((seed * 1_000 + stage_index) * 1_000 + rank) * 10_000_000 + step) % 2**32


def _sum_over_ranks(accelerator: Accelerator, value: float) -> float:
    if accelerator.num_processes == 1:
        return value
    here = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    return float(accelerator.reduce(here, "sum"))


def _check_finite(loss: float, grad_norm: float, stage: str, step: int, run_dir: Path) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    newest = latest_checkpoint(run_dir)
    raise DivergedError(
        f"stage {stage}, step {step}: loss {loss}, gradient norm {grad_norm}. Lower the learning "
        f"rate or look at the batch; last good checkpoint: {newest.path if newest else 'none'}"
    )


def _evaluate(
    model: nn.Module, on_eval: Callable[[nn.Module, int], dict[str, float]], step: int
) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return on_eval(model, step)


@dataclass
class _Log:
    """Sums over the steps since the last line, the file they go to, and its picture at the end."""

    run_dir: Path
    start: TrainState
    enabled: bool
    losses: list[float] = field(default_factory=list)
    items: int = 0
    tokens: int = 0
    wait_s: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.window_started = time.monotonic()
        self._drop_lines_after_checkpoint()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            plot_curves(self.run_dir)  # also of a run that was stopped or diverged

    @property
    def elapsed_s(self) -> float:
        """Seconds trained in this stage, over all restarts."""
        return self.start.elapsed_s + time.monotonic() - self.started

    def add(self, loss: float, items: int, tokens: int, wait_s: float) -> None:
        self.losses.append(loss)
        self.items += items
        self.tokens += tokens
        self.wait_s += wait_s

    def write(
        self,
        stage: str,
        step: int,
        rates: dict[str, float],
        grad_norm: float,
        metrics: dict[str, float],
    ) -> dict[str, Any]:
        """Write the mean over the window as one line, and start the next window."""
        window_s = max(time.monotonic() - self.window_started, 1e-9)
        line = {
            "stage": stage,
            "stage_index": self.start.stage_index,
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            "learning_rates": rates,
            "grad_norm": grad_norm,
            "items": self.items,
            "tokens_per_s": round(self.tokens / window_s, 1),
            "data_wait": round(self.wait_s / window_s, 4),
            "elapsed_s": round(self.elapsed_s, 2),
            **metrics,
        }
        if self.enabled:
            append_jsonl(self.run_dir / "log.jsonl", line)
        self.losses, self.items, self.tokens, self.wait_s = [], 0, 0, 0.0
        self.window_started = time.monotonic()
        return line

    def _drop_lines_after_checkpoint(self) -> None:
        """Remove what a stopped run logged past its checkpoint: those steps are taken again."""
        here = (self.start.stage_index, self.start.step)
        lines = read_log(self.run_dir)
        kept = [line for line in lines if (line["stage_index"], line["step"]) <= here]
        if self.enabled and len(kept) < len(lines):
            (self.run_dir / "log.jsonl").unlink()
            append_jsonl(self.run_dir / "log.jsonl", *kept)


def _one_line(line: dict[str, Any], steps: int) -> str:
    """Say a log line in words, for consoles that cannot show a bar."""
    remaining_s = line["elapsed_s"] / line["step"] * (steps - line["step"])
    return (
        f"{line['stage']} {line['step']}/{steps}  loss {line['loss']:.4f}  "
        f"{line['tokens_per_s']:.0f} tokens/s  {remaining_s / 60:.1f} min left"
    )


@contextmanager
def _progress(console: Console, schedule: Schedule, done: int) -> Iterator[Callable[[float], None]]:
    """Show a bar with the time left on a terminal; yields the function that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(schedule.name, total=schedule.steps, completed=done, loss=math.nan)
        yield lambda loss: progress.update(task, advance=1, loss=loss)
