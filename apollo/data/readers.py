"""Files of records: JSON lines, JSON, Parquet, tar shards, and data sets of Hugging Face.

A file becomes rows by its suffix (`CONTAINERS`), a row becomes a record by its layout
(`formats.FORMATS`, told by the first row). Rows are read when they are asked for, so that ten
million of them cost an index of 80 MB and not tens of gigabytes. Files of fewer than 200,000
records and 1 GiB are checked whole when they are opened; in larger ones a bad record shows when it
is drawn, or, better, in `apollo data check`. Read next: `mixture.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from apollo.data.formats import (
    FORMATS,
    RECORD_TYPES,
    Layout,
    Record,
    RecordError,
    detect_format,
    make_record,
)
from apollo.data.mixture import Mixture, Source, chosen_rows, read_mixture
from apollo.data.stores import cache_dir, download, index_shards

WHOLE_CHECK_RECORDS = 200_000
WHOLE_CHECK_BYTES = 2**30
"""Smaller files are checked whole when opened: about ten seconds for the largest of them."""

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


Visit = Callable[[int, Record], object]


class Rows(Protocol):
    """The rows of a file, not yet records."""

    @property
    def num_bytes(self) -> int:
        """About how much there is to read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Read a row; ValueError if it cannot be."""

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""


class Records(Sequence[Record]):
    """The records of a source; each is read and checked when it is asked for.

    Attributes:
        types: For each record the index of its type in `RECORD_TYPES`, uint8; None if the records
            have not all been read.
    """

    def __init__(
        self, rows: Rows, layout: Layout, media_dir: str, is_text: bool, chosen: np.ndarray | None
    ) -> None:
        self._rows = rows
        self._layout = layout
        self._media_dir = media_dir
        self._is_text = is_text
        self._chosen = chosen
        self.types: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._rows) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self._chosen is None else int(self._chosen[index])
        where = self._rows.where(row)
        try:
            raw = self._rows[row]
        except ValueError as error:  # JSON and Unicode errors are such
            raise RecordError(f"{where}: {error}") from error
        return make_record(raw, self._layout, self._media_dir, row + 1, where, self._is_text)

    def where(self, index: int) -> str:
        """File and line of a record, without reading it."""
        return self._rows.where(index if self._chosen is None else int(self._chosen[index]))

    @property
    def has_unique_ids(self) -> bool:
        """Whether a repeated id is a mistake: in our own layout; other formats do not promise."""
        return self._layout.only is not None

    @property
    def is_small(self) -> bool:
        """Whether reading all of it at once is a matter of seconds."""
        return len(self) < WHOLE_CHECK_RECORDS and self._rows.num_bytes < WHOLE_CHECK_BYTES

    def check(
        self, on_error: Callable[[RecordError], None], visit: Visit = lambda *_: None
    ) -> None:
        """Read every record once; sets `types` if all are good.

        Args:
            on_error: Called with what is wrong with a record; may raise it.
            visit: Called with the number and the record of each good one.
        """
        types = np.zeros(len(self), np.uint8)
        places: dict[str, int] = {}
        num_bad = 0
        for index in range(len(self)):
            try:
                record = self[index]
                if self.has_unique_ids and places.setdefault(record.id, index) != index:
                    first = self.where(places[record.id])
                    raise RecordError(f"{record.where}: id {record.id!r} was used in {first}")
            except RecordError as error:
                num_bad += 1
                on_error(error)
                continue
            types[index] = RECORD_TYPES.index(record.type)
            visit(index, record)
        self.types = None if num_bad else types


def read_records(path: str | Path) -> Records:
    """Read the records of a file, told by its suffix and first record; media lie beside it.

    Raises:
        RecordError: The file is absent or empty, or a record is not valid.
    """
    return open_source(Source(path=str(path)))


def open_source(source: Source, folder: Path = Path(), check: bool = True) -> Records:
    """Open the file, files (`shards/*.parquet`) or data set of a source.

    Args:
        source: What to read.
        folder: What its path and its `media_dir` are relative to.
        check: Read all records of a small file now, and refuse it if one is bad.

    Raises:
        RecordError: It is absent or empty, or a record is not valid.
        ValueError: A setting of the source, or a package that is not installed.
    """
    if source.format and source.format not in FORMATS:
        raise ValueError(f"{source.path}: format must be one of {', '.join(FORMATS)}")
    source, layout = _look_up_dataset_info(source, folder)
    path = str(source.path)
    path = path if "://" in path else str(folder / path)
    rows, media_dir = open_rows(path)
    if not len(rows):
        raise RecordError(f"{path} holds no record")
    if layout is None:
        try:
            layout = FORMATS[source.format or detect_format(rows[0])]
        except ValueError as error:
            raise RecordError(f"{rows.where(0)}: {error}") from error
    if source.media_dir:
        media_dir = source.media_dir
        if "://" not in media_dir:
            media_dir = str(folder / media_dir)
    chosen = chosen_rows(source.limit, len(rows))
    records = Records(rows, layout, media_dir, source.type == "text", chosen)
    if check and records.is_small:
        records.check(_raise)
    return records


def _raise(error: Exception) -> None:
    raise error


@dataclass(frozen=True)
class OpenSource:
    """A source whose records are at hand.

    Attributes:
        source: What it is; its weight is a number now.
        records: Its records.
    """

    source: Source
    records: Records

    @property
    def weight(self) -> float:
        """Its share of the mixture, relative to the other sources."""
        assert self.source.weight is not None
        return self.source.weight


def open_sources(
    sources: Sequence[Source], folder: Path = Path(), check: bool = True
) -> list[OpenSource]:
    """Open all sources of a mixture, those of mixture files in it included.

    The sources of a mixture file share its weight; without one (None) they keep their own.

    Raises:
        ValueError: A source that cannot be used; see `open_source` and `read_mixture`.
    """
    opened: list[OpenSource] = []
    for source in sources:
        path = str(source.path)
        if not path.endswith((".yaml", ".yml")):
            records = open_source(source, folder, check)
            weight = float(len(records)) if source.weight is None else source.weight
            opened.append(OpenSource(replace(source, weight=weight), records))
            continue
        listed = read_mixture(folder / path)
        media_dir = source.media_dir
        if media_dir and "://" not in media_dir:
            media_dir = str((folder / media_dir).absolute())
        listed = [replace(s, media_dir=s.media_dir or media_dir) for s in listed]
        inner = open_sources(listed, check=check)
        total = sum(one.weight for one in inner)
        scale = 1.0 if source.weight is None else source.weight / total
        opened += [replace(o, source=replace(o.source, weight=o.weight * scale)) for o in inner]
    return opened


def count_types(sources: Sequence[OpenSource], mixture: Mixture) -> dict[str, int]:
    """Count the records of each type that a mixture draws; exact.

    A source too large to be checked whole counts as the type that it declares, or as "not known".
    """
    drawn = dict.fromkeys((*RECORD_TYPES, "not known"), 0)
    for index, (one, count) in enumerate(zip(sources, mixture.counts(), strict=True)):
        if one.records.types is None:
            drawn[one.source.type or "not known"] += count
            continue
        counts = np.bincount(one.records.types, mixture.times_drawn(index), len(RECORD_TYPES))
        for type_, of_type in zip(RECORD_TYPES, counts, strict=True):
            drawn[type_] += int(of_type)
    return {type_: count for type_, count in drawn.items() if count}


def open_rows(path: str) -> tuple[Rows, str]:
    """Open a file of rows and say where its media lie by default.

    Raises:
        RecordError: It is absent or cannot be read.
    """
    if path.startswith("hf://"):
        return _open_hub(path), "."
    media_dir = path.rpartition("/")[0] or "."
    if "://" in path:
        path = str(download(path))
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".tar":
        return _TarRows(path), path
    if Path(path).is_dir():
        return _open_saved(path), path
    names = [path] if not has_magic(path) or Path(path).is_file() else sorted(glob(path))
    if not names or not Path(names[0]).is_file():
        raise RecordError(f"no training file {path}")
    if suffix not in CONTAINERS:
        raise RecordError(f"{path}: the suffix must be one of {', '.join(CONTAINERS)}, or .tar")
    try:
        parts = [CONTAINERS[suffix](name) for name in names]
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    return parts[0] if len(parts) == 1 else _JoinedRows(parts), media_dir


# ---- containers


@dataclass(frozen=True)
class _JsonRows:
    """Rows of a JSON or JSON lines file, found by where they lie in it.

    Attributes:
        path: The file.
        starts: int64 (rows,), the first byte of each.
        ends: int64 (rows,), the byte after the last of each.
        by_line: Whether rows are lines, for messages.
    """

    path: str
    starts: np.ndarray
    ends: np.ndarray
    by_line: bool

    @property
    def num_bytes(self) -> int:
        return os.path.getsize(self.path)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Any:
        start, end = int(self.starts[index]), int(self.ends[index])
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start).decode("utf-8"))

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}" if self.by_line else f"{self.path}[{index}]"


def _index_lines(path: str) -> _JsonRows:
    """Find the lines of a JSON lines file."""
    with open(path, "rb") as file:
        bounds = np.fromiter(_bounds_of_lines(file), np.int64)
    return _JsonRows(path, bounds[:-1], bounds[1:], by_line=True)  # two views of one array


def _bounds_of_lines(file: Any) -> Iterator[int]:
    end = 0
    yield end
    for line in file:
        end += len(line)
        yield end


def _index_array(path: str) -> _JsonRows:
    """Find the items of a JSON file that holds one list; a file of JSON lines may say .json too.

    Each item is parsed once, to find its end, and not kept.
    """
    text = Path(path).read_bytes().decode("utf-8")
    place = len(text) - len(text.lstrip())
    if text[place : place + 1] == "{":
        return _index_lines(path)
    if text[place : place + 1] != "[":
        raise RecordError(f"{path} must hold a list of records")
    spans: list[tuple[int, int]] = []
    decoder, offset, counted = json.JSONDecoder(), 0, 0
    place = _skip_space(text, place + 1)
    while text[place : place + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, place)
        except ValueError as error:
            raise RecordError(f"{path}[{len(spans)}]: {error}") from error
        offset += len(text[counted:place].encode())  # characters are not bytes
        length = len(text[place:end].encode())
        spans.append((offset, offset + length))
        offset, counted = offset + length, end
        place = _skip_space(text, end)
        if text[place : place + 1] == ",":
            place = _skip_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise RecordError(f"{path}[{len(spans)}]: the list is cut off or lacks a comma")
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    return _JsonRows(path, starts, ends, by_line=False)


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


class _ArrowRows:
    """Rows of a Parquet file, through an uncompressed copy that is mapped into memory.

    Parquet gives its rows in groups of thousands, too slow for random order; the copy, in the cache
    folder, is written once, group by group.
    """

    def __init__(self, path: str) -> None:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{path}: {error}; pip install 'apollo-lmm[data]'") from error
        self.path = path
        stat = os.stat(path)
        key = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
        copy = cache_dir() / "arrow" / f"{hashlib.sha256(key.encode()).hexdigest()}.arrow"
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_suffix(f".{os.getpid()}")
            try:
                with parquet.ParquetFile(path) as file:
                    with arrow.OSFile(str(part), "wb") as sink:
                        with arrow.ipc.new_file(sink, file.schema_arrow) as writer:
                            for batch in file.iter_batches(1024):
                                writer.write_batch(batch)
                part.rename(copy)
            except (arrow.ArrowException, OSError) as error:
                raise RecordError(f"{path} cannot be read: {error}") from error
            finally:
                part.unlink(missing_ok=True)
        self._copy = copy
        self.num_bytes = copy.stat().st_size

    @cached_property
    def _table(self) -> Any:
        import pyarrow as arrow

        return arrow.ipc.open_file(arrow.memory_map(str(self._copy))).read_all()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_table"}

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"


class _TarRows:
    """Samples of a tar shard as webdataset writes them: `key.json` with `key.mp4` or `key.jpg`.

    A sample whose JSON names no media has those beside it, in order of their names.
    """

    def __init__(self, path: str) -> None:
        try:
            self._members = index_shards(path)
        except FileNotFoundError as error:
            raise RecordError(f"no training file {path}") from error
        self.path = path
        self._keys = sorted(n.removesuffix(".json") for n in self._members if n.endswith(".json"))
        self._media: dict[str, list[str]] = {}
        for name in sorted(self._members):
            self._media.setdefault(_key_of(name), []).append(name)
        self.num_bytes = sum(self._members[f"{key}.json"][2] for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Any:
        key = self._keys[index]
        shard, offset, size = self._members[f"{key}.json"]
        with open(shard, "rb") as file:
            file.seek(offset)
            raw = json.loads(file.read(size).decode("utf-8"))
        if isinstance(raw, dict) and not raw.keys() & {"image", "images", "video", "videos"}:
            for kind, suffixes in (("images", IMAGE_SUFFIXES), ("videos", VIDEO_SUFFIXES)):
                found = [n for n in self._media.get(key, []) if n.lower().endswith(suffixes)]
                raw |= {kind: found} if found else {}
        return raw

    def where(self, index: int) -> str:
        return f"{self.path}!{self._keys[index]}.json"


def _key_of(name: str) -> str:
    """Give webdataset's key of a member: its path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]


