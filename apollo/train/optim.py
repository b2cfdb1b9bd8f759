"""AdamW with one learning rate per part, and the warm-up + cosine schedule.

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


def build_optimizer(
    parts: Mapping[str, nn.Module], rates: Mapping[str, float], weight_decay: float
) -> torch.optim.AdamW:
    """Make AdamW over the trainable parts: two groups per part, without decay for 1-D parameters.

    1-D parameters are norms and biases; pulling them to zero has no use. Each group remembers its
    part and its peak rate, from which `set_learning_rates` computes the rate of a step.
    """
    groups = []
    for name, part in parts.items():
        trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for decay, members in (
            (weight_decay, [p for p in trainable if p.ndim > 1]),
            (0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if members:
                groups.append(
                    {
                        "params": members,
                        "weight_decay": decay,
                        "lr": rates[name],
                        "peak_lr": rates[name],
                        "part": name,
                    }
                )
    # Fused: one pass over memory instead of ten; on a CPU it halves the cost of the step.
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)


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
    """Set every group to `factor` times its peak rate and return the rate of each part."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}
