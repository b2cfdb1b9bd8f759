"""Attention for the short rows of micro models on a CPU.

For bfloat16 and rows of some hundred tokens torch's fused CPU attention takes up to seven times as
long as two plain matrix products and a softmax (`benchmarks/attention.py`); its merit is memory,
which grows with the square of the length here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def short_attention() -> Iterator[None]:
    """On a CPU, attend by plain matrix products; where there is a GPU nothing changes."""
    if torch.cuda.is_available():
        yield
        return
    with _PlainProducts():
        yield


class _PlainProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # What no micro model asks for, such as dropout, is left to torch.
        if func is F.scaled_dot_product_attention and not (
            kwargs.get("dropout_p") or kwargs.get("enable_gqa")
        ):
            func = attend
        return func(*args, **kwargs)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` without dropout and grouped queries, in one precision.

    Args:
        query: (..., L, D).
        key: (..., S, D).
        value: (..., S, E).
        attn_mask: Which keys a query sees, bool, or what is added to its scores; broadcast to
            (..., L, S). A query that sees none gets a mean of all values.
        dropout_p: 0.
        is_causal: Query l sees keys up to l.
        scale: Of the scores; 1 / sqrt(D) by default.
        enable_gqa: False.

    Returns:
        (..., L, E).
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    lead, length = query.shape[:-2], query.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):  # else the softmax is taken in float32
        q, k, v = (x.flatten(0, -3) for x in (query, key, value))
        if is_causal:
            hidden = _hidden(length, k.shape[1], q.dtype)
            scores = torch.baddbmm(hidden, q, k.mT, alpha=scale)
        else:
            scores = torch.bmm(q * scale, k.mT)
        if attn_mask is not None:
            scores = scores.unflatten(0, lead)
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + attn_mask.to(scores.dtype)
            scores = scores.flatten(0, -3)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, lead)


@functools.lru_cache(maxsize=16)
def _hidden(length: int, num_keys: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to causal scores, (1, L, S)."""
    return torch.full((1, length, num_keys), -math.inf, dtype=dtype).triu_(1)