class _HubRows:
    """Rows of a data set of the `datasets` library; its images stay encoded."""

    def __init__(self, data: Any, name: str) -> None:
        from datasets import Image, Video

        for column, feature in data.features.items():
            media = feature
            while hasattr(media, "feature"):  # a list of images
                media = media.feature
            if isinstance(media, (Image, Video)):
                media.decode = False
                data = data.cast_column(column, feature)
        self._data = data
        self.name = name
        self.num_bytes = data.data.nbytes

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        return self._data[index]

    def where(self, index: int) -> str:
        return f"{self.name}:{index + 1}"


@dataclass(frozen=True)
class _JoinedRows:
    """The rows of several files, one after another."""

    parts: Sequence[Rows]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self.parts])

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def _place(self, index: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        rows, place = self._place(index)
        return rows[place]

    def where(self, index: int) -> str:
        rows, place = self._place(index)
        return rows.where(place)


CONTAINERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _index_lines,
    ".json": _index_array,
    ".parquet": _ArrowRows,
}
"""Suffix of a file -> what gives its rows."""


# ---- data sets that are not one file


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: {error}; pip install 'apollo-lmm[data]'") from error
    return datasets


def _open_hub(url: str) -> _HubRows:
    """Open `hf://owner/name[:config][/split]`; the split is train unless given."""
    datasets = _datasets(url)
    owner, _, rest = url.removeprefix("hf://").partition("/")
    rest, _, split = rest.partition("/")
    name, _, config = rest.partition(":")
    if not owner or not name:
        raise RecordError(f"{url} must look like hf://owner/name[:config][/split]")
    try:
        data = datasets.load_dataset(f"{owner}/{name}", config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise RecordError(f"{url} cannot be read: {' '.join(str(error).split())}") from error
    return _HubRows(data, url)


def _open_saved(path: str) -> _HubRows:
    """Open a folder written by `save_to_disk`; of a split data set, name the split's folder."""
    if not (Path(path) / "state.json").is_file():
        hint = (
            "name a split's folder"
            if (Path(path) / "dataset_dict.json").is_file()
            else ("give a file, or folder#name with a dataset_info.json")
        )
        raise RecordError(f"{path} is a folder but no saved data set; {hint}")
    return _HubRows(_datasets(path).load_from_disk(path), path)


def _look_up_dataset_info(source: Source, folder: Path) -> tuple[Source, Layout | None]:
    """Follow `folder#name` to the file and layout that LLaMA-Factory's dataset_info.json names."""
    place, hash_, name = str(source.path).rpartition("#")
    if not hash_ or "://" in place:
        return source, None
    info_path = folder / place / "dataset_info.json"
    try:
        infos = json.loads(info_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{info_path} cannot be read: {error}") from error
    if name not in infos:
        raise RecordError(f"{info_path} has no {name!r}; it has: {', '.join(infos)}")
    info = infos[name]
    columns, tags = info.get("columns", {}), info.get("tags", {})
    if info.get("formatting", "alpaca") != "sharegpt":
        raise RecordError(f"{info_path}: {name}: only formatting sharegpt can be read")
    roles = {"user": "human", "assistant": "gpt", "system": "system"}  # LLaMA-Factory's defaults
    layout = Layout(
        messages=columns.get("messages", "conversations"),
        role=tags.get("role_tag", "from"),
        content=tags.get("content_tag", "value"),
        roles={tags.get(f"{role}_tag", tag): role for role, tag in roles.items()},
        images=(columns.get("images", "images"),),
        videos=(columns.get("videos", "videos"),),
        system=columns.get("system"),
    )
    if info.get("hf_hub_url"):
        return replace(source, path=f"hf://{info['hf_hub_url']}"), layout
    if not isinstance(info.get("file_name"), str):
        raise RecordError(f"{info_path}: {name} has no file_name")
    return replace(source, path=str(Path(place) / info["file_name"])), layout
