"""How likely texts are after a prompt, to the same bit whatever else is asked at the same time.

Options share their question, questions share their video: the LLM reads what questions share once
(`read_prefix`), and each question goes on from that cache as one row, in which its options stand
side by side, each seeing the question and itself (`log_probabilities`). On a CPU in float32 a row's
result does not depend on which rows are read with it, in which order or how many: kernels treat the
rows of a matrix alike as long as there are no fewer than 8, and what is left, a row's length, is
made to depend on that row alone. So lengths are rounded up, only rows of one length share a forward
pass, and the head works on blocks of 8. Used by apollo/chat.py and apollo/eval/local.py. Read next:
`modeling.py`.

Shapes: B rows, P length of the prefix, L length of the rows, D width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from .modeling import CACHE, ApolloForConditionalGeneration

LENGTH_MULTIPLE = 16
"""Rows are padded to a multiple of so many tokens: few shapes, and never fewer than 8 rows."""

HEAD_ROWS = 8
"""Rows of hidden states that the head takes at once."""


@dataclass(frozen=True)
class Row:
    """A prompt, after the prefix, and the texts whose likelihood as its continuation is asked for.

    Attributes:
        prompt: Tokens of the prompt, at least one.
        texts: Tokens of each text, at least one.
    """

    prompt: list[int]
    texts: list[list[int]]

    def read(self) -> tuple[list[int], list[int], list[int]]:
        """Lay out the tokens that are read: the prompt, then each text but for its last token.

        Returns:
            For each token its id, its position after the prefix, and the text it belongs to,
            counted from 1; 0 is the prompt.
        """
        ids, positions = list(self.prompt), list(range(len(self.prompt)))
        owners = [0] * len(ids)
        for number, text in enumerate(self.texts, start=1):
            ids += text[:-1]
            positions += range(len(self.prompt), len(self.prompt) + len(text) - 1)
            owners += [number] * (len(text) - 1)
        return ids, positions, owners

    @property
    def padded_length(self) -> int:
        """Tokens that the row takes up, padding included."""
        length = len(self.prompt) + sum(len(text) - 1 for text in self.texts)
        return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


@torch.inference_mode()
def read_prefix(
    model: ApolloForConditionalGeneration, ids: list[int], clip_features: Tensor | None = None
) -> Cache:
    """Let the LLM read what rows share.

    Args:
        model: The model.
        ids: The tokens, placeholders of clips among them; at least one.
        clip_features: The clips' features as `model.encode` makes them.

    Returns:
        The LLM's cache of one row.
    """
    tokens = torch.tensor([ids], device=model.device)
    return model.model(input_ids=tokens, clip_features=clip_features, use_cache=True)[CACHE]


def repeated(prefix: Cache, num_rows: int, length: int | None = None) -> Cache:
    """Show a cache of one row as one of several, without copying it.

    A forward pass that extends the new cache leaves the old one as it is.

    Args:
        prefix: What `read_prefix` returned.
        num_rows: Rows B of the new cache.
        length: How many of its first tokens to keep; all by default.
    """
    cache = copy.copy(prefix)
    cache.layers = [copy.copy(layer) for layer in prefix.layers]
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)[:, :, :length]  # (1, heads, P, width of a head)
            setattr(layer, name, states.expand(num_rows, -1, -1, -1))
    return cache


@torch.inference_mode()
def log_probabilities(
    model: ApolloForConditionalGeneration, prefix: Cache, rows: Sequence[Row], batch_size: int
) -> list[list[float]]:
    """Log-probability of each text of each row, summed over its tokens.

    Args:
        model: The model.
        prefix: What all rows go on from; it is left as it is.
        rows: In any order; rows whose padded lengths are equal are read together.
        batch_size: The most rows that are.
    """
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(row.padded_length, []).append(index)
    found: dict[int, list[float]] = {}
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            batch = [rows[index] for index in chosen]
            found.update(zip(chosen, _read_batch(model, prefix, batch), strict=True))
    return [found[index] for index in range(len(rows))]


def _read_batch(
    model: ApolloForConditionalGeneration, prefix: Cache, rows: list[Row]
) -> list[list[float]]:
    """Read rows of one padded length; see `log_probabilities`."""
    num_shared, num_padded = prefix.get_seq_length(), rows[0].padded_length
    layouts = torch.tensor(
        [
            [column + [filler] * (num_padded - len(column)) for column, filler in columns]
            for columns in (zip(row.read(), (0, 0, -1), strict=True) for row in rows)
        ],
        device=model.device,
    )  # (B, 3, L); nobody sees the padding, whose owner is -1
    ids, positions, owners = layouts.unbind(1)
    is_seen = (owners[:, None, :] == 0) | (owners[:, :, None] == owners[:, None, :])
    is_seen = pad(is_seen.tril(), (num_shared, 0), value=True)[:, None]  # (B, 1, L, P + L)
    lowest = torch.finfo(model.dtype).min  # numbers: "eager" attention adds what it gets
    mask = torch.zeros_like(is_seen, dtype=model.dtype).masked_fill(~is_seen, lowest)
    hidden = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions + num_shared,
        use_cache=True,
        **{CACHE: repeated(prefix, len(rows))},
    ).last_hidden_state  # (B, L, D)
    places = torch.cat([hidden[i, _places(row)] for i, row in enumerate(rows)])
    tokens = [token for row in rows for text in row.texts for token in text]
    values: list[float] = []
    for start in range(0, len(places), HEAD_ROWS):
        block = places[start : start + HEAD_ROWS]
        logits = model.lm_head(pad(block, (0, 0, 0, HEAD_ROWS - len(block))))  # (8, V)
        wanted = torch.tensor(tokens[start : start + HEAD_ROWS], device=model.device)
        log_shares = logits.float().log_softmax(-1)[: len(block)]
        values += log_shares.gather(1, wanted[:, None])[:, 0].tolist()
    following = iter(values)
    return [[sum(next(following) for _ in text) for text in row.texts] for row in rows]


def _places(row: Row) -> list[int]:
    """Places in the row's layout at which each token of each text is predicted."""
    places, start = [], len(row.prompt)
    for text in row.texts:
        places += [len(row.prompt) - 1, *range(start, start + len(text) - 1)]
        start += len(text) - 1
    return places
