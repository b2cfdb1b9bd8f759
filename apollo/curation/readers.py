"""Files of predictions, whoever wrote them, as one `Pool`.

Here because the predictions are already there, in the formats of the harnesses that made them.
Nothing is skipped: a line that is no prediction is an error that names the file and the line. Next:
`formats.py`, what the lines mean; `audit.py`, what is made of them.
"""

import csv
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from apollo.curation.formats import CONDITION_NAMES, FORMATS, Rows, Source
from apollo.curation.records import (
    MAX_MISSING,
    MalformedError,
    PartialError,
    Pool,
    PoolBuilder,
    load_pool,
)
from apollo.eval.data_folder import read_rows

AGGREGATE = {"model", "benchmark", "video", "image", "text"}
"""Columns of a table of accuracies."""


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """Read arguments `PATH[,model=NAME][,condition=NAME][,benchmark=NAME][,format=][,metric=]`.

    `@FILE` stands for the arguments in that file, one a line. A folder stands for its
    predictions.jsonl, or for all sample logs of lmms-eval below it.

    Raises:
        ValueError: Nothing is there, or nothing to read is in it.
    """
    sources = []
    for text in texts:
        if text.startswith("@"):
            lines = _text(Path(text[1:])).splitlines()
            sources += parse_sources([line.strip() for line in lines if line.strip()])
            continue
        path, *settings = re.split(r",(?=(?:model|condition|benchmark|format|metric)=)", text)
        given = dict(setting.split("=", 1) for setting in settings)
        if "condition" in given:
            given["condition"] = CONDITION_NAMES.get(given["condition"], given["condition"])
        if given.get("format", "ours") not in FORMATS:
            raise ValueError(f"no format {given['format']!r}; there are {', '.join(FORMATS)}")
        sources += [Source(file, **given) for file in _files(Path(path))]
    return sources


def _files(path: Path) -> list[Path]:
    """What a path stands for."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no file or folder {path}")
    if (path / "predictions.jsonl").is_file():
        _refuse_unfinished(path)
        return [path / "predictions.jsonl"]
    if (path / "summary.json").is_file() or (path / "parts").is_dir():
        raise PartialError(
            f"{path} is an evaluation that was not finished; the same command goes on"
        )
    logs = sorted(path.rglob("*_samples_*.jsonl"))
    if not logs:
        raise ValueError(f"no predictions.jsonl and no *_samples_*.jsonl in {path}; name the files")
    return logs


def _refuse_unfinished(folder: Path) -> None:
    path = folder / "summary.json"
    if not path.is_file():
        return
    try:
        finished = json.loads(_text(path)).get("finished", True)
    except (ValueError, AttributeError):
        raise MalformedError(f"{path} is not the summary of an evaluation") from None
    if not finished:
        raise PartialError(
            f"{folder} is an evaluation that was not finished; the command that began it goes on"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedError(f"cannot read {path}: {error}") from None


def read_pool(sources: Sequence[Source], max_missing: float = MAX_MISSING) -> Pool:
    """Read predictions of any format into one table.

    Args:
        sources: The files; one Parquet file of `records.save_pool` alone is taken as it is.
        max_missing: Share of a benchmark's questions that a model may lack; these are wrong.

    Raises:
        PredictionsError: One of its kinds; see `records.py`.
    """
    if len(sources) == 1 and sources[0].path.suffix == ".parquet":
        pool = load_pool(sources[0].path)
        pool.check_complete(max_missing)
        return pool
    builder = PoolBuilder()
    for source in sources:
        builder.open(str(source.path))
        rows = iter(rows_of(source.path))
        first = next(rows, None)
        if first is None:
            raise MalformedError(f"{source.path} holds no predictions")
        name = source.format or recognise(first[1], source.path)
        for place, entry in FORMATS[name].read(chain([first], rows), source):
            builder.add(entry, place)
    pool = builder.build()
    pool.check_complete(max_missing)
    return pool


def recognise(first: Mapping[str, object], path: Path) -> str:
    """The first format whose keys the first line has.

    Raises:
        MalformedError: None.
    """
    for name, format_ in FORMATS.items():
        if format_.keys <= first.keys():
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(f.keys))}" for name, f in FORMATS.items())
    raise MalformedError(
        f"{path} is of no known format: its columns are {', '.join(map(str, first))[:200]}; "
        f"needed are ({known})"
    )


def is_aggregate(path: Path) -> bool:
    """Whether a file is a table of accuracies rather than of predictions."""
    if path.suffix.lower() not in (".csv", ".tsv", ".xlsx"):
        return False
    first = next(iter(rows_of(path)), None)
    return first is not None and AGGREGATE <= first[1].keys()


# ---- tables as rows


def rows_of(path: Path) -> Rows:
    """The rows of a table by its suffix: jsonl, json, csv, tsv, xlsx or parquet.

    Raises:
        MalformedError: It cannot be read.
        PartialError: JSON lines that end within a line.
    """
    readers = {".jsonl": _json_lines, ".tsv": _tsv_rows, ".xlsx": _xlsx_rows}
    suffix = path.suffix.lower()
    if suffix in readers:
        return readers[suffix](path)
    return _own(read_rows(path))


def _own(rows: Rows) -> Rows:
    """The errors of the evaluation's reader as ours."""
    try:
        yield from rows
    except ValueError as error:
        raise MalformedError(str(error)) from None


def _json_lines(path: Path) -> Rows:
    """Lines as they come, for a file may be larger than memory."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError as error:
                    if not line.endswith("\n"):
                        raise PartialError(
                            f"{path}:{number}: the file ends within a line; its writer was "
                            "stopped: finish that run, or delete the line"
                        ) from None
                    raise MalformedError(f"{path}:{number}: {error}") from None
                if not isinstance(values, dict):
                    raise MalformedError(f"{path}:{number}: not a JSON object: {line.strip():.60}")
                yield f"{path}:{number}", values
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedError(f"cannot read {path}: {error}") from None


def _tsv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**27)  # VLMEvalKit's tables may hold pictures
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, values in enumerate(csv.DictReader(file, delimiter="\t"), start=1):
                if None in values or None in values.values():
                    raise MalformedError(f"{path} row {number}: not as many values as columns")
                yield f"{path} row {number}", values
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise MalformedError(f"cannot read {path}: {error}") from None


def _xlsx_rows(path: Path) -> Rows:
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise ValueError(f"{path}: {error}; pip install 'apollo-lmm[curation]'") from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, InvalidFileException) as error:
        raise MalformedError(f"cannot read {path}: {type(error).__name__}: {error}") from None
    rows = book.active.iter_rows(values_only=True)
    header = [str(name) for name in next(rows, ()) if name is not None]
    for number, row in enumerate(rows, start=1):
        if any(value is not None for value in row):
            yield f"{path} row {number}", dict(zip(header, row, strict=False))
    book.close()
