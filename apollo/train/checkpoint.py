"""Checkpoints that are either whole or absent, and that resume exactly.

A checkpoint is a folder `checkpoints/stage0-step000200` with the weights (safetensors), the
optimiser and a `state.json`. It is written under a temporary name and renamed when complete, and
renamed again before it is removed, so that whatever is killed leaves only whole checkpoints under
their names. There is one layout, whole tensors, for any number of processes and for sharded
training too (`scale.py` gathers them). There is no random state in it: the loop seeds every step
from (seed, stage, step), and the data position follows from the step. Read next: `trainer.py`, the
only writer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from apollo.train.scale import scatter_optimizer_state

_NAME = re.compile(r"stage(\d+)-step(\d+)")
_TEMPORARY = ".writing-"
_DOOMED = ".removing-"


class NotSavedError(ValueError):
    """The run directory cannot be written, usually because the disk is full."""


@dataclass(frozen=True, order=True)
class TrainState:
    """Where a run stands: everything that the weights and the optimiser do not say.

    Attributes:
        stage_index: Number of the stage in the run.
        step: Optimiser steps taken in this stage.
        elapsed_s: Seconds trained in this stage, over all restarts.
        open_losses: Losses of the steps since the last line of the log.
        open_items: Supervised tokens of those steps.
    """

    stage_index: int
    step: int
    elapsed_s: float = 0.0
    open_losses: tuple[float, ...] = ()
    open_items: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: TrainState

    def load_weights(self, model: nn.Module) -> None:
        """Load the weights into a model of the same shape.

        Raises:
            ValueError: The checkpoint is of another model.
        """
        try:
            load_model(model, self.path / "model.safetensors")
        except RuntimeError as error:
            raise ValueError(f"{self.path} does not fit this model: {error}") from error

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimiser's state, for the same parts with the same parameters trainable."""
        state = torch.load(self.path / "optimizer.pt", map_location="cpu", weights_only=True)
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.path} does not fit this optimiser: {error}") from error
        scatter_optimizer_state(optimizer)


def save_checkpoint(
    run_dir: Path, state: TrainState, model: nn.Module, optimizer_state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint atomically, then remove all but the newest `keep`; returns its folder.

    Args:
        run_dir: Folder of the run.
        state: Where the run stands.
        model: The whole model, not its shards.
        optimizer_state: The optimiser's `state_dict()` with whole tensors.
        keep: How many checkpoints stay.

    Raises:
        NotSavedError: The disk is full or cannot be written; earlier checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    name = f"stage{state.stage_index}-step{state.step:06d}"
    temporary, final = root / (_TEMPORARY + name), root / name
    assert not final.exists(), f"{final} is written twice"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary.mkdir()
        save_model(model, str(temporary / "model.safetensors"))
        torch.save(optimizer_state, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports in its own way
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotSavedError(_not_saved(run_dir, f"checkpoint {name}", error)) from error
    temporary.rename(final)
    _flush(root)
    for old in list_checkpoints(run_dir)[:-keep]:
        old.path.rename(root / (_DOOMED + old.path.name))
    _sweep(root)
    return final


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """List the complete checkpoints of a run, oldest first; half-written ones do not count."""
    found = []
    for path in (run_dir / "checkpoints").glob("stage*-step*"):
        if _NAME.fullmatch(path.name):
            fields = json.loads((path / "state.json").read_text(encoding="utf-8"))
            fields["open_losses"] = tuple(fields["open_losses"])
            found.append(Checkpoint(path, TrainState(**fields)))
    return sorted(found, key=lambda checkpoint: checkpoint.state)


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Find the newest complete checkpoint of a run, or None."""
    checkpoints = list_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None


def how_to_go_on(run_dir: Path) -> str:
    """Say in one clause which checkpoint a stopped run would go on from."""
    newest = latest_checkpoint(run_dir)
    if newest is None:
        return "there is no checkpoint yet"
    return f"last good checkpoint: {newest.path}; go on with --resume --out {run_dir}"


def not_logged(run_dir: Path, error: OSError) -> NotSavedError:
    """Make the error of a log that cannot be written."""
    return NotSavedError(_not_saved(run_dir, "log.jsonl", error))


def _not_saved(run_dir: Path, what: str, error: Exception) -> str:
    free = shutil.disk_usage(run_dir).free / 2**30
    return (
        f"cannot write {what} ({error}); {free:.2f} GiB are free in {run_dir}. "
        f"Make room, then: {how_to_go_on(run_dir)}"
    )


def _sweep(root: Path) -> None:
    """Remove what killed writes and killed removals have left."""
    for pattern in (_TEMPORARY, _DOOMED):
        for rubble in root.glob(pattern + "*"):
            shutil.rmtree(rubble)


def _flush(path: Path) -> None:
    """Force a file or folder to disk, so that the rename cannot overtake the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
