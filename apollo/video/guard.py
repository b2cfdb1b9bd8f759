"""Load videos under hard limits of time and memory, in processes of their own.

A damaged or hostile file can hang or crash native code, where no Python exception or signal handler
runs. Here another process decodes and this one watches: what takes too long is killed, what wants
too much memory is refused it, and a crash costs one file. `GuardedLoader` is one such process, for
use in a data worker; `load_many` runs several over a list of files and writes the bad ones, with
their reasons, to a quarantine list. apollo/video/worker.py is that process, apollo/video/clips.py
what runs in it.

    with GuardedLoader(time_limit_s=20) as loader:
        clips = loader.load("earth.mp4", ClipSampling(max_clips=8))

    for path, clips in load_many(paths, quarantine="bad_videos.jsonl"):
        ...
"""

import functools
import itertools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from apollo.runtime import append_jsonl, read_jsonl
from apollo.video.clips import VideoClips, load_clips
from apollo.video.files import VideoError
from apollo.video.sampling import ClipSampling
from apollo.video.worker import Worker, name_of

Source = TypeVar("Source", bound=str | Path | bytes)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)

_MEBIBYTE = 2**20
# Errors that higher limits may cure.
_MAY_BE_LIMITS = {"VideoLimitError", "DamagedVideoError"}


class VideoLimitError(VideoError):
    """The video took too long or too much memory, or crashed the decoder."""


