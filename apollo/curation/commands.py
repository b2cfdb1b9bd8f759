"""`apollo audit` and `apollo curate`: from predictions to a report, and to a small benchmark.

Here because both read the same files and answer in tables on the terminal, JSON and CSV for
machines, and a page. Next: docs/curation.md.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apollo.curation import report
from apollo.curation.audit import Audit, audit
from apollo.curation.classes import classified, labelling_questions, read_classes
from apollo.curation.curate import Choice, Settings, choose, counts_by_reason
from apollo.curation.outputs import (
    apply_review,
    read_review,
    write_audit,
    write_curation,
    write_decisions,
    write_json,
)
from apollo.curation.readers import is_aggregate, parse_sources, read_pool
from apollo.curation.records import Pool, save_pool
from apollo.curation.redundancy import Redundancy, against_figure_2, read_accuracies, redundancy
from apollo.curation.shortcuts import WITHOUT_VIDEO
from apollo.curation.validate import MEASURES, Validation, cost_ratio, validate
from apollo.eval.benchmarks import BENCHMARKS, read_benchmark
from apollo.eval.questions import Question
from apollo.runtime import make_run_dir

WIDTH = 118  # of tables that go to a file
FEW_MODELS = 8  # below it, intervals over models say little; the paper has ten


def audit_main(args: argparse.Namespace) -> int:
    """Run `apollo audit PREDICTIONS...`.

    Args:
        args: predictions (list of `readers.parse_sources`, or tables of accuracies), data (list),
            by_row, max_missing, out (folder or None), save (Parquet file or None).
    """
    console = _console()
    sources = parse_sources(args.predictions)
    tables = [source.path for source in sources if is_aggregate(source.path)]
    if tables and len(tables) < len(sources):
        raise ValueError("tables of accuracies and predictions cannot be audited together")
    out = make_run_dir(args.out) if args.out else None
    if tables:
        _audit_table(tables, console, out)
        return 0
    pool = read_pool(sources, args.max_missing)
    if args.save:
        save_pool(pool, args.save)
    questions = read_data(args.data, pool, args.by_row)
    found = audit(pool, questions)
    print_audit(found, pool, console)
    if out:
        write_audit(found, pool, out)
        page = report.audit_page(found, pool, questions)
        (out / "audit.html").write_text(page, encoding="utf-8")
        _say(console, f"Page: {out / 'audit.html'}; of each question: {out / 'questions.csv'}")
    return 0


def curate_main(args: argparse.Namespace) -> int:
    """Run `apollo curate PREDICTIONS...`.

    Args:
        args: predictions, data, by_row and max_missing as in `audit_main`; size, rank, rule,
            balance, shares, per_video (see `curate.Settings`), classes (file or None), ask_classes
            (whether only to write the questions that ask for classes), review (sheet or None),
            splits (of the validation, 0 for none), name (of the small benchmark), out (folder).
    """
    console = _console()
    settings = Settings(args.size, args.rank, args.rule, args.balance, args.shares, args.per_video)
    pool = read_pool(parse_sources(args.predictions), args.max_missing)
    pool.place("video")
    questions = read_data(args.data, pool, args.by_row)
    out = make_run_dir(args.out)
    if args.ask_classes:
        return _ask_classes(pool, questions, out, console)
    if args.classes:
        pool = pool.with_classes(read_classes(args.classes, pool, questions))
    reviewed = read_review(args.review, pool) if args.review else {}
    refused, classes = apply_review(reviewed, pool)
    pool = pool.with_classes(classes)
    choice = choose(pool, settings, refused, classified(classes) if args.classes else None)
    if len(choice.rows) < settings.size:
        _say(
            console,
            f"Only {len(choice.rows)} questions can be kept, not {settings.size}; decisions.csv "
            "says why each of the others was dropped.",
        )
    if not len(choice.rows):
        write_decisions(pool, choice, out)
        raise ValueError(f"no question is left; {out / 'decisions.csv'} says why")
    found = _validate(pool, settings, args.splits, console)
    cost = cost_ratio(pool, choice.rows)
    how = {
        "name": args.name,
        "settings": dataclasses.asdict(settings),
        "models": pool.models,
        "conditions": pool.conditions,
        "num_pool": pool.num_questions,
        "reasons": counts_by_reason(choice),
        "cost": cost,
        "num_reviewed": sum(row["verdict"] != "" for row in reviewed.values()),
        "validation": None if found is None else dataclasses.replace(found, scatter={}),
    }
    write_curation(how, pool, choice, questions, reviewed, out)
    page = report.curation_page(pool, choice, found, cost, settings.balance, questions)
    (out / "curation.html").write_text(page, encoding="utf-8")
    print_curation(pool, choice, found, console)
    _say(console, report.cost_text(cost))
    _say(console, _what_next(out, bool(questions)))
    return 0


def _what_next(out: Path, runs: bool) -> str:
    text = f"Page: {out / 'curation.html'}; for a person to check: {out / 'review.csv'}, read back "
    text += "with --review. "
    if runs:
        return text + f"It runs with `apollo eval MODEL --data {out}`."
    return text + "With --data, the questions themselves are written, for `apollo eval`."


def _ask_classes(pool: Pool, questions: Sequence[Question], out: Path, console: Console) -> int:
    if not questions:
        raise ValueError("--ask-classes needs the questions' texts; give --data")
    lines = (json.dumps(record) + "\n" for record in labelling_questions(pool, questions))
    (out / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    _say(
        console,
        f"apollo eval MODEL --data {out} --condition text --out runs/labels answers them; its "
        "score means nothing. Then give --classes runs/labels.",
    )
    return 0


def _validate(
    pool: Pool, settings: Settings, num_splits: int, console: Console
) -> Validation | None:
    if num_splits < 1:
        return None
    try:
        return validate(pool, settings, num_splits)
    except ValueError as error:
        _say(console, f"Not validated: {error}.")
        return None


def read_data(data: Sequence[str], pool: Pool, by_row: bool = False) -> list[Question]:
    """Read the texts of the pool's questions.

    Args:
        data: Folders, each as FOLDER or BENCHMARK=FOLDER; the former where the pool has one
            benchmark.
        pool: Names the benchmarks.
        by_row: The pool's ids are numbers of rows from 0 (as those of other harnesses may be).

    Raises:
        ValueError: A folder that is none of these benchmarks', or holds none of the questions.
    """
    questions: list[Question] = []
    names = pool.columns["benchmark"].names
    for text in data:
        name, _, folder = text.rpartition("=")
        if not name and len(names) > 1:
            raise ValueError(f"say which of {', '.join(names)} is in {text}, as NAME={text}")
        name = name or names[0]
        reader = name if name in BENCHMARKS else "questions"
        if (Path(folder) / "manifest.json").is_file():
            reader = "curated"
        read = [
            dataclasses.replace(
                question, benchmark=name, question_id=str(row) if by_row else question.question_id
            )
            for row, question in enumerate(read_benchmark(reader, folder))
        ]
        known = set(pool.question_ids)
        if not any(question.question_id in known for question in read):
            raise ValueError(
                f"none of the questions of {folder} is in the predictions: ids there are such as "
                f"{read[0].question_id!r}, in the predictions such as {pool.question_ids[0]!r}; "
                "--by-row joins them by the number of the row"
            )
        questions += read
    return questions


# ---- tables of accuracies


def _audit_table(paths: Sequence[Path], console: Console, out: Path | None) -> None:
    """Print the table, the gaps and the correlations, and compare with the paper if it is its."""
    table = read_accuracies(paths)
    printed = Table("model / benchmark", "video", "image", "text", box=box.SIMPLE_HEAD)
    for m, model in enumerate(table.models):
        for b, benchmark in enumerate(table.benchmarks):
            cells = map(report.per_cent, table.values[:, m, b])
            printed.add_row(escape(f"{model} / {benchmark}"), *cells)
    console.print(printed)
    _say(console, "Mean over models, and gaps with 95 % intervals over models:")
    console.print(_table(["benchmark", *report.GAP_COLUMNS], report.gap_rows(table)))
    found = {
        f"benchmarks, {name}": redundancy(table.benchmarks, values)
        for name, values in zip(("video", "image", "text"), table.values, strict=True)
    }
    _say(console, f"Correlations (Pearson) over {len(table.models)} models, with the video:")
    console.print(_matrix(found["benchmarks, video"]))
    differ = None
    if table.is_papers:
        num_pairs, differ = against_figure_2(found["benchmarks, video"])
        _say(
            console,
            f"The paper's Figure 2 prints {num_pairs} of these pairs to one digit: "
            f"{num_pairs - len(differ)} agree, {len(differ)} do not:",
        )
        rows = [[d.a, d.b, f"{d.printed:.1f}", f"{d.computed:.3f}"] for d in differ]
        console.print(_table(["benchmark", "benchmark", "printed", "from the table"], rows))
    if out:
        pairs = {name: list(each.pairs()) for name, each in found.items()}
        write_json(
            {"accuracies": table, "redundancies": pairs, "figure_2_differs": differ},
            out / "audit.json",
        )
        page = report.accuracies_page(table, found, differ)
        (out / "audit.html").write_text(page, encoding="utf-8")
        _say(console, f"Page: {out / 'audit.html'}")


# ---- telling


def _console() -> Console:
    """The terminal; a file gets lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _matrix(found: Redundancy) -> Table:
    names = [found.names[place] for place in found.order]
    rows = [
        [f"{number} {name}", *(f"{found.pearson[a, b]:.2f}" for b in found.order)]
        for number, (name, a) in enumerate(zip(names, found.order, strict=True), start=1)
    ]
    return _table(["", *map(str, range(1, len(names) + 1))], rows)


