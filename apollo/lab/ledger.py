"""The ledger of a study and the claims on its points: what is finished, and who is at work.

Here because a study takes hours, is killed, and is run by several workers at once, and none of that
may cost a finished point or run one twice. A line of the ledger is written in one piece, under a
lock, when its point is finished, and never changed. A claim is a lock of the kernel on a file: it
ends with the process that holds it, however that dies, so a file that is left behind claims
nothing. On a disk that several machines share this holds as far as the disk's locks do. Free of
torch. Next: `runner.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apollo.runtime import append_jsonl

Line = dict[str, Any]
"""Of one finished point: `study`, `scale`, `hash`, `levels`, `seed`, `metrics`, `seconds`,
`config`, `inputs`, `environment`."""
FIELDS = ("study", "scale", "hash", "levels", "seed", "metrics", "seconds")
"""What every line must have."""


class Ledger:
    """The finished points of one study at one scale, in a JSON-lines file.

    Attributes:
        path: The file; it need not be there yet.
        scale: Of its points.
    """

    def __init__(self, folder: str | Path, study: str, scale: str) -> None:
        self.path, self.scale = Path(folder) / f"{study}.{scale}.jsonl", scale

    def read(self) -> list[Line]:
        """The lines, each point once; one that a kill cut off does not count.

        Raises:
            ValueError: A line is no line of a ledger.
        """
        if not self.path.exists():
            return []
        by_hash: dict[str, Line] = {}
        # Without its newline the last line is not finished, even if it is whole: the next writer
        # will cut it off.
        whole = self.path.read_bytes().split(b"\n")[:-1]
        for number, text in enumerate(whole, start=1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number} is no line of a ledger: {error}") from None
            if missing := [name for name in FIELDS if name not in line]:
                raise ValueError(f"{self.path}:{number} has no {', '.join(missing)}")
            by_hash.setdefault(line["hash"], line)
        return list(by_hash.values())

    def append(self, line: Mapping[str, Any]) -> None:
        """Add the line of a finished point, on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the ledger: closing any handle of a file frees the record locks on it.
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            append_jsonl(self.path, dict(line))
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def claimed(folder: str | Path, identity: str) -> Iterator[bool]:
    """Claim a point for this process while the block runs; yields whether it got it.

    Args:
        folder: Where the claims of all workers lie.
        identity: The point's hash.
    """
    path = Path(folder) / f"{identity}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            # A record lock: unlike flock's, processes that this one starts do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield True
