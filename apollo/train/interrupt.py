"""Being stopped: SIGTERM and Ctrl-C end a run after its step, and one folder has one writer.

Schedulers send SIGTERM before they take a machine away. The loop then finishes the step, saves, and
exits with the code that a shell gives such a process (143, and 130 for Ctrl-C), so that a script
can tell it from a failure. Read next: `trainer.py`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers a SIGTERM or SIGINT instead of dying of it; a context manager.

    Outside of the main thread signals cannot be caught, and nothing is done.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._answered = False

    def __enter__(self) -> Self:
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal and not self._answered and kind is None:
            os.kill(os.getpid(), self.signal)  # it came after the last step: now it may act

    def votes(self) -> list[float]:
        """Say as numbers, to be summed over processes, which signals this one has received."""
        return [float(self.signal == number) for number in SIGNALS]

    def exit_code(self, votes: list[float]) -> int | None:
        """Give the exit code that the summed votes ask for, or None to go on."""
        for number, count in zip(SIGNALS, votes, strict=True):
            if count:
                self._answered = True
                return 128 + number
        return None

    def _remember(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a fork: this is for the loop to answer
        if self.signal is None:
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the step and saving (Ctrl-\\ stops now)\n".encode())
        self.signal = number


def leave_signals_to_parent(_: int) -> None:
    """Let a process that loads batches outlive signals to all: Ctrl-C, `timeout`, Slurm, `pkill`.

    A loop whose loader dies cannot finish its step. torch ends the loader with its parent, and when
    that sends it SIGTERM. On macOS only signals to the whole process group are kept from it.
    """
    os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def only_writer(run_dir: Path, enabled: bool) -> Iterator[None]:
    """Hold the lock of a run directory; the kernel frees it when the process dies.

    Args:
        run_dir: Folder of the run.
        enabled: Whether this process writes at all; only the main one does.

    Raises:
        ValueError: Another process is training into this folder.
    """
    if not enabled:
        yield
        return
    with (run_dir / ".lock").open("a+") as file:
        try:
            # A record lock: unlike flock's, the loaders of a killed run do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"{run_dir} is being trained into by process {file.read().strip() or 'unknown'}; "
                "wait for it, stop it, or choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
