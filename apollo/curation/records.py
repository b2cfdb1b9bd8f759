"""One table of predictions: models x questions x conditions, in columns.

Here because a question is judged by what many models say to it, so all predictions have to be in
one place, and a million questions of thirty models under three conditions have to fit: a byte says
what became of a prediction, another which option was chosen. Whatever contradicts itself is an
error that names the file. Next: `readers.py`, which fills it.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WRONG, RIGHT, UNANSWERED, NOT_ASKED = range(4)
"""States of a prediction: unanswered is asked without a usable answer; both last count as wrong."""

COLUMNS = ("benchmark", "video", "class", "family", "needs", "duration", "source")
"""What may be known of a question, as names; "" where it is not."""

MAX_MISSING = 0.05
"""Share of a benchmark's questions that a model may lack before its run is taken for a partial one;
our choice: enough for a few videos that cannot be had, too little for a run with a limit."""


class PredictionsError(ValueError):
    """Predictions that cannot be used as they are."""


class MalformedError(PredictionsError):
    """A file, line or value that is no prediction."""


class PartialError(PredictionsError):
    """A run that was cut off, or that lacks many of the questions that others were asked."""


class DuplicateError(PredictionsError):
    """The same prediction twice."""


class ContradictionError(PredictionsError):
    """Two predictions, or two descriptions of a question, that cannot both be true."""


class Entry(NamedTuple):
    """A prediction as a reader finds it.

    Attributes:
        model: Who answered.
        condition: What was shown: video, frame, text or shuffled.
        question_id: Unique within the benchmark.
        state: RIGHT, WRONG or UNANSWERED.
        chosen: Index of the option chosen, -1 where that is not known.
        names: A value for each of `COLUMNS`, "" where it is not known.
        num_options: How many there were to choose from, 0 where that is not known.
        answer: Index of the right option, -1 where that is not known.
        duration_s: Seconds of the video, nan where that is not known.
    """

    model: str
    condition: str
    question_id: str
    state: int
    chosen: int
    names: tuple[str, ...]
    num_options: int = 0
    answer: int = -1
    duration_s: float = float("nan")


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of names, as numbers.

    Attributes:
        codes: int32 (Q questions,), into `names`.
        names: The distinct names.
    """

    codes: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, values: Sequence[str]) -> "Labels":
        """Number the distinct values as they come."""
        numbers: dict[str, int] = {}
        codes = np.fromiter(
            (numbers.setdefault(value, len(numbers)) for value in values), np.int32, len(values)
        )
        return cls(codes, tuple(numbers))

    def __getitem__(self, row: int) -> str:
        """The name of one question."""
        return self.names[self.codes[row]]

    def values(self) -> np.ndarray:
        """All names: object (Q,)."""
        return np.array(self.names or ("",), dtype=object)[self.codes]

    def take(self, rows: np.ndarray) -> "Labels":
        """The column of some questions, without the names that are gone."""
        kept, codes = np.unique(self.codes[rows], return_inverse=True)
        return Labels(codes.astype(np.int32), tuple(self.names[code] for code in kept))


