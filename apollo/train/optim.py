"""AdamW or Muon with one learning rate per part, and the warm-up + cosine schedule.

The paper trains encoders, connector and LLM at different rates and freezes some of them in each
stage (paper, Table 7), so a rate belongs to a part and a rate of 0 means frozen. The schedule is a
pure function of the step: there is no scheduler object to save or restore. Read next: `trainer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

# Not stated in the paper; the values that LLaVA-style and Qwen trainings use.
ADAM_BETAS = (0.9, 0.999)
MUON_RATIO = 2.5
"""Muon's rate over AdamW's, after Muon's own matching of their steps' sizes. In single short
runs the micro language model learnt about equally well with 1.7 and 3.3, worse with 6.7."""


@runtime_checkable
class HasParts(Protocol):
    """A model that says which parts it is made of, such as encoders, connector and LLM."""

    def parts(self) -> dict[str, nn.Module]:
        """Name the parts."""
        ...


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name a model's parts: what its `parts()` says, or the whole of it as the one part "model".

    Raises:
        ValueError: Parameters belong to no part or to two of them.
    """
    if not isinstance(model, HasParts):
        return {"model": model}
    parts = model.parts()
    owned = [id(parameter) for part in parts.values() for parameter in part.parameters()]
    stray = [name for name, parameter in model.named_parameters() if id(parameter) not in owned]
    if stray or len(owned) != len(set(owned)):
        raise ValueError(
            f"each parameter must belong to exactly one of the parts {sorted(parts)}; "
            f"in no part: {stray[:3]}, in two: {len(owned) - len(set(owned))}"
        )
    return parts


def check_learning_rates(parts: Mapping[str, nn.Module], rates: Mapping[str, float]) -> None:
    """Refuse rates that do not name exactly the parts of the model, or that train nothing.

    Raises:
        ValueError: A part is missing, unknown, has a negative rate, or every rate is zero.
    """
    if set(rates) != set(parts):
        raise ValueError(
            f"learning_rates names {sorted(rates)} but the model's parts are {sorted(parts)}; "
            "give every part a rate (0 freezes it)"
        )
    if any(not math.isfinite(rate) or rate < 0 for rate in rates.values()):
        raise ValueError(f"learning rates must be finite and not negative, got {dict(rates)}")
    if not any(rates.values()):
        raise ValueError(f"every part is frozen, nothing to train: {dict(rates)}")


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameter groups and AdamW for the others, as one optimiser.

    Muon makes the step of a matrix orthogonal, so that no few directions of the gradient drown the
    rest (arXiv 2502.16982); it is made for hidden layers. What it
    did for the micro parts stands in docs/architecture.md.

    Args:
        matrices: Groups of 2-D parameters, for Muon.
        others: Groups for AdamW.
    """

    def __init__(self, matrices: list[dict], others: list[dict]) -> None:
        # "match_rms_adamw" scales the step as arXiv 2502.16982 does, to the usual size of AdamW's.
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
        self.adamw = adamw(others)

    @property
    def param_groups(self) -> list[dict]:  # type: ignore[override]
        """Groups of both."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, dict]:  # type: ignore[override]
        """State of each parameter, of both."""
        return {**self.muon.state, **self.adamw.state}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with both."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both."""
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` gave."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])


def adamw(groups: list[dict]) -> torch.optim.AdamW:
    """AdamW; fused: one pass over memory instead of ten, on a CPU half the cost of the step."""
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)


def build_optimizer(
    parts: Mapping[str, nn.Module],
    rates: Mapping[str, float],
    weight_decay: float,
    optimizer: str = "adamw",
) -> torch.optim.Optimizer:
    """Make the optimiser of the trainable parts; 1-D parameters do not decay.

    1-D parameters are norms and biases; pulling them to zero has no use. Each group remembers its
    part and its peak rate, from which `set_learning_rates` computes the rate of a step.

    Args:
        parts: The model's parts by name.
        rates: Peak rate of each part.
        weight_decay: Decay of what has two dimensions or more.
        optimizer: "adamw", or "muon": Muon for the weights of linear layers (but not of an output
            layer that is tied to the embedding), AdamW for all else.
    """
    matrices: list[dict] = []
    others: list[dict] = []
    for name, part in parts.items():
        embeddings = {m.weight for m in part.modules() if isinstance(m, nn.Embedding)}
        linear = {m.weight for m in part.modules() if isinstance(m, nn.Linear)} - embeddings
        by_muon = linear if optimizer == "muon" else set()
        trainable = [p for p in part.parameters() if p.requires_grad]
        for groups, decay, ratio, members in (
            (matrices, weight_decay, MUON_RATIO, [p for p in trainable if p in by_muon]),
            (
                others,
                weight_decay,
                1.0,
                [p for p in trainable if p.ndim > 1 and p not in by_muon],
            ),
            (others, 0.0, 1.0, [p for p in trainable if p.ndim <= 1]),
        ):
            rate = rates[name] * ratio
            if members:
                groups.append(
                    {
                        "params": members,
                        "weight_decay": decay,
                        "lr": rate,
                        "peak_lr": rate,
                        "part": name,
                    }
                )
    return MuonAdamW(matrices, others) if matrices else adamw(others)


def schedule_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Give the fraction of the peak rate at a step: linear warm-up, then a cosine towards zero.

    Args:
        step: The step about to be taken, counted from 0.
        steps: Steps of the whole stage.
        warmup_ratio: Share of the steps that warm up; 0.03 in the paper (App. C.4).
    """
    warmup_steps = math.ceil(steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # +1: the first step also learns
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to `factor` times its peak rate; return each part's rate (AdamW's)."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}
