"""The machine a run happens on: device, processes, seeds, threads, memory, files, progress.

Small helpers that training, evaluation and the world share. torch is imported inside the functions
that need it, so that torch-free commands may use the rest.
"""

import ctypes
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import random
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

# glibc's names for what mallopt sets (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def pick_device() -> "torch.device":
    """The fastest device there is: CUDA, then Apple's MPS, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; each takes a GPU of its own.

    For work that is shared out beforehand: the processes only wait for each other (`wait_for_all`),
    which gloo can do on any machine. Training joins them by Accelerate (apollo/train/scale.py).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def rank_and_number() -> tuple[int, int]:
    """This process's number, from 0, and how many there are: (0, 1) unless they were joined."""
    if "torch" not in sys.modules:
        return 0, 1
    import torch.distributed as processes

    if not (processes.is_available() and processes.is_initialized()):
        return 0, 1
    return processes.get_rank(), processes.get_world_size()


def wait_for_all() -> None:
    """Wait until every joined process is here.

    Raises:
        ValueError: One of them has ended, so that the others would wait for ever.
    """
    if rank_and_number()[1] == 1:
        return
    import torch.distributed as processes

    try:
        processes.barrier()
    except RuntimeError as error:
        raise ValueError("another process of this run has stopped; see what it says") from error


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def num_available_cores() -> int:
    """Cores that this process may use: in a container often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory(keep: bool = True) -> bool:
    """Tell glibc to keep freed memory in the process instead of returning it to the system.

    By default every tensor above 32 MiB is a fresh mmap, whose pages the kernel zeroes one fault at
    a time, step after step. CPU training with large activations then spends up to a third of its
    time on page faults. The cost is that the process's memory never shrinks, so call it in
    training, not in a server. Nor in a process that loads data: where small things stay and large
    ones come and go, holes between them add up (17 GB for 1.5 GB of clips).

    Args:
        keep: False for glibc's defaults, in a process forked from one that keeps.

    Returns:
        Whether the C library took the settings: True with glibc, False elsewhere (nothing happens
        there).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = dict.fromkeys((_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD), 128 * 2**10)
    if keep:
        settings = {_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def make_run_dir(path: str | Path, resume: bool = False) -> Path:
    """Create a run's directory.

    Args:
        path: Where; parents are created too.
        resume: Go on in a directory that already holds a run.

    Raises:
        ValueError: the directory holds something and `resume` is not set, or it is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a directory for the run")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ValueError(
            f"{path} already holds files; continue that run with --resume or choose another --out"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def append_jsonl(path: str | Path, *records: dict[str, Any]) -> None:
    """Append records to a JSON-lines file, creating it and its directory if need be.

    If the last writer was killed within a line, that unfinished line is cut off first, so that the
    file stays readable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    )
    with path.open("ab+") as file:
        _cut_unfinished_line(file)
        file.write(lines.encode())


def _cut_unfinished_line(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    last_newline = file.read().rfind(b"\n")
    logger.warning(
        "%s ends within a line (its writer was stopped); cutting that line off", file.name
    )
    file.truncate(last_newline + 1)


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file in order.

    A last line without its newline is what a killed writer leaves: it is skipped with a warning if
    it does not parse.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object; names file and line.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    if not line.endswith("\n"):
                        logger.warning("%s: the last line is unfinished, skipping it", path)
                        return
                    raise ValueError(f"{path}:{number} is not valid JSON: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(
                        f"{path}:{number} must be a JSON object, not {line.strip():.60}"
                    )
                yield record
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: versions, hardware, time (UTC)."""
    from apollo import __version__

    packages = ("torch", "transformers", "accelerate", "av", "numpy", "pillow")
    return {
        "apollo": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cores": num_available_cores(),
        "gpu": _gpu_name(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def progress(
    items: Iterable[Item], description: str, total: int | None = None
) -> Generator[Item, None, None]:
    """Yield `items` while a bar on stderr shows how many are done and how long the rest takes.

    Args:
        items: What to go through.
        description: What is being done, shown before the bar.
        total: Number of items, if `items` has no length.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, Remaining(), console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total, description=description)
