"""Checkpoints that are either whole or absent, and that resume exactly.

A checkpoint is a folder `checkpoints/stage0-step000200` with the weights (safetensors), the
optimiser and a `state.json`. It is written under a temporary name and renamed when complete, so
that a killed write leaves the last good checkpoint alone. There is no random state in it: the loop
seeds every step from (seed, stage, step), and the data position follows from the step. Read next:
`trainer.py`, the only writer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

_NAME = re.compile(r"stage(\d+)-step(\d+)")
_TEMPORARY = ".writing-"


@dataclass(frozen=True, order=True)
class TrainState:
    """Where a run stands: everything that the weights and the optimiser do not say.

    Attributes:
        stage_index: Number of the stage in the run.
        step: Optimiser steps taken in this stage.
        next_batch: Number of the first batch (of the stage, over all ranks) that was not used yet.
        elapsed_s: Seconds trained in this stage, over all restarts.
    """

    stage_index: int
    step: int
    next_batch: int = 0
    elapsed_s: float = 0.0


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
        optimizer.load_state_dict(state)


def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write a checkpoint atomically, then remove all but the newest `keep`; returns its folder."""
    root = run_dir / "checkpoints"
    name = f"stage{state.stage_index}-step{state.step:06d}"
    temporary, final = root / (_TEMPORARY + name), root / name
    if temporary.exists():
        shutil.rmtree(temporary)  # left by a killed write
    temporary.mkdir(parents=True)
    save_model(model, str(temporary / "model.safetensors"))
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    (temporary / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(root)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old.path)
    return final


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """List the complete checkpoints of a run, oldest first; half-written ones do not count."""
    found = []
    for path in (run_dir / "checkpoints").glob("stage*-step*"):
        if _NAME.fullmatch(path.name):
            state = TrainState(**json.loads((path / "state.json").read_text(encoding="utf-8")))
            found.append(Checkpoint(path, state))
    return sorted(found, key=lambda checkpoint: checkpoint.state)


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Find the newest complete checkpoint of a run, or None."""
    checkpoints = list_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None


def _flush(path: Path) -> None:
    """Force a file or folder to disk, so that the rename cannot overtake the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
