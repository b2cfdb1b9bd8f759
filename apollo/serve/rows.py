"""Key-value caches: of conversations that are answered together, and of what may be asked again.

Answers of different length to prompts of different length share one forward pass (`Rows`): each
row has its own number of tokens, new ones are written behind them, and what lies beyond is masked,
so that a row's answer does not depend on its company. What has been read is kept (`PrefixCache`),
since the next question of a conversation, and others on the same video, begin with the same tokens.
Read next: `engine.py`, which drives both.

Shapes: B rows, L new tokens of each, K slots for tokens, H key-value heads, W width of a head, D
width of the LLM, P tokens of a prefix.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from apollo.model.modeling import CACHE, ApolloForConditionalGeneration

SLOT_MULTIPLE = 64
"""Attention spans a multiple of so many slots: few shapes, and kernels that add in one order."""


@dataclass(frozen=True)
class Prefix:
    """What the LLM made of the first tokens of a conversation.

    Attributes:
        key: What was read, int64 (P,), see `engine.Prompt`.
        layers: Keys and values (H, P, W) of each layer.
    """

    key: np.ndarray
    layers: list[tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(states.nbytes for pair in self.layers for states in pair)


class Rows(Cache):
    """The caches of B conversations, which grow apart.

    Attributes:
        lengths: Tokens read of each row.
    """

    def __init__(self, prefixes: Sequence[tuple[Prefix | None, int]] = ()) -> None:
        """Begin rows, each with the first so many tokens of a prefix or with none."""
        super().__init__(layers=[])
        self.lengths = [length for _, length in prefixes]
        # (rows, H, slots, W) of each layer; there may be more rows than B, and slots than K.
        self._states: list[tuple[Tensor, Tensor]] = []
        self._slots = torch.empty(0)
        self._num_seen = 0
        known = [prefix for prefix, length in prefixes if prefix is not None and length > 0]
        if not known:
            return
        num_slots = _round_up(max(self.lengths))
        for number, pair in enumerate(known[0].layers):
            states = []
            for kind, example in enumerate(pair):
                shape = (len(prefixes), example.shape[0], num_slots, example.shape[2])
                states.append(example.new_zeros(shape))
                for row, (prefix, length) in enumerate(prefixes):
                    if prefix is not None:
                        states[-1][row, :, :length] = prefix.layers[number][kind][:, :length]
            self._states.append((states[0], states[1]))

    @torch.inference_mode()
    def read(
        self, model: ApolloForConditionalGeneration, embeds: Tensor, num_new: Sequence[int]
    ) -> Tensor:
        """Let the LLM read on in every row.

        Args:
            model: The model.
            embeds: Embedded tokens (B, L, D), padded behind.
            num_new: How many of the L tokens of each row are not padding.

        Returns:
            What the LLM makes of each row's last new token, (B, D).
        """
        num_rows, num_tokens, _ = embeds.shape
        device = embeds.device
        starts = torch.tensor(self.lengths, device=device)
        self._slots = starts[:, None] + torch.arange(num_tokens, device=device)  # (B, L)
        self._num_seen = _round_up(max(self.lengths) + num_tokens)
        self._reserve(num_rows, self._num_seen)
        is_hidden = torch.arange(self._num_seen, device=device) > self._slots[:, :, None]
        lowest = torch.finfo(embeds.dtype).min
        mask = torch.zeros_like(is_hidden, dtype=embeds.dtype).masked_fill(is_hidden, lowest)
        hidden = model.model.llm(
            inputs_embeds=embeds,
            attention_mask=mask[:, None],  # (B, 1, L, K)
            position_ids=self._slots,
            use_cache=True,
            **{CACHE: self},
        ).last_hidden_state
        self.lengths = [old + new for old, new in zip(self.lengths, num_new, strict=True)]
        last = torch.tensor(num_new, device=device) - 1
        return hidden[torch.arange(num_rows, device=device), last]

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (B, H, L, W); return what attention may see."""
        if layer_idx == len(self._states):
            shape = (*key_states.shape[:2], self._num_seen, key_states.shape[3])
            # Zeros: hidden slots get no weight, but nothing times what is not a number is not 0.
            self._states.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))
        keys, values = self._states[layer_idx]
        num_rows = len(self._slots)
        row = torch.arange(num_rows, device=key_states.device)[:, None]
        keys[row, :, self._slots] = key_states.transpose(1, 2)
        values[row, :, self._slots] = value_states.transpose(1, 2)
        return keys[:num_rows, :, : self._num_seen], values[:num_rows, :, : self._num_seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots that are seen."""
        return self._num_seen

    def join(self, others: "Rows") -> None:
        """Take in the rows of others, behind the own."""
        if not self.lengths:
            self.lengths, self._states = others.lengths, others._states
            return
        first, num_slots = len(self.lengths), _round_up(max(others.lengths))
        self.lengths = self.lengths + others.lengths
        self._reserve(len(self.lengths), _round_up(max(self.lengths)))
        for mine, theirs in zip(self._states, others._states, strict=True):
            for states, new in zip(mine, theirs, strict=True):
                states[first : len(self.lengths), :, :num_slots] = new[:, :, :num_slots]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, each of which stays or moves forward."""
        for place, row in enumerate(rows):
            if place != row:
                for pair in self._states:
                    for states in pair:
                        states[place, :, : self.lengths[row]] = states[row, :, : self.lengths[row]]
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            self._states = []

    def prefix(self, row: int, key: np.ndarray) -> Prefix:
        """Copy what was read of a row; `key` has a number for each token of it."""
        length = self.lengths[row]
        assert len(key) == length
        return Prefix(
            key,
            [
                (keys[row, :, :length].clone(), values[row, :, :length].clone())
                for keys, values in self._states
            ],
        )

    def _reserve(self, num_rows: int, num_slots: int) -> None:
        """Make room; what there is is only copied where it does not suffice."""
        if not self._states or _fits(self._states[0][0], num_rows, num_slots):
            return
        for layer, pair in enumerate(self._states):
            self._states[layer] = (
                _resized(pair[0], num_rows, num_slots),
                _resized(pair[1], num_rows, num_slots),
            )


def _fits(states: Tensor, num_rows: int, num_slots: int) -> bool:
    return num_rows <= states.shape[0] and num_slots <= states.shape[2]


def _resized(states: Tensor, num_rows: int, num_slots: int) -> Tensor:
    """Keys or values in a tensor of this size, filled up with zeros."""
    resized = states.new_zeros(num_rows, states.shape[1], num_slots, states.shape[3])
    rows, slots = min(num_rows, states.shape[0]), min(num_slots, states.shape[2])
    resized[:rows, :, :slots] = states[:rows, :, :slots]
    return resized


class PrefixCache:
    """The prefixes used last, in no more than so much memory. Not for several threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._prefixes: OrderedDict[int, Prefix] = OrderedDict()

    def find(self, key: np.ndarray) -> tuple[Prefix | None, int]:
        """Find the prefix that shares the most with a prompt, and how many tokens it shares.

        The last token of the prompt never counts: it has to be read to know what follows.
        """
        best, most = None, 0
        for name, prefix in self._prefixes.items():
            # There may be thousands: most are told apart by one number.
            if most < min(len(prefix.key), len(key)) and prefix.key[most] == key[most]:
                shared = num_shared(prefix.key, key)
                best, most = (name, shared) if shared > most else (best, most)
        if best is None:
            return None, 0
        self._prefixes.move_to_end(best)
        return self._prefixes[best], min(most, len(key) - 1)

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix; those that it goes on from are no longer needed."""
        for name, other in list(self._prefixes.items()):
            length = len(other.key)
            if length <= len(prefix.key) and other.key[-1] == prefix.key[length - 1]:
                if num_shared(other.key, prefix.key) == length:
                    self._drop(name)
        self._prefixes[id(prefix)] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._prefixes)))

    def clear(self) -> None:
        """Forget all."""
        self._prefixes.clear()
        self.num_bytes = 0

    def _drop(self, name: int) -> None:
        self.num_bytes -= self._prefixes.pop(name).num_bytes


def num_shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers two sequences begin with in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _round_up(number: int) -> int:
    return -(-number // SLOT_MULTIPLE) * SLOT_MULTIPLE
