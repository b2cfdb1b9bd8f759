"""`apollo data check`: what is wrong with a mixture, before any GPU hour is spent.

Every record of every source is read and its media looked for; a seeded sample of them is opened
under limits of time and memory, and measured in tokens as a model would read it. What was found is
one plain dictionary (`check_mixture`), which the command prints as tables or JSON. Read next:
`readers.py`, which does the reading.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apollo.data.formats import RECORD_TYPES, Record
from apollo.data.mixture import Mixture, Source, read_mixture
from apollo.data.readers import OpenSource, count_types, open_sources
from apollo.data.stores import EmbeddedFile, Medium, exists, fetch
from apollo.media import load_image, sampling_of
from apollo.messages import map_media
from apollo.runtime import progress
from apollo.video import ClipSampling, GuardedLoader

SHOWN = 10
"""Findings of a kind that the terminal shows; --out has all."""

PROBLEMS = {
    "sources": "sources that cannot be used",
    "records": "bad records",
    "missing": "missing files",
    "unreadable": "unreadable files",
    "too_long": "records longer than the LLM reads",
}
"""What makes the command fail."""

WARNINGS = {
    "duplicates": "records with the conversation and media of another",
    "other_type": "records of another type than their source declares",
}
"""What is worth knowing but may be meant."""


def main(args: argparse.Namespace) -> int:
    """Run `apollo data check`; returns 2 if something is wrong.

    Args:
        args: mixture, data_dir, media_dir, sample, seed, model, steps, batch_size, out, json.
    """
    report = check_mixture(
        args.mixture,
        data_dir=args.data_dir,
        media_dir=args.media_dir or "",
        num_samples=args.sample,
        seed=args.seed,
        model=args.model,
        num_draws=args.steps * args.batch_size,
    )
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _show(report, args.out)
    return 2 if any(report["problems"].values()) else 0


def check_mixture(
    path: str,
    data_dir: str | None = None,
    media_dir: str = "",
    num_samples: int = 50,
    seed: int = 0,
    model: str | None = None,
    num_draws: int = 256_000,
) -> dict[str, Any]:
    """Read all of a mixture and open a sample of its media.

    Args:
        path: A mixture file, or anything that `Source.path` may be.
        data_dir: What the mixture's paths are relative to, instead of what it says.
        media_dir: Where the media of sources that do not say so lie.
        num_samples: Records of each source whose media are opened.
        seed: Decides which.
        model: Folder or hub id of the model in whose tokens records are measured.
        num_draws: Records that a training would draw.

    Returns:
        `sources`, what each one holds; `types`, the mixture's counts by type; `draws`, how many
        records of each type are drawn; `problems` and `warnings`, lists by the keys of `PROBLEMS`
        and `WARNINGS`.

    Raises:
        ValueError: The mixture file or the model cannot be read.
    """
    if path.endswith((".yaml", ".yml")):
        sources = read_mixture(path, Path(data_dir).absolute() if data_dir else None)
    else:
        sources = [Source(path=path if "://" in path else str(Path(data_dir or "") / path))]
    sources = [replace(one, media_dir=one.media_dir or media_dir) for one in sources]
    findings: dict[str, list[Any]] = {key: [] for key in (*PROBLEMS, *WARNINGS)}
    opened = _open_all(sources, findings)
    hashes = []
    reports = []
    with GuardedLoader() as loader:
        measure = _Measure(loader, model)
        for index, one in enumerate(opened):
            rng = np.random.default_rng((seed, index))
            report, hashes_of_one = _check_source(one, num_samples, rng, measure, findings)
            reports.append(report)
            hashes.append(hashes_of_one)
    findings["duplicates"] = _find_duplicates(opened, hashes)
    draws = _count_draws(opened, reports, num_draws, seed)
    types: Counter[str] = Counter()
    for report in reports:
        types.update(report["types"])
    return {
        "mixture": path,
        "model": model,
        "window": measure.window,
        "num_draws": num_draws,
        "num_samples": num_samples,
        "sources": reports,
        "types": dict(types),
        "draws": draws,
        "problems": {key: findings[key] for key in PROBLEMS},
        "warnings": {key: findings[key] for key in WARNINGS},
    }


def _open_all(sources: Sequence[Source], findings: dict[str, list[Any]]) -> list[OpenSource]:
    """Open what can be opened; say of the rest where it can be had."""
    opened: list[OpenSource] = []
    for source in sources:
        try:
            opened += open_sources([source], check=False)
        except (ValueError, OSError) as error:
            hub = getattr(source, "hub", "")
            findings["sources"].append(f"{error}; get it from {hub}" if hub else str(error))
    return opened


def _check_source(
    one: OpenSource,
    num_samples: int,
    rng: np.random.Generator,
    measure: _Measure,
    findings: dict[str, list[Any]],
) -> tuple[dict[str, Any], np.ndarray]:
    """Read every record of a source, and open the media of a sample.

    Returns:
        What it holds, and (records,) uint64 hashes of the good records' contents, 0 for the others.
    """
    size = len(one.records)
    sample = set(rng.choice(size, min(num_samples, size), replace=False).tolist())
    types: Counter[str] = Counter()
    missing: Counter[Medium] = Counter()
    first_use: dict[Medium, str] = {}
    hashes = np.zeros(size, np.uint64)
    chosen: list[Record] = []
    bad: list[str] = []
    num_media = 0

    def visit(index: int, record: Record) -> None:
        nonlocal num_media
        types[record.type] += 1
        hashes[index] = _hash(record)
        if one.source.type and record.type != one.source.type:
            findings["other_type"].append(f"{record.where}: {record.type}, not {one.source.type}")
        media = [medium for _, medium in record.media]
        num_media += len(media)
        absent = [medium for medium in media if not exists(medium)]
        for medium in absent:
            missing[medium] += 1
            first_use.setdefault(medium, record.where)
        if index in sample and not absent:
            chosen.append(record)

    one.records.check(lambda error: bad.append(str(error)), visit)
    findings["records"] += bad
    findings["missing"] += [
        {"file": str(medium), "records": count, "first": first_use[medium]}
        for medium, count in missing.items()
    ]
    name = str(one.source.path)
    lengths = measure.lengths(chosen, f"opening media of {Path(name).name}", findings)
    return {
        "path": name,
        "type": one.source.type,
        "weight": one.weight,
        "records": size,
        "bad": len(bad),
        "types": dict(types),
        "media": num_media,
        "missing": len(missing),
        "opened": len(chosen),
        "tokens": _summary(lengths, measure.window),
    }, hashes


def _hash(record: Record) -> int:
    """Hash what a record says and shows; never 0."""
    said = map_media(record.messages, lambda _, medium: str(medium))
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8)
    for _, medium in record.media:
        if isinstance(medium, EmbeddedFile):
            digest.update(medium.data)
    return int.from_bytes(digest.digest()) or 1


class _Measure:
    """Opens media and counts tokens.

    Attributes:
        window: The most tokens that the model's LLM reads; None without a model.
    """

    def __init__(self, loader: GuardedLoader, model: str | None) -> None:
        self.loader = loader
        self.window: int | None = None
        self.processor: Any = None
        self.sampling = ClipSampling(max_clips=8)  # without a model: enough to see that it opens
        if model is None:
            return
        from transformers import AutoConfig, AutoProcessor

        try:
            config: Any = AutoConfig.from_pretrained(model)
            self.processor = AutoProcessor.from_pretrained(model)
            self.sampling = sampling_of(self.processor)
        except (ValueError, OSError, AttributeError) as error:
            raise ValueError(f"{model} is no model of Apollo that can be read: {error}") from error
        self.window = config.text_config.max_position_embeddings

    def lengths(
        self, records: Sequence[Record], what: str, findings: dict[str, list[Any]]
    ) -> list[int]:
        """Open the media of records; give the tokens of each that opens, if there is a model."""
        lengths = []
        failed: dict[Medium, str] = {}
        for record in progress(records, what) if records else ():
            messages = self._open(record, failed)
            if messages is None or self.processor is None:
                continue
            length = self.processor([messages], with_pixels=False)["input_ids"].shape[1]
            lengths.append(length)
            if self.window is not None and length > self.window:
                findings["too_long"].append(f"{record.where}: {length} tokens")
        findings["unreadable"] += [
            {"file": str(medium), "error": error} for medium, error in failed.items()
        ]
        return lengths

    def _open(self, record: Record, failed: dict[Medium, str]) -> list[dict[str, Any]] | None:
        """Give the conversation with its media loaded, if all of them can be."""

        def load(kind: str, medium: Medium) -> Any:
            if kind == "video":
                return self.loader.load(fetch(medium), self.sampling, size=(16, 16), num_threads=1)
            return self.loader.run(load_image, fetch(medium))

        loaded = []
        for kind, medium in record.media:
            try:
                loaded.append(load(kind, medium))
            except (ValueError, OSError) as error:
                failed.setdefault(medium, f"{record.where}: {error}")
        if len(loaded) < len(record.media):
            return None
        waiting = iter(loaded)
        return map_media(record.messages, lambda *_: next(waiting))


def _summary(lengths: Sequence[int], window: int | None) -> dict[str, Any] | None:
    """Describe the tokens of a sample of records."""
    if not lengths or window is None:
        return None
    low, median, p95, high = np.percentile(lengths, (0, 50, 95, 100))
    return {
        "records": len(lengths),
        "min": int(low),
        "median": round(float(median), 1),
        "p95": round(float(p95), 1),
        "max": int(high),
        "above_window": float(np.mean(np.array(lengths) > window)),
    }


def _find_duplicates(
    opened: Sequence[OpenSource], hashes: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """Find the records that say and show the same, within a source and across sources."""
    if not hashes:
        return []
    ends = np.cumsum([len(one) for one in hashes])
    whole = np.concatenate(hashes)
    order = np.argsort(whole, kind="stable")
    _, starts, counts = np.unique(whole[order], return_index=True, return_counts=True)

    def where(place: int) -> str:
        source = int(np.searchsorted(ends, place, side="right"))
        return opened[source].records.where(place - int(ends[source]) + len(hashes[source]))

    found = []
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        if count > 1 and whole[order[start]]:
            first, *others = [where(place) for place in order[start : start + count].tolist()]
            found.append({"first": first, "again": others})
    return found


def _count_draws(
    opened: Sequence[OpenSource], reports: Sequence[dict[str, Any]], num_draws: int, seed: int
) -> dict[str, int]:
    """Add to the reports how often each source is drawn, and count the draws of each type."""
    if not opened:
        return {}
    sizes, weights = [len(one.records) for one in opened], [one.weight for one in opened]
    mixture = Mixture(sizes, weights, num_draws, seed)
    for report, size, count in zip(reports, sizes, mixture.counts(), strict=True):
        report |= {"drawn": count, "share": count / num_draws, "passes": count / size}
    return count_types(opened, mixture)


# ---- on the terminal


def _show(report: dict[str, Any], out: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns = ("source", "records", *RECORD_TYPES, "bad", "missing", "drawn", "share", "passes")
    table = Table(*columns, title=f"{report['mixture']}: {report['num_draws']} records drawn")
    for one in report["sources"]:
        counts = [str(one["types"].get(type_, "")) for type_ in RECORD_TYPES]
        row = [_short(one["path"]), one["records"], *counts, one["bad"] or "", one["missing"] or ""]
        table.add_row(
            *map(str, row), str(one["drawn"]), f"{one['share']:.1%}", f"{one['passes']:.2f}"
        )
    shares = [
        f"{report['draws'].get(type_, 0) / report['num_draws']:.1%}" for type_ in RECORD_TYPES
    ]
    table.add_section()
    table.add_row("share of the draws", "", *shares)
    if report["sources"]:
        console.print(table)
    if report["window"] is None:
        console.print("lengths in tokens: give --model", style="dim")
    else:
        console.print(_table_of_tokens(report))
    for kind, titles in (("problems", PROBLEMS), ("warnings", WARNINGS)):
        for key, title in titles.items():
            _show_findings(console, report[kind][key], title, kind == "problems", out)
    if not any(report["problems"].values()):
        opened = sum(one["opened"] for one in report["sources"])
        console.print(f"nothing wrong; the media of {opened} records were opened", style="green")


def _table_of_tokens(report: dict[str, Any]) -> Any:
    from rich.table import Table

    names = ("records", "min", "median", "p95", "max")
    title = f"tokens of the sampled records; the LLM reads {report['window']}"
    table = Table("source", *names, "above", title=title)
    for one in report["sources"]:
        if one["tokens"]:
            numbers = [f"{one['tokens'][name]:g}" for name in names]
            table.add_row(_short(one["path"]), *numbers, f"{one['tokens']['above_window']:.1%}")
    return table


def _show_findings(
    console: Any, found: list[Any], title: str, is_problem: bool, out: str | None
) -> None:
    if not found:
        return
    console.print(f"{len(found)} {title}:", style="bold red" if is_problem else "yellow")
    for one in found[:SHOWN]:
        text = one if isinstance(one, str) else ", ".join(f"{k} {v}" for k, v in one.items())
        console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
    if len(found) > SHOWN:
        place = f"in {out}" if out else "with --out report.json"
        console.print(f"  and {len(found) - SHOWN} more, {place}")


def _short(path: str) -> str:
    return path if "://" in path else "/".join(Path(path).parts[-2:])
