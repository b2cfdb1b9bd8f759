"""A benchmark's folder as it is downloaded: its tables of rows, its videos, and the download.

Here because every public benchmark is a table (Parquet, JSON or CSV) and files somewhere below it,
and only the columns differ. Nothing is skipped: a row that makes no question is an error that names
the file and the row. Next: `benchmarks.py`, which says what the columns mean.
"""

import ast
import csv
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from apollo.eval.questions import Question, check_distinct, read_lines

TABLE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
SUBTITLE_SUFFIXES = (".srt", ".json")


class Row:
    """One row of a table, whose values are checked when they are asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        """Whether there is a value in this column."""
        return self._values.get(name) not in (None, "")

    def text(self, name: str) -> str:
        """A text that is not empty; a number, such as a video's, becomes a text.

        Raises:
            ValueError: There is no such column, or nothing in it.
        """
        if name not in self._values:
            columns = ", ".join(map(str, self._values))
            raise ValueError(f"no column {name!r}; the columns are {columns}")
        value = self._values[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of numbers that has gaps is one of floats
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{name!r} is not a text: {value!r}")
        text = str(value).strip()
        if not text:
            raise ValueError(f"{name!r} is empty")
        return text

    def text_if_any(self, name: str) -> str:
        """A text; empty if the column or its value is missing."""
        return self.text(name) if name in self else ""

    def number(self, name: str) -> float:
        """A number, also if it is written as a text.

        Raises:
            ValueError: It is something else.
        """
        text = self.text(name)
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{name!r} is not a number: {text!r}") from None

    def index(self, name: str) -> int:
        """The number of an option, from 0.

        Raises:
            ValueError: It is not a whole number, or negative, as an answer that is kept secret.
        """
        number = self.number(name)
        if not number.is_integer() or number < 0:
            raise ValueError(f"{name!r} is not the number of an option: {self.text(name)!r}")
        return int(number)

    def texts(self, name: str) -> list[str]:
        """A list of texts, also if it is written as JSON or as Python writes it.

        Raises:
            ValueError: It is something else.
        """
        value = self._values.get(name)
        if isinstance(value, str):
            value = _parse_list(value)
        if not isinstance(value, list):
            self.text(name)  # its error, if the column is not there
            raise ValueError(f"{name!r} is not a list: {self._values[name]!r}")
        return [Row({name: item}).text(name) for item in value]


def _parse_list(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        pass  # CSV files written by pandas hold lists as Python prints them
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class DataFolder:
    """The tables and files of one benchmark.

    Args:
        path: The folder; or its table, with the videos below the folder that holds it.
    """

    def __init__(self, path: Path) -> None:
        self.root = path if path.is_dir() else path.parent
        self._table = None if path.is_dir() else path
        self._folders: dict[str, list[Path]] = {}

    def questions(self, make: Callable[[Row], Question], *tables: str) -> list[Question]:
        """Make a question of every row.

        Args:
            make: Makes it; a ValueError that it raises is given the file and the row.
            tables: Where the table may be: patterns below the folder without the suffix, such as
                `data/test*`. The first that fits counts, with all files that fit it.

        Raises:
            ValueError: No table, a row that makes no question, a question_id that is used twice, or
                not one of the videos is there.
        """
        questions: list[Question] = []
        places: list[str] = []
        paths = self._find_tables(tables)
        for path in paths:
            for place, values in read_rows(path):
                try:
                    questions.append(make(Row(values)))
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None
                places.append(place)
        if not questions:
            raise ValueError(f"{paths[0]} holds no questions")
        check_distinct(questions, places)
        self._check_videos({question.video for question in questions})
        return questions

    def video(self, name: str, *usual: str) -> Path:
        """The path of a video; if it is nowhere, the path where it usually lies.

        Args:
            name: As the table has it, with or without a suffix.
            usual: Folders that are tried first; may have wildcards.

        Raises:
            ValueError: It is in none of them, but below the folder there are two of this name.
        """
        found = self._find(name, usual, VIDEO_SUFFIXES)
        if found:
            return found
        missing = name if name.lower().endswith(VIDEO_SUFFIXES) else f"{name}.mp4"
        return self.root / usual[0] / missing if usual else self.root / missing

    def subtitles(self, name: str, *usual: str) -> Path | None:
        """The path of a file of subtitles, found as a video is; None if it is nowhere."""
        return self._find(name, usual, SUBTITLE_SUFFIXES)

    def _find_tables(self, patterns: tuple[str, ...]) -> list[Path]:
        if self._table:
            return [self._table]
        for pattern in patterns:
            for suffix in TABLE_SUFFIXES:
                found = sorted(path for path in self.root.glob(pattern + suffix) if path.is_file())
                if found:
                    return found
        raise ValueError(
            f"no questions in {self.root}: looked for {', '.join(patterns)} "
            f"with one of the suffixes {', '.join(TABLE_SUFFIXES)}"
        )

    def _find(self, name: str, usual: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"the file {name!r} does not lie in the folder")
        if relative.suffix.lower() in suffixes:
            relative = relative.with_suffix("")
        names = [f"{relative}{form}" for suffix in suffixes for form in (suffix, suffix.upper())]
        for place in usual:
            if place not in self._folders:
                self._folders[place] = sorted(self.root.glob(place)) if place else [self.root]
            for folder in self._folders[place]:
                for each in names:
                    if (folder / each).is_file():
                        return folder / each
        found = [path for each in names for path in self._index.get(PurePosixPath(each).name, ())]
        if len({os.path.realpath(path) for path in found}) > 1:
            raise ValueError(f"{name!r} may be {found[0]} or {found[1]}; remove one of them")
        return found[0] if found else None

    @cached_property
    def _index(self) -> dict[str, list[Path]]:
        """Where each file name occurs below the folder, through links, hidden folders left out."""
        index: dict[str, list[Path]] = {}
        visited: set[str] = set()
        for parent, folders, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(parent)
            if real in visited:  # a link that leads back up
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            for name in sorted(names):
                index.setdefault(name, []).append(Path(parent, name))
        return index

    def _check_videos(self, videos: set[Path]) -> None:
        """A missing video makes its own questions wrong; that all are missing is a mistake."""
        if any(video.is_file() for video in videos):
            return
        packed = [name for name in sorted(self._index) if re.search(r"\.(zip|tar\b.*)$", name)]
        hint = f"; unpack {packed[0]} there first" if packed else ""
        raise ValueError(
            f"none of the {len(videos)} videos is below {self.root}, not even {min(videos)}{hint}"
        )


# ---- tables


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and row or line, from 1) and the values of each row of a table.

    Raises:
        ValueError: The file cannot be read; or pyarrow, which Parquet needs, is missing.
    """
    readers = {
        ".parquet": _parquet_rows,
        ".jsonl": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{path}: a table's suffix is one of {', '.join(readers)}")
    for place, values in readers[suffix](path):
        if not isinstance(values, dict):
            raise ValueError(f"{place}: a row is an object, not {type(values).__name__}")
        yield place, values


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: {error}; pip install 'apollo-lmm[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (values for batch in file.iter_batches(1024) for values in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield f"{path} row {number}", values
    except (arrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read: {reason}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(path):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        yield f"{path}:{number}", values


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A list; some files of JSON lines have this suffix too."""
    lines = dict(read_lines(path))
    if not next(iter(lines.values()), "").lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
    for number, values in enumerate(rows, start=1):
        yield f"{path} row {number}", values


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, values in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in values:  # where csv puts what the header has no name for
                    raise ValueError(f"{path} row {number}: more values than columns")
                yield f"{path} row {number}", values
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


# ---- the download


def fetch(hub_id: str) -> Path:
    """Download a data set repository, or find the copy downloaded before, and unpack its zips.

    Returns:
        A folder of the cache of huggingface_hub; the zips are unpacked into its folder `unpacked`.

    Raises:
        ValueError: It cannot be fetched, in one line.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(snapshot_download(hub_id, repo_type="dataset"))
    except (OSError, HFValidationError) as error:  # the hub's errors and the network's are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot fetch the data set {hub_id} ({reason}); "
            "download it by other means and give its folder as --data"
        ) from None
    for archive in sorted(folder.rglob("*.zip")):
        relative = archive.relative_to(folder)
        if relative.parts[0] != "unpacked":
            unpack(archive, folder / "unpacked" / relative.with_suffix(""))
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into a folder, once: the folder appears when it is complete.

    Several processes may do so at the same time; the first to finish wins.

    Raises:
        ValueError: It is no zip, or one of its files would lie outside of the folder.
    """
    if folder.is_dir():
        return
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if name.startswith("/") or ".." in re.split(r"[/\\]", name):
                    raise ValueError(f"{archive}: {name!r} would lie outside of {folder}")
            part.mkdir(parents=True, exist_ok=True)  # a zip may be empty
            file.extractall(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