def print_audit(found: Audit, pool: Pool, console: Console) -> None:
    """Print accuracies by group, what is missing, shortcuts and redundancy; 100 columns suffice."""
    overall = found.groups["overall"][0]
    _say(
        console,
        f"{pool.num_questions} questions, {overall.num_videos} videos, {len(found.models)} models. "
        "Per cent right, mean over models; in brackets 95 % over videos, then over models.",
    )
    if len(found.models) < FEW_MODELS:
        _say(console, f"{len(found.models)} models are few: intervals over models are wide.")
    for grouping in ("overall", "benchmark", "class", "duration", "needs"):
        groups = found.groups.get(grouping, [])
        if grouping != "overall" and len(groups) < 2:
            continue
        gap = "video - text" if "video - text" in groups[0].gaps else next(iter(groups[0].gaps), "")
        columns = [grouping, "asked", *groups[0].accuracy, *([gap] if gap else [])]
        columns += [f"answerable: {c}" for c in found.answerable]
        rows = []
        for group in groups:
            shown = [*group.accuracy.values(), *([group.gaps[gap]] if gap else [])]
            rows.append(
                [
                    group.name,
                    str(group.num_questions),
                    *(
                        f"{report.per_cent(e.value)} ({report.range_of(e.low, e.high)}; "
                        f"{report.range_of(e.models_low, e.models_high)})"
                        if grouping == "overall"
                        else report.per_cent(e.value)
                        for e in shown
                    ),
                    *(report.per_cent(share) for share in group.answerable.values()),
                ]
            )
        console.print(_table(columns, rows))
    for sentence in notes_on(found):
        _say(console, sentence)


