"""The one training loop: everything that learns in this repository learns here.

`run_stage` trains any module that keeps one contract, `model(**batch, num_items_in_batch=n).loss`,
where n is the number of supervised tokens in the whole global step: Apollo, a language model alone,
or the contrastive pair that makes an image encoder. The loss is the summed token loss over n, so
that 1 batch of 8 and 8 batches of 1, on one process or on eight, give the same gradient. Every
random choice is seeded by (seed, stage, step) and batch i is a pure function of i, so that stop +
resume equals a straight run. Read next: `scale.py` (many devices), `optim.py`, `checkpoint.py`,
`log.py`, then `run.py`, which feeds this with a recipe.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from apollo.runtime import keep_freed_memory, set_seed
from apollo.train.checkpoint import (
    Checkpoint,
    TrainState,
    how_to_go_on,
    latest_checkpoint,
    save_checkpoint,
)
from apollo.train.interrupt import StopRequest, leave_signals_to_parent, only_writer
from apollo.train.log import TrainLog, progress_bar
from apollo.train.optim import (
    build_optimizer,
    check_learning_rates,
    parts_of,
    schedule_factor,
    set_learning_rates,
)
from apollo.train.scale import (
    Tracker,
    clip_gradients,
    gather_optimizer_state,
    gather_weights,
    inner,
    make_accelerator,
    recompute_in_frozen,
    recomputed,
    spread,
    sum_over_ranks,
)
from apollo.train.short_attention import short_attention

Batch = Mapping[str, Any]
"""What the model takes: `input_ids`, `labels` (-100: not supervised) and so on; tensors, lists."""
BatchAt = Callable[[int], Batch | Sequence[Batch]]
"""From its number to a batch, or to its rows, which go through the model one after the other; of a
step, all batches have equally many."""

IGNORED_LABEL = -100
AUTOCAST = {"no": None, "bf16": torch.bfloat16}


class DivergedError(ValueError):
    """The loss or the gradient is no longer a number."""


class TooLittleMemoryError(ValueError):
    """A step does not fit into the memory of the GPU or the machine."""


@runtime_checkable
class TellsRecords(Protocol):
    """Batches that can say which records they are made of, for messages."""

    def records(self, number: int) -> list[Any]:
        """Give the records of a batch, each with its place in `where`."""
        ...


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
        sharding: "no" (each process holds the whole model) or "fsdp2" (the parts that learn are cut
            into one piece per process).
        gradient_checkpointing: Compute the layers' activations again in the backward pass instead
            of keeping them: much less memory for about a third more time.
        compile: Run each layer through torch.compile; worth its minutes on a GPU and long runs.
        tracker: "tensorboard", "wandb" or "trackio" get a copy of each line of the log.
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
    sharding: Literal["no", "fsdp2"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    tracker: Tracker = "none"


def run_stage(
    model: nn.Module,
    batch_at: BatchAt,
    schedule: Schedule,
    loop: LoopSettings,
    run_dir: Path,
    *,
    stage_index: int = 0,
    resume: bool = False,
    on_eval: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> None:
    """Train one stage in place; log.jsonl, checkpoints and curves.png go into the run directory.

    SIGTERM and SIGINT end the run after the step in progress, with a checkpoint and exit code 143
    or 130.

    Args:
        model: Anything with `model(**batch, num_items_in_batch=n).loss`; float32 where it is
            trained.
        batch_at: Gives batch number i of the stage; must depend on i alone. With n = accumulation x
            processes, step s is made of the batches s * n to (s + 1) * n - 1, and process r of R
            takes those with i % R == r. To resume with another n, let these be the same samples
            in other portions, as `run.py` does.
        schedule: What is learnt and how fast.
        loop: How the loop runs.
        run_dir: Folder of the run; made if absent.
        stage_index: Number of the stage in the run.
        resume: Go on from the newest checkpoint of the run: within this stage exactly where it
            stopped, from an earlier stage with its weights. A stage that is already finished is
            left as it is.
        on_eval: Called as `on_eval(model, step)` every `loop.eval_every` steps with the model in
            eval mode and without gradients; what it returns is put into the log. Of a sharded model
            it gets the gathered one, which lies on the CPU.

    Raises:
        ValueError: Settings that cannot work, or a run directory that already holds this stage or
            is being trained into.
        DivergedError: The loss or the gradient is not finite.
        TooLittleMemoryError: A step does not fit.
        NotSavedError: A checkpoint or the log cannot be written.
    """
    parts = parts_of(model)
    _check_settings(parts, schedule, loop)
    run_dir.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(loop.tracker, run_dir)
    is_main = accelerator.is_main_process
    console = Console(stderr=True, quiet=not is_main)
    autocast_dtype = AUTOCAST[loop.mixed_precision]
    rates_of_parts = schedule.learning_rates
    if accelerator.device.type == "cpu":
        keep_freed_memory()

    with (
        only_writer(run_dir, enabled=is_main),
        StopRequest() as stop,
        _FailedStep(schedule.name, run_dir) as at,
        recomputed(model, loop.gradient_checkpointing),
        _frozen(model, parts, rates_of_parts),
        # What is recomputed in the backward pass does not see it.
        nullcontext() if loop.gradient_checkpointing else short_attention(),
    ):
        state, checkpoint = _find_start(model, run_dir, stage_index, resume)
        if state.step >= schedule.steps:
            return
        for line in _describe_parts(parts, rates_of_parts):
            console.print(line, highlight=False)
        with (
            spread(
                model, rates_of_parts, accelerator, loop.sharding, autocast_dtype, loop.compile
            ) as wrapped,
            TrainLog(run_dir, schedule.name, state, accelerator, console) as log,
            progress_bar(console, schedule.name, schedule.steps, state.step) as advance,
        ):
            optimizer = build_optimizer(
                parts_of(inner(wrapped)), rates_of_parts, schedule.weight_decay, schedule.optimizer
            )
            if checkpoint:
                checkpoint.load_optimizer(optimizer)
            trainable = [p for p in wrapped.parameters() if p.requires_grad]
            batches = _load_batches(batch_at, state.step, schedule, loop, accelerator)
            last_save = time.monotonic()

            for step in range(state.step, schedule.steps):
                # ---- data: all batches of the step, because the loss needs their number of items
                at.step = step
                wait_start = time.monotonic()
                step_batches = [
                    row for _ in range(loop.gradient_accumulation) for row in next(batches)
                ]
                wait_s = time.monotonic() - wait_start
                num_items, num_tokens = map(
                    int,
                    sum_over_ranks(
                        accelerator,
                        sum(map(count_items, step_batches)),
                        sum(map(count_tokens, step_batches)),
                    ),
                )
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
                    # DDP sends gradients once a step; FSDP2 after each batch, to keep only shards.
                    with nullcontext() if last else accelerator.no_sync(wrapped):
                        with torch.autocast(
                            accelerator.device.type,
                            autocast_dtype,
                            enabled=autocast_dtype is not None,
                        ):
                            batch = send_to_device(dict(batch), accelerator.device)
                            output = wrapped(**batch, num_items_in_batch=num_items)
                        # DDP and FSDP take the mean of the ranks' gradients; we want their sum.
                        (output.loss * accelerator.num_processes).backward()
                        loss += output.loss.detach()
                grad_norm = clip_gradients(trainable, schedule.grad_clip)

                # ---- what all processes must agree on: the loss, whether to stop, whether to save
                minutes = (time.monotonic() - last_save) / 60
                save_due = is_main and minutes > loop.save_every_minutes
                loss_value, save_due, *votes = sum_over_ranks(
                    accelerator, loss.item(), save_due, *stop.votes()
                )
                exit_code = stop.exit_code(votes)
                if not math.isfinite(loss_value) or not math.isfinite(grad_norm):
                    pieces = loop.gradient_accumulation * accelerator.num_processes
                    numbers = range(step * pieces, (step + 1) * pieces)
                    raise at.diverged(loss_value, grad_norm, rates, batch_at, numbers)

                # ---- update
                optimizer.step()
                optimizer.zero_grad()

                # ---- evaluation, log, checkpoint
                done = step + 1
                final = done == schedule.steps
                log.add(loss_value, num_items, num_tokens, wait_s)
                metrics, row = {}, None
                if on_eval and loop.eval_every and (final or done % loop.eval_every == 0):
                    gather_weights(wrapped, model)
                    metrics = _evaluate(model, on_eval, done)
                    _set_modes(model, parts, rates_of_parts)
                if metrics or final or done % loop.log_every == 0:
                    row = log.write(done, rates, grad_norm, metrics)
                advance(loss_value, row)
                if final or exit_code or save_due or done % loop.save_every == 0:
                    gather_weights(wrapped, model)
                    optimizer_state = gather_optimizer_state(optimizer, keep=is_main)
                    if is_main:
                        save_checkpoint(
                            run_dir, log.state(done), model, optimizer_state, loop.keep_checkpoints
                        )
                    last_save = time.monotonic()
                if exit_code:
                    accelerator.wait_for_everyone()  # launchers kill the rest when one has left
                    console.print(f"stopped after step {done}; {how_to_go_on(run_dir)}")
                    raise SystemExit(exit_code)
    accelerator.wait_for_everyone()


def count_items(batch: Batch) -> int:
    """Count what a batch's loss is summed over: supervised tokens, or rows if there are no labels.

    The first token of a row is never predicted, so that its label does not count.
    """
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    return len(next(iter(batch.values())))


def count_tokens(batch: Batch) -> int:
    """Count the tokens that a batch feeds in; rows if it has no text."""
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
        trained = part.parameters() if schedule.learning_rates[name] else ()
        dtypes = {p.dtype for p in trained if p.requires_grad}
        if dtypes - {torch.float32}:
            # bfloat16 weights have 8 bits of mantissa: an update of 1e-5 of a weight is lost.
            raise ValueError(f"part {name!r} is trained but held in {dtypes}; load it as float32")


def _find_start(
    model: nn.Module, run_dir: Path, stage_index: int, resume: bool
) -> tuple[TrainState, Checkpoint | None]:
    """Load the weights to start from; give the step to start at and the checkpoint of this stage.

    Raises:
        ValueError: Without `resume`, there is a checkpoint of this stage; with it, of a later one.
    """
    newest = latest_checkpoint(run_dir)
    if newest and resume and newest.state.stage_index > stage_index:
        raise ValueError(f"{run_dir} is past stage {stage_index}: it holds {newest.path.name}")
    if newest and not resume and newest.state.stage_index >= stage_index:
        raise ValueError(
            f"{run_dir} already holds {newest.path.name}; resume it or choose another folder"
        )
    if newest and resume:
        newest.load_weights(model)
        if newest.state.stage_index == stage_index:
            return newest.state, newest
    return TrainState(stage_index, 0), None


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
        if rates[name] == 0:
            recompute_in_frozen(part)


def _describe_parts(parts: dict[str, nn.Module], rates: Mapping[str, float]) -> Iterator[str]:
    for name, part in parts.items():
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6
        status = f"{trained:.2f}M trained at {rates[name]:g}" if rates[name] else "frozen"
        yield f"  {name:<12}{millions:10.2f}M parameters  {status}"


class _Positions(Dataset[Sequence[Batch]]):
    """A map-style data set over batch numbers: the loop starts anywhere, workers load ahead."""

    def __init__(self, batch_at: BatchAt) -> None:
        self.batch_at = batch_at

    def __getitem__(self, index: int) -> Sequence[Batch]:
        batch = self.batch_at(index)
        return [batch] if isinstance(batch, Mapping) else batch


def _load_batches(
    batch_at: BatchAt,
    first_step: int,
    schedule: Schedule,
    loop: LoopSettings,
    accelerator: Accelerator,
) -> Iterator[Sequence[Batch]]:
    """Iterate over the rows of this process's batches from a step on to the end of the stage."""
    ranks = accelerator.num_processes
    start, end = (n * loop.gradient_accumulation * ranks for n in (first_step, schedule.steps))
    numbers = range(start + accelerator.process_index, end, ranks)
    loader = DataLoader(
        _Positions(batch_at),
        batch_size=None,
        sampler=numbers,
        num_workers=loop.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=_begin_loading,
        multiprocessing_context="fork" if loop.num_workers else None,  # not so by default on 3.14
    )
    # Workers are forked, and a video decoder's threads do not live on in a fork: were a decoder
    # among the garbage that a worker collects, it would wait for those threads for ever.
    gc.collect()
    batches = iter(loader)
    return _while_none_is_killed(batches, active_children())


