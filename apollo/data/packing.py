"""Packing: the records of a batch in one row, so that no token of it is padding.

Conversations differ in length by a factor of twenty, and a batch that is padded to its longest is
mostly padding. A packed batch is a single row of all its records, told apart by `segment_ids`
(`apollo/model/segments.py` keeps them from seeing each other). Which records make up an optimiser
step is the mixture's word alone; packing only deals those of one step to its batches. So it changes
neither what a step sees nor its loss, and batch i stays a function of i.

There is no number of rows to choose and no row to fill: a batch holds an equal share of the step's
tokens, whose number is batch_size * mean length / (gradient_accumulation * processes). To need less
memory, raise gradient_accumulation, or bound the rows by `tokens_per_row`. No torch until it is
called. Read next: `collate.py`.

Shapes: B conversations, L the longest, T tokens of all of them, rounded up.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
ROUND_TO = 64
"""Packed rows are this long or a multiple of it: fewer shapes for a CPU to prepare its matrix
products for, and whole tiles for a GPU."""


def deal(lengths: Sequence[int], num_batches: int) -> list[list[int]]:
    """Deal records to batches so that these hold about equally many tokens.

    The longest comes first, each to the batch that is emptiest so far (Graham's longest processing
    time rule, 1969: the fullest batch is at most 4/3 of what would be best). Ranks that work on
    batches of the same step so wait little for one another.

    Args:
        lengths: Tokens of each record.
        num_batches: How many batches; none is left empty.

    Returns:
        For each batch the places of its records in `lengths`, longest first.
    """
    assert 0 < num_batches <= len(lengths)
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    emptiest = [(0, 0, number) for number in range(num_batches)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        tokens, records, number = heapq.heappop(emptiest)
        batches[number].append(place)
        heapq.heappush(emptiest, (tokens + lengths[place], records + 1, number))
    return batches


def pack(batch: dict[str, torch.Tensor], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Put the conversations of a padded batch one after the other into one row.

    Args:
        batch: `input_ids`, `attention_mask` and `labels` (B, L), padded on either side.
        pad_token_id: What the end of the row is filled with.

    Returns:
        The same three as (1, T), and `segment_ids` (1, T): 1 to B, and 0 for padding. The first
        token of each conversation has no label, for nothing before it may predict it.
    """
    import torch

    is_token = batch["attention_mask"].bool()
    is_first = is_token & (is_token.cumsum(1) == 1)
    numbers = torch.arange(1, len(is_token) + 1)[:, None].expand(is_token.shape)
    padding = -int(is_token.sum()) % ROUND_TO
    row = {
        "input_ids": (batch["input_ids"], pad_token_id),
        "attention_mask": (batch["attention_mask"], 0),
        "labels": (batch["labels"].masked_fill(is_first, IGNORED_LABEL), IGNORED_LABEL),
        "segment_ids": (numbers, 0),
    }
    return {
        name: torch.nn.functional.pad(values[is_token], (0, padding), value=filler)[None]
        for name, (values, filler) in row.items()
    }
