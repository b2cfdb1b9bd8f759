"""Read a table of variant x size x score, whatever its columns are called.

Here because everyone keeps such tables differently: long (a row per model) or wide (a column per
size), sizes as numbers or inside names such as Qwen2-7B, variants named by one column or several.
What is not said is guessed by the rules below, and the guess is told. Free of torch. Next:
`scaling.py`.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCORES = ("score", "average_score", "accuracy", "overall", "average", "mean_score")
SIZES = ("size", "params", "parameters", "llm_params_b", "llm_size", "model_size", "num_parameters")
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?) ?([kmb])(?![a-z\d])", re.IGNORECASE)
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
SEED = "seed"
"""Column whose rows are repetitions of one model: their scores are averaged."""
MAX_NAMED = 4

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of variants at several sizes.

    Attributes:
        variants: Names of the V variants.
        sizes: The S sizes, rising.
        size_names: How they are written.
        scores: float (V, S).
        key_columns: Columns whose values make a variant's name.
        factors: Column -> its value for each variant, of columns with fewer values than variants.
        notes: What was guessed or left out, in sentences.
    """

    variants: list[str]
    sizes: list[float]
    size_names: list[str]
    scores: np.ndarray
    key_columns: tuple[str, ...] = ()
    factors: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns hold what; what is empty is guessed.

    Attributes:
        score: Scores of a long table.
        size: Sizes of a long table: numbers, or names that hold one, such as Qwen2-7B.
        sizes: Of a wide table: the columns that hold the scores, one for each size.
        variant: What makes a variant.
        factors: What else may carry the agreement.
    """

    score: str = ""
    size: str = ""
    sizes: Sequence[str] = ()
    variant: Sequence[str] = ()
    factors: Sequence[str] = ()


def read_table(path: str | Path, columns: Columns | None = None) -> ScoreTable:
    """Read a CSV or Parquet file.

    Args:
        path: The file; Parquet by its suffix.
        columns: Which columns hold what.

    Raises:
        ValueError: No such file or column, no number where there must be one, two scores of one
            model, or nothing that can be guessed.
    """
    return make_table(read_rows(path), columns or Columns())


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV or Parquet file, values as they are written there."""
    path = Path(path)
    if path.suffix in (".parquet", ".pq"):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError(f"{path} takes pyarrow: pip install 'apollo-lmm[data]'") from None
        try:
            return parquet.read_table(path).to_pylist()
        except ValueError as error:  # pyarrow's errors are
            raise ValueError(f"{path} is not a Parquet file: {error}") from None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [dict(row) for row in csv.DictReader(file, strict=True)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}:{number}: another number of cells than the first line has")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def make_table(rows: Sequence[Row], columns: Columns) -> ScoreTable:
    """Arrange rows as a table; see `read_table`."""
    if not rows:
        raise ValueError("the table has no rows")
    named = [columns.score, columns.size, *columns.sizes, *columns.variant, *columns.factors]
    for name in filter(None, named):
        if name not in rows[0]:
            raise ValueError(f"there is no column {name!r}; there are: {', '.join(rows[0])}")
    wide = list(columns.sizes) or ([] if columns.score else _wide_columns(rows))
    if wide:
        if len(wide) < 2:
            raise ValueError("--sizes takes at least two columns, one for each size")
        melted = [
            {**{k: v for k, v in row.items() if k not in wide}, "size": size, "score": row[size]}
            for row in rows
            for size in wide
        ]
        note = f"The table is read as wide: scores are in the columns {', '.join(wide)}."
        return _make_long(melted, "size", "score", columns, [note])
    size = columns.size or _guess(rows, SIZES, "size", "--size", _is_size)
    score = columns.score or _guess(rows, SCORES, "score", "--score", _is_number)
    note = f"Sizes are in the column {size}, scores in {score}."
    return _make_long(rows, size, score, columns, [note])


def _make_long(
    rows: Sequence[Row], size: str, score: str, columns: Columns, notes: list[str]
) -> ScoreTable:
    size_of, name_of = _read_sizes([row[size] for row in rows], size)
    sizes = sorted(name_of)
    key, described = _variant_columns(rows, size, score, columns, size_of)
    cells: dict[tuple[str, ...], dict[float, dict[str, float]]] = {}
    first_rows: dict[tuple[str, ...], Row] = {}
    for number, row in enumerate(rows, start=1):
        name = tuple(str(row[column]) for column in key)
        first_rows.setdefault(name, row)
        if row[score] in ("", None):
            continue
        at_size = cells.setdefault(name, {}).setdefault(size_of[str(row[size])], {})
        seed = str(row.get(SEED, ""))
        if seed in at_size:
            raise ValueError(
                f"row {number}: {' '.join(name)} at size {row[size]} has two scores; name all the "
                "columns that make a variant by --variant"
            )
        at_size[seed] = _number(row[score], f"row {number}: {score}")
    whole = [name for name in first_rows if len(cells.get(name, {})) == len(sizes)]
    if missing := [" ".join(name) for name in first_rows if name not in whole]:
        shown = ", ".join(missing[:MAX_NAMED]) + (", ..." if len(missing) > MAX_NAMED else "")
        notes.append(f"{len(missing)} variants lack a score at some size and are left out: {shown}")
    if not whole:
        raise ValueError("no variant has a score at every size; see --variant and --size")
    num_seeds = {len(scores) for name in whole for scores in cells[name].values()}
    if num_seeds != {1}:
        notes.append(f"Scores are means over {min(num_seeds)} to {max(num_seeds)} seeds.")
    notes.append(f"A variant is a value of {' and '.join(key)}.")
    factors = {
        column: [str(first_rows[name][column]) for name in whole] for column in (*key, *described)
    }
    return ScoreTable(
        variants=[" ".join(name) for name in whole],
        sizes=sizes,
        size_names=[name_of[one] for one in sizes],
        scores=np.array(
            [[np.mean(list(cells[name][one].values())) for one in sizes] for name in whole]
        ),
        key_columns=key,
        factors={c: labels for c, labels in factors.items() if 1 < len({*labels}) < len(whole)},
        notes=notes,
    )


