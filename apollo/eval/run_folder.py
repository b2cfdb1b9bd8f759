"""The folder of an evaluation, which survives a kill at any moment.

    summary.json        at once: what the answers depend on; at the end: the scores
    parts/RANK.jsonl    predictions as they come, one write for each video; gone at the end
    predictions.jsonl   all predictions, sorted: the same bytes however the run came about
    report.html         tables, bars and examples

Here because what is on disk decides what has to be asked: a run is resumed by reading this folder,
whatever number of processes wrote it. `runner.py` asks and writes here; `compare.py` and curation
read predictions.jsonl. Free of torch.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apollo.eval.questions import Question
from apollo.eval.scoring import Prediction

Key = tuple[str, str, str]  # benchmark, question_id, condition: a Prediction's `key`
UNREADABLE = "unreadable: "
"""How the status begins where the video could not be shown; what follows says why."""

# Of a manifest: what two runs must share for their predictions to lie in one folder.
_SAME = {"answerer": "another answerer", "questions_sha256": "other questions"}
# Of the versions in a manifest: what tells one run from the next and not one machine from another.
_NOT_VERSIONS = ("time", "num_cores")


class RunFolder:
    """One evaluation on disk.

    Attributes:
        path: Where.
    """

    def __init__(self, path: str | Path) -> None:
        """Make the folder if need be.

        Raises:
            ValueError: A file is in the way.
            OSError: It cannot be made or written to.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give --out a folder")
        self._parts_dir = self.path / "parts"
        self._parts_dir.mkdir(parents=True, exist_ok=True)

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, or check that the run that is here has the same.

        Args:
            manifest: Has "answerer" and "questions_sha256", which decide the predictions, and
                "versions", which should not but may.

        Raises:
            ValueError: The folder holds predictions of another answerer or of other questions.
        """
        summary = self.summary()
        if summary is None:
            start = {"finished": False, "manifest": manifest, "version_drift": []}
            self._write("summary.json", _to_json(start))
            return
        before = summary["manifest"]
        for name, what in _SAME.items():
            if before.get(name) != manifest[name]:
                found = "; ".join(_differences(before.get(name), manifest[name], name))
                raise ValueError(
                    f"{self.path} holds predictions of {what} ({found}); choose another --out"
                )

    def note_versions(self, versions: Mapping[str, Any]) -> None:
        """Keep that more answers are made, where the versions differ from those at the start."""
        summary = self.summary()
        assert summary is not None, "the manifest is written first"
        then, now = dict(summary["manifest"].get("versions") or {}), dict(versions)
        for name in _NOT_VERSIONS:
            then.pop(name, None)
            now.pop(name, None)
        drift = summary.get("version_drift", [])
        if new := [text for text in _differences(then, now, "versions") if text not in drift]:
            self._write("summary.json", _to_json({**summary, "version_drift": [*drift, *new]}))

    def summary(self) -> dict[str, Any] | None:
        """Give what summary.json holds; None if no run has begun here.

        Raises:
            ValueError: It is no summary, or is missing although there are predictions.
        """
        path = self.path / "summary.json"
        if not path.exists():
            if (self.path / "predictions.jsonl").exists() or any(self._parts_dir.iterdir()):
                raise ValueError(
                    f"{self.path} holds predictions but no summary.json that says whose they are; "
                    "choose another --out"
                )
            return None
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(summary["manifest"], dict):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is not the summary of an evaluation; choose another --out"
            ) from None
        return summary

    def read(self, questions: Sequence[Question]) -> dict[Key, Prediction]:
        """Read all predictions that are here, whoever wrote them.

        An answer stands over a failure to read the video, so that a video that was mended counts.

        Args:
            questions: All questions of the run.

        Raises:
            ValueError: A line is not a prediction, or belongs to none of the questions.
        """
        by_id = {(q.benchmark, q.question_id): q for q in questions}
        known: dict[Key, Prediction] = {}
        parts = sorted(self._parts_dir.glob("*.jsonl"))
        for path in (self.path / "predictions.jsonl", *parts):
            for number, line in enumerate(_whole_lines(path), start=1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"a prediction is a JSON object, not {line.decode():.60}")
                    prediction = Prediction.from_json(record)
                except ValueError as error:
                    raise ValueError(
                        f"{path}:{number}: {error}; delete the line, its question is asked again"
                    ) from None
                question = by_id.get((prediction.benchmark, prediction.question_id))
                if question is None or not _is_about(prediction, question):
                    raise ValueError(
                        f"{path}:{number}: question {prediction.question_id!r} is not asked here; "
                        "is the file of another run? Move it away"
                    )
                before = known.get(prediction.key)
                if before is None or before.status.startswith(UNREADABLE):
                    known[prediction.key] = prediction
        return known

    @contextmanager
    def part(self, rank: int) -> Iterator[Callable[[Iterable[Prediction]], None]]:
        """Open the file that one process adds predictions to; yields what adds some of them.

        Raises:
            ValueError: Another run is writing to it.
        """
        path = self._parts_dir / f"{rank}.jsonl"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process is writing to {path}; wait for it, stop it, or choose "
                    "another --out (several processes of one run are started with torchrun)"
                ) from None
            os.truncate(descriptor, path.read_bytes().rfind(b"\n") + 1)  # what a kill left undone

            def append(predictions: Iterable[Prediction]) -> None:
                data = "".join(map(_to_line, predictions)).encode()
                # In one piece: a kill leaves all of a video's predictions or cuts one line off.
                if os.write(descriptor, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

            yield append
        finally:
            os.close(descriptor)

    def finish(
        self, predictions: Iterable[Prediction], summary: Mapping[str, Any], page: str
    ) -> None:
        """Write what a run is for, and remove the parts."""
        lines = map(_to_line, sorted(predictions, key=lambda prediction: prediction.key))
        self._write("predictions.jsonl", "".join(lines))
        self._write("report.html", page)
        self._write("summary.json", _to_json({"finished": True, **summary}))
        shutil.rmtree(self._parts_dir)

    def _write(self, name: str, text: str) -> None:
        """Write a file so that it is there whole or as it was before."""
        temporary = self.path / f"{name}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)


def _whole_lines(path: Path) -> list[bytes]:
    """Lines that end in a newline: the others were cut off by a kill."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _is_about(prediction: Prediction, question: Question) -> bool:
    return (prediction.video, prediction.num_options, prediction.answer) == (
        question.video_id,
        len(question.options),
        question.answer,
    )


def _to_line(prediction: Prediction) -> str:
    return json.dumps(prediction.to_json(), ensure_ascii=False, allow_nan=False) + "\n"


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _differences(before: Any, now: Any, name: str) -> list[str]:
    """Say where two JSON values differ, a text for each place: "name: this, now that"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            text for key in keys for text in _differences(before.get(key), now.get(key), str(key))
        ]
    return [] if before == now else [f"{name}: {before}, now {now}"]