@dataclass(frozen=True)
class Pool:
    """Q questions, M models, C conditions.

    Attributes:
        models: Names of the models.
        conditions: Names of the conditions.
        question_ids: object (Q,), unique within a benchmark.
        columns: A `Labels` for each of `COLUMNS`.
        num_options: int16 (Q,), 0 where unknown.
        answer: int16 (Q,), index of the right option, -1 where unknown.
        duration_s: float32 (Q,), nan where unknown.
        states: uint8 (C, M, Q): WRONG, RIGHT, UNANSWERED or NOT_ASKED.
        chosen: int8 (C, M, Q): index of the option chosen, -1 where unknown.
    """

    models: tuple[str, ...]
    conditions: tuple[str, ...]
    question_ids: np.ndarray
    columns: Mapping[str, Labels]
    num_options: np.ndarray
    answer: np.ndarray
    duration_s: np.ndarray
    states: np.ndarray = field(repr=False)
    chosen: np.ndarray = field(repr=False)

    @property
    def num_questions(self) -> int:
        """Q."""
        return len(self.question_ids)

    def place(self, condition: str) -> int:
        """The number of a condition.

        Raises:
            ValueError: There are no predictions under it.
        """
        if condition not in self.conditions:
            raise ValueError(
                f"no predictions under the condition {condition!r}, only under: "
                f"{', '.join(self.conditions)}; `apollo eval --condition {condition}` makes them"
            )
        return self.conditions.index(condition)

    def right(self, condition: str) -> np.ndarray:
        """Which answers are right: bool (M, Q); what is missing is not."""
        return self.states[self.place(condition)] == RIGHT

    @cached_property
    def ran(self) -> np.ndarray:
        """Whether a model was asked anything of a benchmark: bool (C, M, benchmarks).

        Where it was, what it lacks is wrong; where it was not, it has no score.
        """
        benchmark = self.columns["benchmark"]
        parts = [self.states]
        if len(benchmark.names) > 1:
            codes = range(len(benchmark.names))
            parts = [self.states[..., benchmark.codes == code] for code in codes]
        return np.stack([(part != NOT_ASKED).any(axis=-1) for part in parts], axis=-1)

    def counts(self, condition: str) -> tuple[np.ndarray, np.ndarray]:
        """How many models answered each question right, and how many ran: int16 (Q,) each."""
        ran = self.ran[self.place(condition)].sum(axis=0).astype(np.int16)
        right = self.right(condition).sum(axis=0, dtype=np.int16)
        return right, ran[self.columns["benchmark"].codes]

    def accuracies(self, condition: str, groups: Labels) -> np.ndarray:
        """Accuracy of each model on each group: float (M, groups), nan where it did not run.

        A group that reaches over benchmarks counts for the models that ran on all of them.
        """
        num_groups = len(groups.names)
        codes = groups.codes.astype(np.intp)
        sizes = np.bincount(codes, minlength=num_groups)
        right = self.right(condition)
        if num_groups == 1:
            totals = right.sum(axis=1, keepdims=True).astype(float)
        else:
            totals = np.stack([np.bincount(codes, row, num_groups) for row in right])
        benchmark = self.columns["benchmark"]
        pairs = np.unique(codes * len(benchmark.names) + benchmark.codes)
        group, of = np.divmod(pairs, len(benchmark.names))
        ran = self.ran[self.place(condition)]
        for model, each in enumerate(ran):
            totals[model, group[~each[of]]] = np.nan
        return totals / sizes

    def take(self, rows: np.ndarray) -> "Pool":
        """The pool of some questions, in this order."""
        return replace(
            self,
            question_ids=self.question_ids[rows],
            columns={name: labels.take(rows) for name, labels in self.columns.items()},
            num_options=self.num_options[rows],
            answer=self.answer[rows],
            duration_s=self.duration_s[rows],
            states=self.states[..., rows],
            chosen=self.chosen[..., rows],
        )

    def of_models(self, models: Sequence[int] | np.ndarray) -> "Pool":
        """The pool of some models, by number."""
        return replace(
            self,
            models=tuple(self.models[model] for model in models),
            states=self.states[:, models],
            chosen=self.chosen[:, models],
        )

    def with_classes(self, classes: Labels) -> "Pool":
        """The same predictions with other classes of the questions."""
        return replace(self, columns={**self.columns, "class": classes})

    def missing(self) -> list[tuple[str, str, str, int, int]]:
        """Model, condition, benchmark, number of unanswered and of not asked questions.

        Only where there are any, of what ran.
        """
        benchmark = self.columns["benchmark"]
        found = []
        for place, condition in enumerate(self.conditions):
            for number, model in enumerate(self.models):
                states = self.states[place, number]
                counts = {
                    state: np.bincount(
                        benchmark.codes[states == state], minlength=len(benchmark.names)
                    )
                    for state in (UNANSWERED, NOT_ASKED)
                }
                for code in np.flatnonzero(self.ran[place, number]):
                    unanswered, not_asked = counts[UNANSWERED][code], counts[NOT_ASKED][code]
                    if unanswered or not_asked:
                        name = benchmark.names[code]
                        found.append((model, condition, name, int(unanswered), int(not_asked)))
        return found

    def check_complete(self, max_missing: float = MAX_MISSING) -> None:
        """Refuse runs that lack more than this share of a benchmark's questions.

        Raises:
            PartialError: Naming the first such run.
        """
        sizes = dict(
            zip(
                self.columns["benchmark"].names,
                np.bincount(self.columns["benchmark"].codes).tolist(),
                strict=True,
            )
        )
        for model, condition, benchmark, _, not_asked in self.missing():
            if not_asked > max_missing * sizes[benchmark]:
                raise PartialError(
                    f"{model} was not asked {not_asked} of {sizes[benchmark]} questions of "
                    f"{benchmark} under {condition!r}; finish its run, leave it out, or count what "
                    f"is missing as wrong with --max-missing {not_asked / sizes[benchmark]:.2f}"
                )