class GuardedLoader:
    """Loads videos one after another in a process of its own, under limits.

    The process starts with the first video and is replaced when it is lost. A loader is for one
    thread at a time. It may be pickled or forked into data workers: each starts its own process.
    """

    def __init__(self, time_limit_s: float = 60.0, memory_limit_bytes: int = 2 * 2**30):
        """Set the limits.

        Args:
            time_limit_s: Seconds of wall-clock time for one video.
            memory_limit_bytes: Memory of the worker process beyond what it takes when idle; the
                clips themselves count too. Only Linux can hold this limit. Leave room: some
                decoders, H.264's for one, take a refusal for damage and say so.
        """
        if not (time_limit_s > 0 and memory_limit_bytes > 0):
            raise ValueError(
                f"limits must be positive, not {time_limit_s} s and {memory_limit_bytes} bytes"
            )
        self.time_limit_s = time_limit_s
        self.memory_limit_bytes = memory_limit_bytes
        self._worker: Worker | None = None
        self._is_closed = False
        self._lock = threading.Lock()  # `close` may come from another thread

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.time_limit_s, self.memory_limit_bytes)

    def __enter__(self) -> "GuardedLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, at once even if it is busy."""
        with self._lock:
            self._is_closed = True
            if self._worker is not None:
                self._worker.end()

    def load(
        self, source: str | Path | bytes, sampling: ClipSampling | None = None, **options: Any
    ) -> VideoClips:
        """`load_clips` under the limits; takes the same arguments.

        Raises:
            VideoError: as `load_clips`, with the same messages.
            VideoLimitError: too long, too much memory, or the decoder crashed.
        """
        return self.run(load_clips, source, sampling, **options)

    def run(
        self,
        function: Callable[Concatenate[Source, Arguments], Result],
        source: Source,
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Call `function(source, ...)` under the limits; it must be importable by name.

        Raises:
            VideoLimitError: too long, too much memory, or the process crashed.
            Exception: whatever the function raises.
        """
        worker = self._running_worker()
        name = name_of(source)
        try:
            reply = worker.ask((function, source, args, kwargs), self.time_limit_s)
        except TimeoutError:
            raise VideoLimitError(
                f"{name} took longer than {self.time_limit_s:g} s and was given up; leave it out, "
                "or raise time_limit_s if it is fine but large"
            ) from None
        except EOFError:
            raise VideoLimitError(
                f"{name} crashed the decoder ({worker.cause_of_death()}); leave it out, or convert "
                "it with another program"
            ) from None
        for record in reply.log:
            if logging.getLogger(record.name).isEnabledFor(record.levelno):
                logging.getLogger(record.name).handle(record)
        if isinstance(reply.error, MemoryError):
            worker.end()  # whatever is left over in there, the next video starts afresh
            raise VideoLimitError(
                f"{name} needs more than {self.memory_limit_bytes / _MEBIBYTE:g} MiB of memory; "
                "leave it out, ask for fewer or smaller frames, or raise memory_limit_bytes"
            )
        if reply.error is not None:
            raise reply.error
        return reply.result

    def _running_worker(self) -> "Worker":
        with self._lock:
            if self._is_closed:
                raise ValueError("the loader is closed; make a new one")
            if self._worker is None or not self._worker.is_alive():
                self._worker = Worker(self.time_limit_s, self.memory_limit_bytes)
            return self._worker


# ---- many files ----------------------------------------------------------------------------------


def load_many(
    sources: Iterable[str | Path],
    sampling: ClipSampling | None = None,
    *,
    num_workers: int = 2,
    time_limit_s: float = 60.0,
    memory_limit_bytes: int = 2 * 2**30,
    quarantine: str | Path | None = None,
    **options: Any,
) -> "ClipStream":
    """Load many videos in several processes: each good one once, in the order given.

    A bad one is logged, counted, written to the quarantine list and left out; nothing takes its
    place. The workers run ahead of the reader by at most two videos each. In a torch
    `IterableDataset`, give each data worker its share, `paths[worker.id :: worker.num_workers]`.

    Args:
        sources: Paths; they are read as they are needed.
        sampling: How to choose the clips, as for `load_clips`.
        num_workers: Processes.
        time_limit_s: Seconds of wall-clock time for one video.
        memory_limit_bytes: Memory of each process beyond what it takes when idle; Linux only.
        quarantine: A file of JSON lines `{"file", "error", "reason", "spent_s", ...}` to add the
            bad ones to. Those that are in it already are skipped, unless the file has changed since
            or a limit that it exceeded is higher now.
        options: Further arguments of `load_clips`; `num_threads` is 1 unless given.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    loaders = [GuardedLoader(time_limit_s, memory_limit_bytes) for _ in range(num_workers)]
    load = functools.partial(_try_to_load, sampling=sampling, options={"num_threads": 1, **options})
    return ClipStream(sources, loaders, load, Quarantine(quarantine, loaders[0]))


class _Attempt(NamedTuple):
    """One file's clips, or why there are none."""

    source: str | Path
    clips: VideoClips | None
    error: VideoError | None
    spent_s: float


def _try_to_load(
    loader: GuardedLoader,
    source: str | Path,
    sampling: ClipSampling | None,
    options: dict[str, Any],
) -> _Attempt:
    start_s = time.monotonic()
    clips = error = None
    try:
        clips = loader.load(source, sampling, **options)
    except VideoError as reason:
        error = reason
    return _Attempt(source, clips, error, time.monotonic() - start_s)


class ClipStream(Iterator[tuple[str | Path, VideoClips]]):
    """Yields sources and their clips; made by `load_many`.

    Attributes:
        num_good: Videos yielded so far.
        num_bad: Videos found bad so far.
        num_known_bad: Videos skipped so far because they were in the quarantine list before.
    """

    def __init__(
        self,
        sources: Iterable[str | Path],
        loaders: list[GuardedLoader],
        load: Callable[[GuardedLoader, str | Path], _Attempt],
        quarantine: "Quarantine",
    ):
        self.num_good = self.num_bad = self.num_known_bad = 0
        self._quarantine = quarantine
        self._stream = self._yield_good(self._attempts(sources, loaders, load))

    def __next__(self) -> tuple[str | Path, VideoClips]:
        return next(self._stream)

    def close(self) -> None:
        """End the processes; only needed if the stream is not read to its end."""
        self._stream.close()

    def _yield_good(
        self, attempts: Generator[_Attempt, None, None]
    ) -> Generator[tuple[str | Path, VideoClips], None, None]:
        with closing(attempts):
            for source, clips, error, spent_s in attempts:
                if error is not None:
                    self.num_bad += 1
                    self._quarantine.add(source, error, spent_s)
                elif clips is not None:
                    self.num_good += 1
                    yield source, clips
        logger.info(
            "%d good, %d bad, %d known to be bad: listed in %s",
            self.num_good,
            self.num_bad,
            self.num_known_bad,
            self._quarantine.path or "the log",
        )

    def _attempts(
        self,
        sources: Iterable[str | Path],
        loaders: list[GuardedLoader],
        load: Callable[[GuardedLoader, str | Path], _Attempt],
    ) -> Generator[_Attempt, None, None]:
        """Load in threads that each drive one process; results in order."""
        idle: queue.SimpleQueue[GuardedLoader] = queue.SimpleQueue()
        for loader in loaders:
            idle.put(loader)

        def load_in_thread(source: str | Path) -> _Attempt:
            loader = idle.get()
            try:
                return load(loader, source)
            finally:
                idle.put(loader)

        unknown = (source for source in sources if not self._is_known_bad(source))
        pool = ThreadPoolExecutor(len(loaders), thread_name_prefix="load_many")
        waiting: deque[Future[_Attempt]] = deque()
        try:
            while True:
                for source in itertools.islice(unknown, 2 * len(loaders) - len(waiting)):
                    waiting.append(pool.submit(load_in_thread, source))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for loader in loaders:
                loader.close()
            pool.shutdown()

    def _is_known_bad(self, source: str | Path) -> bool:
        is_known = self._quarantine.has(source)
        self.num_known_bad += is_known
        return is_known


class Quarantine:
    """The list of files found bad: JSON lines, one per file and finding; the last one counts."""

    def __init__(self, path: str | Path | None, limits: GuardedLoader):
        """Read the list, if there is one.

        Args:
            path: Of the list; None to only log what is bad.
            limits: The loader whose limits hold.

        Raises:
            ValueError: a line is not of such a list.
        """
        self.path = None if path is None else Path(path)
        self._limits = {
            "time_limit_s": limits.time_limit_s,
            "memory_limit_bytes": limits.memory_limit_bytes,
        }
        self._rows: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            for number, row in enumerate(read_jsonl(self.path), start=1):
                if not isinstance(row.get("file"), str):
                    raise ValueError(
                        f"{self.path}: record {number} is not of a quarantine list; "
                        "take it out or give another file"
                    )
                self._rows[row["file"]] = row

    def has(self, source: str | Path) -> bool:
        """Whether a file is listed and there is no reason to try it again; then say so."""
        row = self._rows.get(os.path.abspath(source))
        if row is None or _stamp(source) != {key: row.get(key) for key in ("size", "mtime_ns")}:
            return False
        if row["error"] in _MAY_BE_LIMITS and any(
            limit > row.get(name, 0) for name, limit in self._limits.items()
        ):
            return False
        logger.warning("%s is skipped: %s lists it (%s)", source, self.path, row["reason"])
        return True

    def add(self, source: str | Path, error: VideoError, spent_s: float) -> None:
        """List a file, and log why."""
        name = os.path.abspath(source)
        row = {
            "file": name,
            "error": type(error).__name__,
            "reason": str(error),
            "spent_s": round(spent_s, 3),
            **_stamp(source),
            **self._limits,
        }
        logger.warning("bad video: %s", error)
        if self.path is not None:
            self._rows[name] = row
            append_jsonl(self.path, row)


def _stamp(path: str | Path) -> dict[str, int | None]:
    """What changes when a file does; nothing for a file that is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return {"size": None, "mtime_ns": None}
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
