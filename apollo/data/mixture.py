"""What a mixture is made of, and which record comes at which position of a stage.

The paper's SFT mixture has fixed shares of text, image, multi-image and video (Fig. 7). Drawing the
source of each record at random meets such shares only roughly and needs a random state to resume;
here position i alone decides, so that resuming is looking up another i. Mixtures are written as
lists of `Source` in a recipe or as YAML files (`read_mixture`): ours, LLaVA's or SmolVLM2's. No
torch here. Read next: `collate.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from apollo.config import ConfigError, from_dict, parse_yaml
from apollo.data.formats import RECORD_TYPES


@dataclass(kw_only=True)
class Source:
    """One file or data set of a mixture.

    Attributes:
        path: File of training records (.jsonl, .json, .parquet, .tar), several as
            `shards/*.parquet`, folder of a saved data set, `folder#name` with LLaMA-Factory's
            dataset_info.json, `hf://owner/name[:config][/split]`, any other URL, or a mixture file
            (.yaml), whose sources then share the weight.
        weight: Its share of the records, relative to the other sources; None: as many as it has.
        type: What its records are, one of `RECORD_TYPES`, if it is known and uniform.
        format: One of `formats.FORMATS`; by default told by the first record.
        media_dir: Where its media lie: a folder, tar shards as `shards/*.tar`, or a URL; by default
            beside the file.
        limit: Which of its records are used: all, first:N, end:N or random:N; N% is a share.
    """

    path: str | Path
    weight: float | None = 1.0
    type: str = ""
    format: str = ""
    media_dir: str = ""
    limit: str = "all"

    def __post_init__(self) -> None:
        self.path = str(self.path)  # recipes may say it as a Path
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.path}: weight must be positive, got {self.weight}")
        if self.type and self.type not in RECORD_TYPES:
            raise ValueError(
                f"{self.path}: type must be one of {', '.join(RECORD_TYPES)}, not {self.type!r}"
            )
        _parse_limit(self.limit)


@dataclass(kw_only=True)
class ListedSource(Source):
    """A source in a mixture file, with what its readers want to know.

    Attributes:
        hub: Where it can be had: id on the Hugging Face hub, and files.
        size: How many records it has, in words.
        licence: Under what licence, as far as known.
        stands_for: What of the paper's data it stands for.
    """

    hub: str = ""
    size: str = ""
    licence: str = ""
    stands_for: str = ""


@dataclass(kw_only=True)
class _MixtureFile:
    """Our own mixture file.

    Attributes:
        sources: What is mixed.
        shares: Share of each type, relative to the others; inside a type the sources' weights hold.
        data_dir: What paths are relative to; itself relative to the mixture file.
        about: What the mixture is for.
    """

    sources: list[ListedSource]
    shares: dict[str, float] = field(default_factory=dict)
    data_dir: Path = Path()
    about: str = ""


@dataclass(kw_only=True)
class _LlavaEntry:
    """An entry of LLaVA's and SmolVLM2's mixture files; the last two say nothing to us."""

    json_path: str
    sampling_strategy: str = "all"
    modality: str = ""
    category: str = ""
    source: str = ""


@dataclass(kw_only=True)
class _LlavaFile:
    """A mixture file of LLaVA or SmolVLM2."""

    datasets: list[_LlavaEntry]


def read_mixture(path: str | Path, data_dir: Path | None = None) -> list[Source]:
    """Read a mixture file, ours or LLaVA's.

    Args:
        path: The YAML file.
        data_dir: What its paths are relative to, instead of what the file says.

    Returns:
        Its sources with absolute paths. Those of LLaVA's weigh as much as they have records.

    Raises:
        ConfigError: A key that there is not, or a value that does not fit.
    """
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the mixture file {path}: {error}") from error
    folder = path.parent.absolute()
    try:
        if isinstance(data, dict) and "datasets" in data:
            entries = from_dict(_LlavaFile, data).datasets
            sources: list[Source] = [_of_llava(entry) for entry in entries]
        else:
            mixture = from_dict(_MixtureFile, data)
            folder /= mixture.data_dir
            sources = _apply_shares(mixture)
        if not sources:
            raise ConfigError("there are no sources")
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return [_under(source, folder if data_dir is None else data_dir) for source in sources]


def _of_llava(entry: _LlavaEntry) -> Source:
    type_ = entry.modality.replace("-", "_")
    return Source(path=entry.json_path, weight=None, limit=entry.sampling_strategy, type=type_)


def _apply_shares(mixture: _MixtureFile) -> list[Source]:
    """Weigh the sources so that the types have their shares."""
    if not mixture.shares:
        return list(mixture.sources)
    totals = dict.fromkeys(mixture.shares, 0.0)
    for source in mixture.sources:
        if source.type not in totals:
            raise ConfigError(
                f"{source.path}: shares has no {source.type or 'untyped'!r}; it has: "
                f"{', '.join(totals)}"
            )
        if source.weight is None:
            raise ConfigError(f"{source.path}: with shares, weight must be a number")
        totals[source.type] += source.weight
    for type_, total in totals.items():
        if not total or not 0 < mixture.shares[type_] < float("inf"):
            raise ConfigError(f"shares.{type_}: must be positive and have a source of that type")
    return [
        replace(source, weight=mixture.shares[source.type] * source.weight / totals[source.type])
        for source in mixture.sources
        if source.weight is not None
    ]


def _under(source: Source, folder: Path) -> Source:
    def join(path: str) -> str:
        return path if "://" in path or not path else str(folder / path)

    return replace(source, path=join(str(source.path)), media_dir=join(source.media_dir))


# ---- which records of a file

_LIMIT = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


def _parse_limit(limit: str) -> tuple[str, float, bool]:
    """Split a limit into what to take, how much, and whether that is a share."""
    if limit == "all":
        return "first", 100.0, True
    found = _LIMIT.fullmatch(limit)
    amount = float(found[2]) if found else 0.0
    if not found or amount <= 0 or (amount > 100 if found[3] else amount % 1):
        raise ValueError(
            f"limit must be all, first:N, end:N or random:N, with N a number or a share as 10%, "
            f"not {limit!r}"
        )
    return found[1], amount, bool(found[3])


def chosen_rows(limit: str, size: int) -> np.ndarray | None:
    """Choose rows of a file as LLaVA's `sampling_strategy` does; None stands for all.

    A random choice is the same in every run. A share is rounded up, as in LLaVA's code.
    """
    which, amount, is_share = _parse_limit(limit)
    number = min(size, math.ceil(amount * size / 100) if is_share else int(amount))
    if number == size:
        return None
    if which == "random":
        return np.sort(np.random.default_rng(0).permutation(size)[:number])
    return np.arange(number) if which == "first" else np.arange(size - number, size)


# ---- who comes next


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

    def times_drawn(self, source: int) -> np.ndarray:
        """Count how often each record of a source is drawn, int64 (records,)."""
        passes, rest = divmod(self.counts()[source], self.sizes[source])
        times = np.full(self.sizes[source], passes)
        times[_permutation(self.seed, source, passes, self.sizes[source])[:rest]] += 1
        return times


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
    slack = 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0.0
    drawn = [0] * len(shares)
    order = np.zeros(length, dtype=np.uint16)
    for position in range(length):  # plain numbers: a few are five times as fast without numpy
        chosen, first_expiry = 0, math.inf
        for source, share in enumerate(shares):
            owed = share * (position + 1) - drawn[source]
            # 1e-9: rounding must not hide a source that is due exactly now.
            if owed >= slack - 1e-9 and (1 - slack - owed) / share < first_expiry:
                chosen, first_expiry = source, (1 - slack - owed) / share
        drawn[chosen] += 1
        order[position] = chosen
    return order


@lru_cache(maxsize=32)
def _permutation(seed: int, source: int, pass_: int, size: int) -> np.ndarray:
    """Shuffle one pass over one source; neighbours in a batch mostly ask for the same few."""
    order = np.random.default_rng((seed, source, pass_)).permutation(size)
    return order.astype(np.uint32)  # half the memory: 40 MB for ten million records
