"""Run the points of a study that are not finished: in this process, in several, on Ray, on Slurm.

Whatever executor is chosen, each worker does the same: take the points in order, leave out those
in the ledger, claim one, look into the ledger again, measure, write its line. So workers may be
started and killed at any time, on one machine or many, and none repeats what another has done. A
point that fails is told and left for the next call; the others go on. What two studies have in
common is run once. Free of torch until a point is measured.
Read next: `ledger.py`; `training.py`, which measures.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from apollo.lab.ledger import Ledger, Line, claimed
from apollo.lab.spec import Point, Scale, Study
from apollo.runtime import environment


class Measure(Protocol):
    """What a study's `measure` module has."""

    @staticmethod
    def identity(study: Study, point: Point) -> str:
        """Hash of all that the numbers depend on."""

    @staticmethod
    def run(study: Study, point: Point, folder: Path) -> Mapping[str, Any]:
        """Measure a point, with what it wants to write in a folder that may hold earlier tries.

        Returns:
            "metrics", name -> number, and whatever else its line shall have; "seconds" where an
            earlier try's count too.
        """


@dataclass(frozen=True)
class Work:
    """What workers are told.

    Attributes:
        source: Where the study is: a name of `STUDIES`, or "file.py:function"; see `find_study`.
        scale: "micro" or "paper".
        out_dir: Receives ledgers/, claims/ and points/.
        num_workers: Processes; of Slurm, tasks.
        keep: Keep the folder of a finished point, its weights included.
    """

    source: str
    scale: Scale
    out_dir: Path
    num_workers: int = 1
    keep: bool = False