def notes_on(found: Audit) -> list[str]:
    """What the numbers of an audit say, a sentence each."""
    notes = []
    if found.missing:
        total = sum(row[3] + row[4] for row in found.missing)
        notes.append(f"{total} answers are missing and count as wrong; audit.json says whose.")
    for condition, often in found.majority.items():
        sure = found.answerable[condition] > 0.5
        notes.append(
            f"Under {condition!r} more than half of the models are right on {often.sum()} "
            f"questions; {sure.sum()} are answerable, luck aside. Kinds mostly answerable: "
            f"{', '.join(found.solved_kinds[condition]) or 'none'}."
        )
    notes += [
        f"No predictions under {condition!r}: that shortcut cannot be seen."
        for condition in WITHOUT_VIDEO
        if condition not in found.conditions
    ]
    if found.positions:
        p: Any = found.positions["p"]
        notes.append(f"Places of right answers: even with p = {p:.3f}.")
    for name, each in found.lengths.items():
        if name != "chance":
            notes.append(
                f"Always the {name} option: {report.per_cent(each.value)} "
                f"({report.range_of(each.low, each.high)}), chance "
                f"{report.per_cent(found.lengths['chance'].value)}."
            )
    for name, redundant in found.redundancies.items():
        pairs = [pair for pair in redundant.pairs() if pair["r2"] == pair["r2"]]
        for pair in sorted(pairs, key=lambda pair: -float(pair["r2"]))[:3]:
            notes.append(
                f"By {name}: {pair['a']} and {pair['b']} have R2 {pair['r2']:.2f} "
                f"({pair['r2_low']:.2f} to {pair['r2_high']:.2f}, {pair['num_models']} models)."
            )
    enough = next((point for point in found.curve if point.kendall[0] >= 0.9), None)
    if enough:
        notes.append(f"{enough.size} random questions keep the ranking with a mean tau of 0.9.")
    return notes


def print_curation(pool: Pool, choice: Choice, found: Validation | None, console: Console) -> None:
    """Print what became of the questions, and how models are ranked that did not choose."""
    for condition in WITHOUT_VIDEO:
        if condition not in pool.conditions:
            _say(console, f"No predictions under {condition!r}: nothing was dropped for it.")
    rows = [[reason, str(count)] for reason, count in counts_by_reason(choice).items()]
    console.print(_table(["what became of the questions", "number"], rows))
    if found is None:
        return
    _say(
        console,
        f"{found.num_models - found.num_choosing} models that did not choose, ranked by "
        f"{found.size} questions and by the clean pool; mean of {found.num_splits} splits:",
    )
    table = [
        [
            method,
            *(
                f"{measures[m].mean:.3f} ({measures[m].low:.2f} to {measures[m].high:.2f})"
                for m in MEASURES
            ),
        ]
        for method, measures in found.methods.items()
    ]
    console.print(_table(["choice", *MEASURES], table))
    for method, share in found.beaten.items():
        gain = found.gain[method].mean
        _say(
            console,
            f"{method}: better R2 than {100 * share:.0f} % of random sets, {gain:+.3f} on average.",
        )