class PoolBuilder:
    """Collects predictions as they are read, eleven bytes each."""

    def __init__(self) -> None:
        self._models: dict[str, int] = {}
        self._conditions: dict[str, int] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._about: list[tuple[tuple[str, ...], int, int, float]] = []
        self._sources: list[str] = []
        self._columns = {
            name: array(kind)
            for name, kind in (("row", "l"), ("model", "h"), ("condition", "b"), ("source", "i"))
        }
        self._state, self._chosen = array("b"), array("b")

    def open(self, source: str) -> None:
        """Say where the next predictions come from."""
        self._sources.append(source)

    def add(self, entry: Entry, place: str) -> None:
        """Take one prediction.

        Args:
            entry: The prediction.
            place: File and line, for messages.

        Raises:
            ContradictionError: Something else was said of the question before.
        """
        key = (entry.names[0], entry.question_id)
        about = (entry.names, entry.num_options, entry.answer, entry.duration_s)
        row = self._rows.setdefault(key, len(self._about))
        if row == len(self._about):
            self._about.append(about)
        elif self._about[row] != about:
            self._about[row] = _merged(self._about[row], about, place, entry.question_id)
        columns = self._columns
        columns["row"].append(row)
        columns["model"].append(self._models.setdefault(entry.model, len(self._models)))
        condition = self._conditions.setdefault(entry.condition, len(self._conditions))
        columns["condition"].append(condition)
        columns["source"].append(len(self._sources) - 1)
        self._state.append(entry.state)
        self._chosen.append(entry.chosen)

    def build(self) -> Pool:
        """Make the table.

        Raises:
            MalformedError: There are no predictions.
            DuplicateError: A prediction is there twice.
            ContradictionError: Twice, and not the same.
        """
        if not self._about:
            raise MalformedError("there are no predictions in these files")
        found = {name: np.array(column) for name, column in self._columns.items()}
        shape = (len(self._conditions), len(self._models), len(self._about))
        flat = np.ravel_multi_index((found["condition"], found["model"], found["row"]), shape)
        state, chosen = np.array(self._state), np.array(self._chosen)
        self._refuse_duplicates(flat, state, chosen, found["source"], shape)
        states = np.full(shape, NOT_ASKED, dtype=np.uint8)
        options = np.full(shape, -1, dtype=np.int8)
        states.reshape(-1)[flat], options.reshape(-1)[flat] = state, chosen
        names, num_options, answer, duration_s = zip(*self._about, strict=True)
        return Pool(
            models=tuple(self._models),
            conditions=tuple(self._conditions),
            question_ids=np.array([question for _, question in self._rows], dtype=object),
            columns={
                name: Labels.of(values)
                for name, values in zip(COLUMNS, zip(*names, strict=True), strict=True)
            },
            num_options=np.array(num_options, dtype=np.int16),
            answer=np.array(answer, dtype=np.int16),
            duration_s=np.array(duration_s, dtype=np.float32),
            states=states,
            chosen=options,
        )

    def _refuse_duplicates(
        self,
        flat: np.ndarray,
        state: np.ndarray,
        chosen: np.ndarray,
        source: np.ndarray,
        shape: tuple[int, int, int],
    ) -> None:
        order = np.argsort(flat, kind="stable")
        again = np.flatnonzero(flat[order][1:] == flat[order][:-1])
        if not len(again):
            return
        first, second = order[again[0]], order[again[0] + 1]
        condition, model, row = np.unravel_index(flat[first], shape)
        benchmark, question = list(self._rows)[row]
        what = (
            f"of {list(self._models)[model]} to {benchmark} / {question} under "
            f"{list(self._conditions)[condition]!r}"
        )
        files = dict.fromkeys(self._sources[source[each]] for each in (first, second))
        where = f"in {' and in '.join(files)}; {len(again)} such pairs in all"
        if (state[first], chosen[first]) != (state[second], chosen[second]):
            raise ContradictionError(f"two answers {what} that differ, {where}")
        raise DuplicateError(f"two answers {what}, {where}; give each file once")