def find_study(source: str, scale: Scale) -> Study:
    """Get a study by its name, or a user's own by file and function.

    Args:
        source: A key of `studies.STUDIES`, or "my_study.py:function"; the function takes no
            argument and returns a Study.
        scale: Which of the scales; of no effect on a user's own.

    Raises:
        ValueError: There is none.
    """
    path, colon, function = source.rpartition(":")
    if not colon:
        from apollo.lab.studies import STUDIES

        if source not in STUDIES:
            raise ValueError(
                f"no study {source!r}; there are: {', '.join(STUDIES)}; your own is "
                "FILE.py:FUNCTION"
            )
        return STUDIES[source](scale)
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    if specification is None or specification.loader is None or not Path(path).is_file():
        raise ValueError(f"there is no Python file {path}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    study = getattr(module, function, lambda: None)()
    if not isinstance(study, Study):
        raise ValueError(f"{source} must be a function that returns a Study")
    return study


def measure_of(study: Study) -> Measure:
    """The module that measures a study's points."""
    module: Any = importlib.import_module(study.measure)
    return module


def ledger_of(study: Study, out_dir: Path) -> Ledger:
    """The ledger of a study in the lab's folder."""
    return Ledger(out_dir / "ledgers", study.name, study.scale)


def points_of(study: Study, measure: Measure) -> dict[str, Point]:
    """Identity -> point.

    Raises:
        ValueError: Two points of the study are the same training.
    """
    points: dict[str, Point] = {}
    for point in study.points():
        other = points.setdefault(measure.identity(study, point), point)
        if other is not point:
            raise ValueError(
                f"study {study.name}: {other.label} and {point.label} are the same training; do "
                "their levels change anything?"
            )
    return points


def finished_lines(study: Study, folder: Path) -> list[Line]:
    """The ledger's lines of the study's points, as they are set now; of others it is told.

    Args:
        study: Which.
        folder: Where ledgers lie.
    """
    ledger = Ledger(folder, study.name, study.scale)
    lines = ledger.read()
    now = points_of(study, measure_of(study)) if lines else {}
    others = sum(line["hash"] not in now for line in lines)
    if others:
        print(
            f"{ledger.path}: {others} of {len(lines)} lines do not count: they are of no point of "
            "the study, or of other settings than it has now",
            file=sys.stderr,
        )
    return [line for line in lines if line["hash"] in now]


def work_through(work: Work) -> int:
    """Measure whatever is neither finished nor claimed by another, until nothing is left to do.

    Returns:
        How many points failed.
    """
    study = find_study(work.source, work.scale)
    measure, ledger = measure_of(study), ledger_of(study, work.out_dir)
    num_failed = 0
    for identity, point in points_of(study, measure).items():
        if identity in {line["hash"] for line in ledger.read()}:
            continue
        with claimed(work.out_dir / "claims", identity) as is_mine:
            # Once more: another may have finished it just before it was claimed.
            if not is_mine or identity in {line["hash"] for line in ledger.read()}:
                continue
            if same := _of_another_study(ledger, identity):
                ledger.append({**same, "study": study.name, "levels": dict(point.levels)})
                print(f"{study.name}: {point.label}: as in {same['study']}", flush=True)
                continue
            folder = work.out_dir / "points" / identity[:16]
            try:
                started = time.monotonic()
                measured = measure.run(study, point, folder)
            except (ValueError, OSError, RuntimeError) as error:
                num_failed += 1
                _tell_failure(study, point, error, folder)
                continue
            seconds = round(time.monotonic() - started, 2)
            ledger.append(_line(study, point, identity, measured, seconds))
            if not work.keep:
                shutil.rmtree(folder, ignore_errors=True)
            shown = ", ".join(
                f"{k} {v:.1f}" for k, v in measured["metrics"].items() if "/" not in k
            )
            print(f"{study.name}: {point.label}: {shown} ({seconds:.0f} s)", flush=True)
    return num_failed


def _of_another_study(ledger: Ledger, identity: str) -> Line | None:
    """The line of the same configuration in the ledger of another study, if there is one."""
    for path in sorted(ledger.path.parent.glob(f"*.{ledger.scale}.jsonl")):
        study = path.name.removesuffix(f".{ledger.scale}.jsonl")
        for line in Ledger(path.parent, study, ledger.scale).read():
            if line["hash"] == identity:
                return line
    return None


def _line(
    study: Study, point: Point, identity: str, measured: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "study": study.name,
        "scale": study.scale,
        "hash": identity,
        "levels": dict(point.levels),
        "seed": point.seed,
        "seconds": seconds,
        **measured,
        "environment": environment(),
    }


def _tell_failure(study: Study, point: Point, error: Exception, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    reason = " ".join(str(error).split())
    print(f"{study.name}: {point.label}: failed: {reason} ({folder}/error.txt)", file=sys.stderr)


# ---- executors


def run_here(work: Work) -> int:
    """One point after the other in this process."""
    return work_through(work)


def run_processes(work: Work) -> int:
    """Several processes on this machine."""
    commands = [_worker_command(work) for _ in range(work.num_workers)]
    # Threads would fight over the cores that the processes share.
    threads = str(max(1, (os.cpu_count() or 1) // work.num_workers))
    started = [
        subprocess.Popen(command, env={"OMP_NUM_THREADS": threads, **os.environ})
        for command in commands
    ]
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    return sum(code != 0 for code in codes)


def run_ray(work: Work) -> int:
    """Ray tasks, on this machine or the cluster that RAY_ADDRESS names; needs the ray extra."""
    try:
        import ray
    except ImportError:
        raise ValueError("--executor ray takes Ray: pip install 'apollo-lmm[ray]'") from None
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        log_to_driver=True,
        num_cpus=None if os.environ.get("RAY_ADDRESS") else work.num_workers,
        runtime_env={"env_vars": paths},
    )
    try:
        task = ray.remote(max_retries=0)(work_through)
        return sum(ray.get([task.remote(work) for _ in range(work.num_workers)]))
    finally:
        ray.shutdown()


SLURM = """#!/bin/bash
# Workers of one study; each takes the next point that nobody has claimed. The folder must lie on a
# disk that all nodes share. What is killed is taken up by submitting this again.
#SBATCH --job-name=apollo-{name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output={out_dir}/slurm-%A_%a.out
set -euo pipefail
cd {here}
exec {command}
"""


def run_slurm(work: Work) -> int:
    """Write a job script for Slurm, to be submitted by sbatch; starts nothing itself."""
    study = find_study(work.source, work.scale)
    path = work.out_dir / f"{study.name}.{study.scale}.slurm"
    work.out_dir.mkdir(parents=True, exist_ok=True)
    script = SLURM.format(
        name=study.name,
        last=work.num_workers - 1,
        out_dir=work.out_dir,
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join(_worker_command(work)),
    )
    path.write_text(script, encoding="utf-8")
    print(f"sbatch {path}")
    return 0


def _worker_command(work: Work) -> list[str]:
    """What a worker of its own runs."""
    command = ["study", "run", work.source, "--scale", work.scale, "--out", str(work.out_dir)]
    return [sys.executable, "-m", "apollo", *command, *(["--keep"] if work.keep else [])]


EXECUTORS: dict[str, Callable[[Work], int]] = {
    "here": run_here,
    "processes": run_processes,
    "ray": run_ray,
    "slurm": run_slurm,
}
"""Name on the command line -> what runs the workers; returns 0 if no point failed."""
