"""Which record comes at which position of a stage: exact shares, no repeats within a pass.

The paper's SFT mixture has fixed shares of text, image, multi-image and video (Fig. 7). Drawing the
source of each record at random meets such shares only roughly and needs a random state to resume;
here position i alone decides, so that resuming is looking up another i. No torch here.
Read next: `collate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np


@dataclass(kw_only=True)
class Source:
    """One file of a mixture.

    Attributes:
        path: JSON lines file of training records.
        weight: Its share of the records, relative to the other sources.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.path}: weight must be positive, got {self.weight}")


class Mixture:
    """The order in which the records of several sources come.

    Each source is gone through in a seeded permutation, a new one per pass. The sources interleave
    so that after any n positions each was drawn n * share times, to within 1.

    Args:
        sizes: Number of records of each source.
        weights: Share of each source, relative to the others.
        length: Number of positions.
        seed: Decides the permutations.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], length: int, seed: int
    ) -> None:
        assert len(sizes) == len(weights) > 0 and min(sizes) > 0 and min(weights) > 0
        self.sizes = tuple(sizes)
        self.shares = tuple(weight / sum(weights) for weight in weights)
        self.seed = seed
        self._sources = interleave(self.shares, length)
        # How often the source of position i was drawn before i.
        self._draws = np.zeros(length, dtype=np.int64)
        for source in range(len(sizes)):
            here = self._sources == source
            self._draws[here] = np.arange(np.count_nonzero(here))

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Give (source, record in the source) of a position."""
        source = int(self._sources[position])
        pass_, place = divmod(int(self._draws[position]), self.sizes[source])
        order = _permutation(self.seed, source, pass_, self.sizes[source])
        return source, int(order[place])

    def counts(self, position: int | None = None) -> tuple[int, ...]:
        """Count what was drawn from each source before a position (default: in all)."""
        drawn = np.bincount(self._sources[:position], minlength=len(self.sizes))
        return tuple(int(count) for count in drawn)


def interleave(shares: Sequence[float], length: int) -> np.ndarray:
    """Order sources so that after n positions each has come n * share times, to within 1.

    This is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980):
    of the sources that have waited long enough, take the one whose turn expires first. Taking the
    source that is furthest behind looks the same, but can be off by more than 1.

    Args:
        shares: Share of each source; they sum to 1.
        length: Number of positions.

    Returns:
        (length,) index of the source at each position.
    """
    share = np.asarray(shares, dtype=np.float64)
    slack = 1 / (2 * len(share) - 2) if len(share) > 1 else 0.0
    drawn = np.zeros_like(share)
    order = np.zeros(length, dtype=np.uint16)
    for position in range(length):
        owed = share * (position + 1) - drawn
        # 1e-9: rounding must not hide a source that is due exactly now.
        expiry = np.where(owed >= slack - 1e-9, (1 - slack - owed) / share, np.inf)
        chosen = int(np.argmin(expiry))
        drawn[chosen] += 1
        order[position] = chosen
    return order


@lru_cache(maxsize=32)
def _permutation(seed: int, source: int, pass_: int, size: int) -> np.ndarray:
    """Shuffle one pass over one source; neighbours in a batch mostly ask for the same few."""
    return np.random.default_rng((seed, source, pass_)).permutation(size)