def _while_none_is_killed(batches: Iterator[Any], loaders: Sequence[BaseProcess]) -> Iterator[Any]:
    """Iterate; a killed loader is seen as many things, from a lost connection to an early end."""
    try:
        yield from batches
    except Exception as error:
        for loader in loaders:
            loader.join(0.1)  # what it leaves undone may be seen before its end
        if any(loader.exitcode == -signal.SIGKILL for loader in loaders):
            raise MemoryError("a process that loads batches is killed by signal: Killed") from error
        raise


def _begin_loading(worker: int) -> None:
    """In each process that makes batches, first."""
    leave_signals_to_parent(worker)
    keep_freed_memory(False)


# ---- within the loop


def _step_seed(seed: int, stage_index: int, step: int, rank: int) -> int:
    """Mix the four numbers into one seed."""
    return (((seed * 1_000 + stage_index) * 1_000 + rank) * 10_000_000 + step) % 2**32


@dataclass
class _FailedStep:
    """Says what failed, where, and what to do about it; a context manager around the steps."""

    stage: str
    run_dir: Path
    step: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if _is_out_of_memory(error):
            reason = (str(error) or repr(error)).splitlines()[0][:200]
            raise TooLittleMemoryError(
                f"{self} ran out of memory ({reason}). Use more, smaller batches (a higher "
                "loop.gradient_accumulation), fewer clips (the stage's max_clips), "
                "loop.gradient_checkpointing=true, fewer loop.num_workers, or more GPUs with "
                f"loop.sharding=fsdp2; {how_to_go_on(self.run_dir)}"
            ) from error

    def __str__(self) -> str:
        return f"stage {self.stage}" + ("" if self.step is None else f", step {self.step}")

    def diverged(
        self,
        loss: float,
        grad_norm: float,
        rates: Mapping[str, float],
        batch_at: BatchAt,
        numbers: range,
    ) -> DivergedError:
        """Make the error of a loss that is no number, naming the records of its step."""
        records = ""
        if isinstance(batch_at, TellsRecords):
            places = [record.where for number in numbers for record in batch_at.records(number)]
            more = f" and {len(places) - 8} more" if len(places) > 8 else ""
            records = f" (records {', '.join(places[:8])}{more})"
        return DivergedError(
            f"{self}: loss {loss}, gradient norm {grad_norm}, learning rates {dict(rates)}. Lower "
            f"the learning rates or look at the step{records}; {how_to_go_on(self.run_dir)}"
        )


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Tell lack of memory from other errors; on a CPU torch has no type for it.

    Where memory runs out, Linux kills what holds most: often a process that loads batches.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "is killed by signal: Killed")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _evaluate(
    model: nn.Module, on_eval: Callable[[nn.Module, int], dict[str, float]], step: int
) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        return on_eval(model, step)
