"""From one device to many: joining processes, DDP, FSDP2, recomputed and compiled layers.

The loop is the same on a laptop and on a cluster; what differs is here. With `sharding: no` every
process holds the whole model (DDP). With `sharding: fsdp2` weights, gradients and optimiser of the
parts that learn are cut into one piece per process, layer by layer; the caller's model stays whole
on the CPU, and each checkpoint first gathers the pieces into it. So checkpoints have one layout,
and a run resumes with another number of processes, sharded or not. Read next: `trainer.py`.
"""

from __future__ import annotations

import copy
import datetime
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from apollo.train.optim import parts_of

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for the others: one of them encodes a whole stage's videos meanwhile."""


# ---- processes


def join_processes() -> PartialState:
    """Join the processes that torchrun or Slurm started; without a GPU they talk over gloo.

    Call it before anything else of Accelerate, which by itself would let such processes run side by
    side on a CPU, each on its own.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not torch.cuda.is_available():
        return PartialState(cpu=True, timeout=PATIENCE)
    return PartialState(timeout=PATIENCE) if launched else PartialState()


def make_accelerator(tracker: Tracker, run_dir: Path) -> Accelerator:
    """Make the object that knows device, ranks and trackers.

    Raises:
        ValueError: The launcher asks for an engine that the loop does not know, or the tracker's
            package is missing.
    """
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(
            f"tracker {tracker!r} needs the package {tracker}: pip install {tracker}, "
            "or set loop.tracker=none (log.jsonl and curves.png are always written)"
        )
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise ValueError(
                f"the launcher's config asks for {engine}, which this loop does not use; choose "
                "plain multi-GPU there (or torchrun) and set loop.sharding=fsdp2 to shard"
            )
    join_processes()
    accelerator = Accelerator(
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(str(run_dir), logging_dir=str(run_dir / "tensorboard")),
    )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(f"cannot train over {accelerator.distributed_type}; use torchrun")
    return accelerator


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Add up each value over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    here = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(here, "sum").tolist()


# ---- the model, spread


@contextmanager
def spread(
    model: nn.Module,
    learning_rates: Mapping[str, float],
    accelerator: Accelerator,
    sharding: Literal["no", "fsdp2"],
    dtype: torch.dtype | None,
    compile_layers: bool,
) -> Iterator[nn.Module]:
    """Put the model on its device or devices; yields what the loop calls.

    Args:
        model: The caller's model.
        learning_rates: Rate of each part; 0 means frozen.
        accelerator: Knows the processes.
        sharding: "no" or "fsdp2".
        dtype: Type of the matrix products, None for float32.
        compile_layers: Whether torch.compile works on each layer.
    """
    wrapped: nn.Module
    if sharding == "fsdp2":
        wrapped = _shard(model, learning_rates, accelerator, dtype)
    else:
        wrapped = accelerator.prepare(model)
    layers = _layers(wrapped) if compile_layers else []
    for layer in layers:
        # The forward alone, so that FSDP's and checkpointing's hooks stay outside of the graph.
        layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
    try:
        yield wrapped
    finally:
        for layer in layers:
            del layer.forward


def inner(wrapped: nn.Module) -> nn.Module:
    """Give the model whose parameters are optimised: the caller's own, or its sharded copy."""
    return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped


def _shard(
    model: nn.Module,
    learning_rates: Mapping[str, float],
    accelerator: Accelerator,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Copy the model and shard the parts that learn; frozen parts stay whole in each process.

    Frozen encoders run once per so many clips, and one process may have more clips than another:
    were they sharded, the processes would wait for each other for ever. What is frozen needs no
    gradient and no optimiser state, which are most of the memory.
    """
    if not torch.distributed.is_initialized():
        raise ValueError(
            "sharding 'fsdp2' needs torchrun, such as `torchrun --nproc-per-node 8 -m apollo "
            "train ...`; in a single process set loop.sharding=no"
        )
    if unshardable := [n for n, p in model.named_parameters() if not p.is_floating_point()]:
        raise ValueError(f"{unshardable[0]} is quantised and cannot be sharded: loop.sharding=no")
    # The copy's parameters begin as views of the model's own: no second copy in memory.
    model.to("cpu")
    views: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    sharded = copy.deepcopy(model, views)
    parts = parts_of(sharded)
    frozen = [
        parts[name].to(accelerator.device) for name, rate in learning_rates.items() if not rate
    ]
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "ignored_params": {p for part in frozen for p in part.parameters()},
    }
    if dtype is not None:  # half the traffic; gradients are still added up in float32
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for name, part in parts.items():
        if learning_rates[name] > 0 and part is not sharded:
            for unit in _units(part):
                fully_shard(unit, **options)
    fully_shard(sharded, **options)
    return sharded


def _units(part: nn.Module) -> list[nn.Module]:
    """List what is gathered at once: the layers, or a part without layers (the connector)."""
    layers: list[nn.Module] = list(_layers(part))
    if layers or isinstance(part, nn.ModuleList | nn.ModuleDict):
        return layers
    return [part]


def _layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """List the layers of encoders and LLM: in transformers all are of this class."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def gather_weights(wrapped: nn.Module, model: nn.Module) -> None:
    """Bring the caller's model up to date with its sharded copy; all processes take part."""
    if (source := inner(wrapped)) is model:
        return
    pairs = zip(model.named_parameters(), source.named_parameters(), strict=True)
    with torch.no_grad():
        for (name, whole), (same_name, piece) in pairs:
            assert name == same_name
            if piece.requires_grad:
                whole.copy_(_whole(piece))
        for buffer, source_buffer in zip(model.buffers(), source.buffers(), strict=True):
            buffer.copy_(source_buffer)


def gather_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Give `optimizer.state_dict()` with whole tensors; all processes take part.

    Args:
        optimizer: Of a model that may be sharded.
        keep: Whether this process wants the result; the others return no tensors.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        whole = _whole(leaf)
        return whole.cpu() if keep else None

    return tree_map(gather, optimizer.state_dict())


def scatter_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Cut an optimiser's whole tensors the way its parameters are cut."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, DTensor):
            for name, value in state.items():
                if value.shape == parameter.shape and value.ndim and not isinstance(value, DTensor):
                    # Every process has read the whole tensor, so nothing needs to be sent.
                    state[name] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: list[nn.Parameter], largest_norm: float) -> float:
    """Scale the gradients down to a norm over all parameters and processes; return what it was."""
    return float(_whole(torch.nn.utils.clip_grad_norm_(parameters, largest_norm)))


# ---- recomputed activations


@contextmanager
def recomputed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Let the layers of encoders and LLM forget their activations and compute them again.

    Raises:
        ValueError: The model has no layers that can.
    """
    if not enabled:
        yield
        return
    if not _layers(model):
        raise ValueError("gradient_checkpointing: this model has no layers of transformers' kind")
    layers = [layer for layer in _layers(model) if not layer.gradient_checkpointing]
    for layer in layers:
        layer.gradient_checkpointing = True
        recompute: Any = partial(checkpoint, use_reentrant=False)
        layer._gradient_checkpointing_func = recompute
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


def recompute_in_frozen(part: nn.Module) -> None:
    """Let the layers of a frozen part recompute too, if they do at all.

    A layer recomputes only in training mode. Frozen parts are in evaluation mode, so that nothing
    is dropped; but gradients pass through a frozen LLM on their way to the connector, and there its
    activations are the largest thing in memory. A layer's own flag decides nothing else.
    """
    for layer in _layers(part):
        layer.training = layer.gradient_checkpointing