# ---- guessing


def _guess(rows: Sequence[Row], names: Sequence[str], word: str, option: str, fits: Any) -> str:
    """The column with one of the usual names, else the only one with the word in its name."""
    usual = [c for c in rows[0] if c.lower() in names]
    found = usual or [c for c in rows[0] if word in c.lower()]
    if not found and word == "size":
        found = [c for c in rows[0] if c.lower() in ("llm", "model")]
    empty = ("", None) if word == "score" else ()
    found = [c for c in found if all(row[c] in empty or fits(row[c]) for row in rows)]
    if len(found) != 1:
        what = f"{len(found)} columns may hold" if found else "no column seems to hold"
        raise ValueError(f"{what} the {word}s; name it by {option}: {', '.join(rows[0])}")
    return found[0]


def _wide_columns(rows: Sequence[Row]) -> list[str]:
    """Columns named by a size that hold numbers alone, if there are two or more."""
    named = [column for column in rows[0] if _is_size(column)]
    found = [c for c in named if all(row[c] in ("", None) or _is_number(row[c]) for row in rows)]
    return found if len(found) > 1 else []


def _variant_columns(
    rows: Sequence[Row], size: str, score: str, columns: Columns, size_of: Mapping[str, float]
) -> tuple[tuple[str, ...], list[str]]:
    """The columns that make a variant, and those that describe it.

    What says no more than the size does (the LLM's name) and measurements (numbers that are hardly
    ever the same) are neither. Of the others the fewest that tell all variants apart are taken.
    """
    others = [c for c in rows[0] if c not in (size, score, SEED)]
    of_size = {c: {(size_of[str(row[size])], str(row[c])) for row in rows} for c in others}
    usable = [
        c
        for c in others
        if len({value for _, value in of_size[c]}) > 1
        and len(of_size[c]) > len({*size_of.values()})
        and not _is_measurement([row[c] for row in rows])
    ]

    def count(among: Sequence[str]) -> int:
        return len({tuple(str(row[c]) for c in among) for row in rows})

    key = tuple(columns.variant)
    if not key:
        keys = (k for n in range(1, len(usable) + 1) for k in itertools.combinations(usable, n))
        key = next((k for k in keys if count(k) == count(usable)), ())
    if not key:
        raise ValueError(
            f"no column tells variants apart; name it by --variant: {', '.join(others)}"
        )
    described = list(columns.factors) or [c for c in usable if count((*key, c)) == count(key)]
    return key, [column for column in described if column not in key]


def _is_measurement(values: Sequence[Any]) -> bool:
    return all(map(_is_number, values)) and len({*map(str, values)}) > len(values) / 2


def _is_number(value: Any) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except (TypeError, ValueError):
        return False


def _is_size(value: Any) -> bool:
    return bool(_SIZE.search(str(value))) or (_is_number(value) and float(value) > 0)


def _number(value: Any, where: str) -> float:
    if not _is_number(value):
        raise ValueError(f"{where} must be a number, not {value!r}")
    return float(value)


def _read_sizes(values: Sequence[Any], column: str) -> tuple[dict[str, float], dict[float, str]]:
    """Text of a size -> number, and number -> how it is shown.

    Plain numbers stay as they are; 7B or Qwen2-7B is 7e9.
    """
    size_of, name_of = {}, {}
    unit = column[-1].upper() if column.lower().endswith(("_b", "_m", "_k")) else ""
    for value in dict.fromkeys(map(str, values)):
        found = _SIZE.search(value)
        if not _is_size(value):
            raise ValueError(f"{column}: {value!r} is no size; write 7, 7B or a name that holds it")
        number = float(found[1]) * _UNITS[found[2].lower()] if found else float(value)
        size_of[value] = number
        name_of[number] = value if found else f"{number:g}{unit}"
    return size_of, name_of


def parse_size(text: str, table: ScoreTable) -> float:
    """Read a size as the table's own are written: 32 or 32B where they are plain numbers of B.

    Raises:
        ValueError: It is none.
    """
    _, names = _read_sizes([text], "--to")
    (size,) = names
    if table.sizes[-1] < 1e3 and _SIZE.search(text):  # the table counts in its own unit
        size = float(_SIZE.search(text)[1])  # type: ignore[index]
    elif table.sizes[-1] >= 1e3 and not _SIZE.search(text):
        raise ValueError(f"--to {text}: write its unit, as 32B; the table has {table.size_names}")
    return size
