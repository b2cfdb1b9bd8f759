"""Several conversations in one row, none of which sees another.

A packed row holds conversations one after the other; `segment_ids` (B, L) says which token is whose
(0 is padding). Positions start anew with each segment and attention stays within it, so that a
packed conversation gives the loss and the gradients that it gives alone. Three ways of attention
keep the segments apart:

- "packed", ours: the batch becomes one long row and each segment attends by itself. No work is
  spent on other segments, and the matrix products see no padding.
- FlashAttention, where it is installed: the same through its own variable lengths.
- "sdpa" and "eager": transformers sees positions that start anew and makes a mask (L, L) for each
  row, whose cost grows with the square of the row.

Read next: `modeling.py`, whose forward uses this.

Shapes: B rows, L their length, S segments (with padding's own), D width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import PreTrainedModel

PACKED = "packed"
"""Name of our attention; without segments it is "sdpa"."""


@dataclass(frozen=True)
class Segments:
    """Where the segments of packed rows lie; stretches of padding are segments too.

    Attributes:
        ids: (B, L), 0 for padding, otherwise any number that differs from the neighbour's.
    """

    ids: torch.Tensor

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Positions (B, L), which start anew with each segment."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device).expand(self.ids.shape)
        return places - places.masked_fill(~self._starts, 0).cummax(1).values

    @cached_property
    def bounds(self) -> torch.Tensor:
        """Ends of the segments, counted over all rows from 0 on: int32 (S + 1,)."""
        starts = self._starts.flatten().nonzero()[:, 0]
        return torch.cat([starts, starts.new_tensor([self.ids.numel()])]).int()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each segment (S,)."""
        return self.bounds.diff().tolist()

    @cached_property
    def _starts(self) -> torch.Tensor:
        starts = torch.ones_like(self.ids, dtype=torch.bool)
        starts[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        return starts

    def run(self, llm: PreTrainedModel, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        """Run an LLM on embedded packed rows (B, L, D) and return its output, as long as they.

        Raises:
            ValueError: The segments are not those of the rows.
        """
        rows = inputs_embeds.shape[:2]
        if self.ids.shape != rows:
            raise ValueError(f"segment_ids {tuple(self.ids.shape)} are not of the rows {rows}")
        attention = llm.config._attn_implementation or ""
        inputs: dict[str, Any] = {"position_ids": self.position_ids, "attention_mask": None}
        if attention == PACKED or "flash" in attention:
            inputs["position_ids"] = self.position_ids.view(1, -1)
            inputs_embeds = inputs_embeds.reshape(1, -1, inputs_embeds.shape[-1])
        if attention == PACKED:
            # A mask with four axes is handed on as it is; it keeps one of (L, L) from being made.
            inputs["attention_mask"] = inputs_embeds.new_ones(1, 1, 1, 1, dtype=torch.bool)
            inputs["segment_lengths"] = self.lengths
        elif "flash" in attention:
            longest = max(self.lengths)
            inputs |= {"cu_seq_lens_q": self.bounds, "cu_seq_lens_k": self.bounds}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        output = llm(inputs_embeds=inputs_embeds, use_cache=False, **inputs, **kwargs)
        output.last_hidden_state = output.last_hidden_state.reshape(*rows, -1)
        return output


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each segment of one row, causally; without segments as "sdpa" does.

    Args:
        module: The attention layer.
        query: (1, heads, L, head width), as are the others but for their heads.
        key: Like the query.
        value: Like the query.
        attention_mask: What "sdpa" takes; of no effect with segments.
        segment_lengths: Tokens of each segment, L in all.
        sliding_window: How far a layer looks back.
        kwargs: What "sdpa" takes.

    Returns:
        Attended values (1, L, heads, head width), and None for the weights.

    Raises:
        ValueError: A segment is longer than the sliding window.
    """
    if segment_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[return-value]
    if sliding_window is not None and max(segment_lengths) > sliding_window:
        raise ValueError(
            f"a conversation of {max(segment_lengths)} tokens is longer than the LLM's sliding "
            f"window of {sliding_window}; pack with attn_implementation 'sdpa'"
        )
    kwargs["is_causal"] = True
    parts = zip(*(x.split(segment_lengths, dim=2) for x in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts]
    return torch.cat(attended, dim=1), None


def use_packed_attention(llm: PreTrainedModel) -> None:
    """Let an LLM that attends by "sdpa" attend by "packed"; another attention is kept."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    if llm.config._attn_implementation == "sdpa":
        llm.config._attn_implementation = PACKED