def _merged(before: Any, now: Any, place: str, question_id: str) -> Any:
    """What two descriptions of a question say together."""
    (names, *numbers), (new_names, *new_numbers) = before, now
    described: list[tuple[str, Any]] = [(name, "") for name in COLUMNS]
    described += [("number of options", 0), ("right option", -1), ("seconds", None)]
    merged = []
    for (what, unknown), old, new in zip(
        described, (*names, *numbers), (*new_names, *new_numbers), strict=True
    ):
        if old == unknown or old != old:  # nan is not itself
            merged.append(new)
        elif new == unknown or new != new or new == old:
            merged.append(old)
        else:
            raise ContradictionError(
                f"{place}: the {what} of question {question_id!r} is {new!r} here and {old!r} "
                "in what was read before; are these predictions of one version of the benchmark?"
            )
    return (tuple(merged[: len(COLUMNS)]), *merged[len(COLUMNS) :])


# ---- the table as one Parquet file


def save_pool(pool: Pool, path: str | Path) -> None:
    """Write a pool as Parquet: a row per question, two columns of bytes per model and condition.

    Raises:
        ValueError: pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    table: dict[str, Any] = {"question_id": pool.question_ids}
    for name, labels in pool.columns.items():
        table[name] = arrow.DictionaryArray.from_arrays(labels.codes, list(labels.names))
    for name in ("num_options", "answer", "duration_s"):
        table[name] = getattr(pool, name)
    for place, condition in enumerate(pool.conditions):
        for number, model in enumerate(pool.models):
            table[f"state/{condition}/{model}"] = pool.states[place, number]
            table[f"chosen/{condition}/{model}"] = pool.chosen[place, number]
    parquet.write_table(arrow.table(table), path, compression="zstd")


def load_pool(path: str | Path) -> Pool:
    """Read what `save_pool` wrote.

    Raises:
        MalformedError: It is something else.
        ValueError: pyarrow is not installed.
    """
    arrow, parquet = _pyarrow()
    try:
        table = parquet.read_table(path)
        keys = [name.split("/", 2) for name in table.column_names if name.startswith("state/")]
        conditions = tuple(dict.fromkeys(key[1] for key in keys))
        models = tuple(dict.fromkeys(key[2] for key in keys))
        shape = (len(conditions), len(models), table.num_rows)
        states, chosen = np.empty(shape, np.uint8), np.empty(shape, np.int8)
        for place, condition in enumerate(conditions):
            for number, model in enumerate(models):
                states[place, number] = table[f"state/{condition}/{model}"].to_numpy()
                chosen[place, number] = table[f"chosen/{condition}/{model}"].to_numpy()
        columns = {}
        for name in COLUMNS:
            column = table[name].combine_chunks().dictionary_encode()
            column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
            codes = column.indices.to_numpy().astype(np.int32)
            columns[name] = Labels(codes, tuple(column.dictionary.to_pylist()))
        if not keys or states.max(initial=0) > NOT_ASKED:
            raise KeyError("state/CONDITION/MODEL")
        return Pool(
            models=models,
            conditions=conditions,
            question_ids=table["question_id"].to_numpy(),
            columns=columns,
            **{name: table[name].to_numpy() for name in ("num_options", "answer", "duration_s")},
            states=states,
            chosen=chosen,
        )
    except (arrow.ArrowException, OSError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MalformedError(
            f"{path} is no table of predictions that `apollo audit --save` wrote: {reason}"
        ) from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'apollo-lmm[data]'") from None
    return pyarrow, parquet
