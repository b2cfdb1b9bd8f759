"""A process that runs functions on videos, one after another, and may hang or die doing so.

`Worker` is that process as its parent sees it, `serve` is its life. Requests and replies are
pickles that go through its standard input and output, arrays as they are. It holds no more than its
limit of memory, ends when its parent does, and is killed when it is late. apollo/video/guard.py
turns what can happen here into typed errors.

Not multiprocessing or the library pebble, which builds on it: data workers are daemonic and may
have no such children, and a spawned child imports the user's main script, torch and all; ours
starts in a fifth of a second.
"""

import errno
import json
import logging
import logging.handlers
import os
import pickle
import queue
import re
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apollo.video.files import VideoError

# What starts the worker process: with our import path but, unlike multiprocessing, not our script.
_BOOT = (
    "import json, sys; sys.path[:], *limits = json.loads(sys.argv[1]); "
    "from apollo.video import worker; worker.serve(*limits)"
)
_START_LIMIT_S = 300.0  # imports from a busy network disk may take minutes
_GRACE_S = 5.0  # the worker's own alarm rings this much later, for when nobody watches any more


class Reply(NamedTuple):
    """What comes back from the worker process."""

    result: Any
    error: Exception | None
    log: list[logging.LogRecord]


class Worker:
    """The process, as seen from this one."""

    def __init__(self, time_limit_s: float, memory_limit_bytes: int):
        limits = json.dumps([sys.path, time_limit_s, memory_limit_bytes])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            stderr=subprocess.DEVNULL,  # FFmpeg's codecs chatter
            start_new_session=True,  # Ctrl-C is for us; a worker that it killed would look crashed
        )
        self._owner_pid = os.getpid()
        try:
            self.ask(None, _START_LIMIT_S)
        except (EOFError, TimeoutError) as error:
            raise RuntimeError(
                "the process that decodes videos does not start; "
                f'see why with: {sys.executable} -c "import apollo.video.guard"'
            ) from error

    def is_alive(self) -> bool:
        """Whether it can be asked; a process that was forked off us must not ask ours."""
        return self._owner_pid == os.getpid() and self._process.poll() is None

    def ask(self, request: Any, limit_s: float) -> Reply:
        """Send a request and wait for the reply; if that fails in any way the process is ended.

        Raises:
            TimeoutError: no reply within the limit.
            EOFError: the process died.
        """
        requests, replies = self._process.stdin, self._process.stdout
        assert isinstance(requests, FileIO) and isinstance(replies, FileIO)
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()  # and so the pipe ends, at which we wait

        timer = threading.Timer(limit_s, give_up)
        timer.daemon = True
        timer.start()
        reply = None
        try:
            _send(requests, request)
            reply = _receive(replies)
        except (EOFError, BrokenPipeError) as error:
            self._process.wait()
            if is_late.is_set() or _signal_name(self._process.returncode) == "SIGALRM":
                raise TimeoutError from error
            raise EOFError from error
        finally:
            timer.cancel()
            timer.join()
            if reply is None or is_late.is_set():
                self.end()
        return reply

    def cause_of_death(self) -> str:
        """How a process that died did so."""
        code = self._process.returncode
        if _signal_name(code) == "SIGKILL":
            return "killed from outside, probably because the machine ran out of memory"
        return _signal_name(code) or f"it exited with code {code}"

    def end(self) -> None:
        """Kill the process and leave nothing of it."""
        if self._owner_pid == os.getpid():
            self._process.kill()
            self._process.wait()


def name_of(source: Any) -> str:
    """How messages call a video: by its path, or by how many bytes were given."""
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)


def _signal_name(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else ""


def serve(time_limit_s: float, memory_limit_bytes: int) -> None:
    """Answer requests until the other end closes: the whole life of the worker process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a run, it is for the owner
    requests = open(os.dup(0), "rb", buffering=0)
    replies = open(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what native code prints must not fall among the replies
    log: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger("apollo").addHandler(logging.handlers.QueueHandler(log))
    _limit_memory(memory_limit_bytes)
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        with _alarm(time_limit_s + _GRACE_S):
            result, error = _call(*request) if request else (None, None)
        records = [log.get() for _ in range(log.qsize())]
        _send(replies, Reply(result, error, records))
        del request, result, error  # or they would take memory from the next video


def _call(
    function: Callable[..., Any], source: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Exception | None]:
    """The function's result, or its error in a form that can be sent."""
    try:
        return function(source, *args, **kwargs), None
    except Exception as error:  # all of them are raised again at the other end
        if _lacks_memory(error):
            return None, MemoryError()
        if isinstance(error, VideoError):
            return None, error
        trace = f"in the process that loaded {name_of(source)}:\n{traceback.format_exc()}"
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # classes with arguments of their own fail in any way they like
            return None, RuntimeError(trace)
        error.add_note(trace)
        return None, error


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error or one that led to it comes from a refused request for memory."""
    while error is not None:
        # Code that does not expect it raises SystemError, and a thread needs memory for its stack.
        if (
            isinstance(error, MemoryError | SystemError)
            or getattr(error, "errno", None) == errno.ENOMEM
            or "can't start new thread" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _limit_memory(num_bytes: int) -> None:
    """Refuse this process more than `num_bytes` beyond what it has now.

    RLIMIT_DATA counts memory that was asked for and is private and writable, touched or not; unlike
    RLIMIT_AS it leaves out libraries and address space that is only reserved.
    """
    if sys.platform != "linux":
        return
    import resource

    (idle_kib,) = re.findall(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = 1024 * int(idle_kib) + num_bytes
    resource.setrlimit(
        resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


@contextmanager
def _alarm(limit_s: float) -> Iterator[None]:
    """End this process after `limit_s`, by the system and thus also inside native code.

    The parent is faster, if it is still there.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _send(file: FileIO, message: Any) -> None:
    """Write a message: how long its parts are, its pickle, then its arrays as they are."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(pickled), *(array.raw() for array in arrays)]
    sizes = struct.pack(f"<Q{len(parts)}Q", len(parts), *(part.nbytes for part in parts))
    for part in (memoryview(sizes), *parts):
        while part:
            part = part[file.write(part) :]


def _receive(file: FileIO) -> Any:
    """Read what `_send` wrote; EOFError if the other end is closed."""
    (num_parts,) = struct.unpack("<Q", _read(file, 8))
    sizes = struct.unpack(f"<{num_parts}Q", _read(file, 8 * num_parts))
    pickled, *arrays = [_read(file, size) for size in sizes]
    return pickle.loads(pickled, buffers=arrays)


def _read(file: FileIO, size: int) -> memoryview:
    read = rest = np.empty(size, dtype=np.uint8).data  # a bytearray would be zeroed first
    while rest:
        num_bytes = file.readinto(rest)
        if not num_bytes:
            raise EOFError
        rest = rest[num_bytes:]
    return read
