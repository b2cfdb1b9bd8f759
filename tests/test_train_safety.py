"""Runs that are killed, stopped, starved of disk or memory: what is left, and how they go on."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import TwoPartModel, rows, same, train, weights

from apollo.runtime import append_jsonl
from apollo.train import checkpoint as checkpoint_module
from apollo.train import log as log_module
from apollo.train.checkpoint import NotSavedError, latest_checkpoint, list_checkpoints
from apollo.train.curves import read_log
from apollo.train.interrupt import only_writer
from apollo.train.trainer import DivergedError, TooLittleMemoryError

HERE = Path(__file__).parent
KILLED_RUN = dict(steps=24, save_every=2, log_every=3, gradient_accumulation=2, resume=True)
CHILDREN = multiprocessing.get_context("forkserver")  # clean processes, one import for all of them


@pytest.fixture(scope="module", autouse=True)
def server():
    """Start the server of the children; it looks for what it loads beforehand in PYTHONPATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE, HERE.parent))))
        CHILDREN.set_forkserver_preload(["tiny_training", "matplotlib.figure"])
        forkserver.ensure_running()


def train_quietly(run_dir: Path, **settings) -> None:
    """What a child process runs."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train(run_dir, **settings)


def exact(run_dir: Path) -> list[dict]:
    """The log without what the clock and the machine decide."""
    names = ("stage", "step", "loss", "learning_rates", "grad_norm", "items")
    return [{name: line[name] for name in names} for line in read_log(run_dir)]


def kill_after(process, run_dir: Path, pattern: str, times: int, pause_s: float) -> bool:
    """Kill the process a moment after a file like `pattern` has come up so often."""
    seen: set[Path] = set()
    while process.is_alive() and len(seen) < times:
        seen.update(run_dir.glob(pattern))
        time.sleep(0.0005)
    time.sleep(pause_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path):
    straight = train(tmp_path / "straight", **KILLED_RUN)
    moments = random.Random(0)
    killed_run, num_kills = tmp_path / "killed", 0
    for pattern in (".writing-*", "stage*", ".removing-*", ".writing-*/optimizer.pt", ".writing-*"):
        process = CHILDREN.Process(target=train_quietly, args=[killed_run], kwargs=KILLED_RUN)
        process.start()
        moment = moments.randint(1, 2), moments.choice([0, 0.001, 0.01, 0.03])
        num_kills += kill_after(process, killed_run, f"checkpoints/{pattern}", *moment)
        for checkpoint in list_checkpoints(killed_run):  # what has a name is whole
            checkpoint.load_weights(TwoPartModel())
    assert num_kills >= 3  # else it was too fast for this test to mean anything
    resumed = train(killed_run, **KILLED_RUN)
    assert same(weights(straight), weights(resumed))
    assert exact(killed_run) == exact(tmp_path / "straight")
    rubble = {path.name for path in (killed_run / "checkpoints").glob(".*")}
    assert not rubble and len(list_checkpoints(killed_run)) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step(tmp_path, capfd, number, code):
    def batch_at(i: int):
        if i == 2:
            os.kill(os.getpid(), number)
        return rows(i * 4, 4)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped", batch_at=batch_at, log_every=4)
    assert stopped.value.code == code
    assert signal.getsignal(number) == before
    assert latest_checkpoint(tmp_path / "stopped").state.step == 3
    said = capfd.readouterr().err.replace("\n", "")
    assert "finishing the step" in said and "--resume --out" in said
    resumed = train(tmp_path / "stopped", resume=True, log_every=4)
    assert same(weights(train(tmp_path / "straight", log_every=4)), weights(resumed))
    assert exact(tmp_path / "stopped") == exact(tmp_path / "straight")


def train_in_a_group(run_dir: Path, number: int) -> None:
    """What a child process runs: its loader signals the whole process group, and itself."""

    def batch_at(i: int):
        if i == 2:
            os.killpg(os.getpgid(os.getppid()), number)
            os.kill(os.getpid(), number)
        return rows(i * 4, 4)

    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    train(run_dir, batch_at=batch_at, steps=40, num_workers=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_ends_the_run_after_its_step(tmp_path, number):
    child = CHILDREN.Process(target=train_in_a_group, args=(tmp_path / "stopped", number))
    child.start()
    child.join(60)
    assert child.exitcode == 128 + number
    assert latest_checkpoint(tmp_path / "stopped").state.step < 40
    resumed = train(tmp_path / "stopped", steps=40, resume=True)
    assert same(weights(train(tmp_path / "straight", steps=40)), weights(resumed))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save_once(value, path, save=torch.save):
        full() if "step000002" in str(path) else save(value, path)

    monkeypatch.setattr(checkpoint_module.torch, "save", save_once)
    with pytest.raises(NotSavedError, match="step000002.*No space.*GiB are free.*step000001"):
        train(tmp_path, save_every=1)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["stage0-step000001"]
    monkeypatch.undo()

    def append_once(path, *lines):
        full() if lines[0]["step"] == 4 else append_jsonl(path, *lines)

    monkeypatch.setattr(log_module, "append_jsonl", append_once)
    with pytest.raises(NotSavedError, match="cannot write log.jsonl .*No space.*step000003"):
        train(tmp_path, save_every=1, resume=True)
    monkeypatch.undo()
    resumed = train(tmp_path, save_every=1, resume=True)
    assert same(weights(train(tmp_path / "straight")), weights(resumed))


def test_a_real_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs rights")
    try:
        with pytest.raises(NotSavedError, match="cannot write checkpoint"):
            train(tmp_path, steps=6, save_every=1, keep_checkpoints=6)
        kept = list_checkpoints(tmp_path)
        assert kept and not list((tmp_path / "checkpoints").glob(".*"))
        kept[-1].load_weights(TwoPartModel())
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_too_little_memory_says_what_to_lower(tmp_path, kind):
    def batch_at(i: int):
        if i == 3 and kind == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return rows(4 * i, 4) | ({"labels": torch.empty(2**50)} if i == 3 else {})

    words = "stage tiny, step 3 ran out of memory.*gradient_checkpointing.*stage0-step000003"
    with pytest.raises(TooLittleMemoryError, match=words):
        train(tmp_path, batch_at=batch_at, save_every=1)


def test_a_killed_loader_is_lack_of_memory(tmp_path):
    """What the kernel does when memory is short: it kills a process that loads batches."""

    def batch_at(i: int):
        if i == 5 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(4 * i, 4)

    with pytest.raises(TooLittleMemoryError, match=r"killed by signal: Killed.*loop\.num_workers"):
        train(tmp_path, batch_at=batch_at, num_workers=1)


def test_a_diverged_step_names_its_records(tmp_path):
    class Batches:
        def __call__(self, i: int):
            return rows(4 * i, 4)

        def records(self, i: int):
            return [SimpleNamespace(where=f"a.jsonl:{i}")]

    class Broken(TwoPartModel):
        def forward(self, **batch):
            output = super().forward(**batch)
            output.loss = output.loss / (batch["input_ids"][0, 0] != rows(12, 1)["input_ids"][0, 0])
            return output

    with pytest.raises(DivergedError, match=r"step 1.*rates.*a\.jsonl:2, a\.jsonl:3\).*no check"):
        train(tmp_path, model=Broken(), batch_at=Batches(), gradient_accumulation=2)


def hold(run_dir: Path, held, release) -> None:
    with only_writer(run_dir, enabled=True):
        held.set()
        release.wait()


def test_a_folder_has_one_writer(tmp_path):
    held, release = CHILDREN.Event(), CHILDREN.Event()
    holder = CHILDREN.Process(target=hold, args=[tmp_path, held, release])
    holder.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match=f"is being trained into by process {holder.pid} on"):
        train(tmp_path, steps=1)
    holder.kill()
    holder.join()
    train(tmp_path, steps=1)


def test_a_checkpoint_goes_on_with_another_accumulation(tmp_path):
    """As with another number of processes: the position of the data follows from the step."""
    seen: list[int] = []

    def batch_at(i: int):
        seen.append(i)
        return rows(0, 4)

    train(tmp_path, steps=2, gradient_accumulation=2, batch_at=batch_at)
    train(tmp_path, steps=4, gradient_accumulation=3, batch_at=batch_at, resume=True)
    assert seen == [0, 1, 2, 3, *range(6, 12)]
