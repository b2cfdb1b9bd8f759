"""Limits that hold in native code, processes that end, and lists of bad files that are right."""

import ctypes
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import NumberedVideo, write_numbered_video

from apollo.video import ClipSampling, VideoClips, VideoError, load_clips, worker
from apollo.video.guard import GuardedLoader, VideoLimitError, load_many

TWO_CLIPS = ClipSampling(max_clips=2)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this limit")


@pytest.fixture(scope="module")
def short_video(tmp_path_factory) -> NumberedVideo:
    return write_numbered_video(tmp_path_factory.mktemp("guard") / "short.mp4", range(60))


@pytest.fixture
def processes(monkeypatch) -> list[subprocess.Popen]:
    """Every worker process that the test starts."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(worker.subprocess, "Popen", Recorded)
    return started


@pytest.fixture(scope="module")
def loader():
    with GuardedLoader(time_limit_s=60) as loader:
        yield loader


def is_running(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- what the worker process is told to do -------------------------------------------------------


def hang_in_native_code(seconds: int) -> None:
    ctypes.PyDLL(None).sleep(seconds)  # keeps the interpreter's lock: no Python code can run


def stop_itself(source: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die(signal_number: int) -> None:
    os.kill(os.getpid(), signal_number)


def process_id(source: str) -> int:
    return os.getpid()


def loaded_modules(source: str) -> list[str]:
    return list(sys.modules)


def be_noisy(source: str) -> str:
    for descriptor in (1, 2):
        os.write(descriptor, b"noise" * 100_000)
    print("more noise")
    return "heard"


def warn(text: str) -> None:
    logging.getLogger("apollo.video.decode").warning("%s: skipped 3", text)
    logging.getLogger("apollo.video.decode").debug("too much detail")


class OddError(Exception):
    def __init__(self, first: str, second: str):
        super().__init__(first)


def raise_one(kind: str) -> None:
    if kind == "caused":
        try:
            raise MemoryError("av_malloc")
        except MemoryError as error:
            raise VideoError("cannot be opened") from error
    raise {"value": ValueError("no such mode"), "odd": OddError("first", "second")}[kind]


# ---- one loader ----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_bytes", [False, True])
def test_loads_what_load_clips_loads(loader, short_video, as_bytes):
    source = short_video.path.read_bytes() if as_bytes else short_video.path
    got, expected = loader.load(source, TWO_CLIPS), load_clips(source, TWO_CLIPS)
    for field, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(got, field), value)
    assert got.frames.flags.writeable, "torch.from_numpy warns of arrays that are not"


def test_passes_options_on(loader, short_video):
    clips = loader.load(short_video.path, TWO_CLIPS, size=(8, 24))
    assert clips.frames.shape == (1, 4, 8, 24, 3)


@pytest.mark.parametrize("content", [None, b"", b"no video" * 100, "truncated"], ids=str)
def test_errors_are_those_of_load_clips(loader, short_video, tmp_path, content):
    path = tmp_path / "bad.mp4"
    if content == "truncated":
        content = short_video.path.read_bytes()[:-300]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError) as expected:
        load_clips(path)
    with pytest.raises(VideoError) as got:
        loader.load(path)
    assert (type(got.value), str(got.value)) == (type(expected.value), str(expected.value))


@pytest.mark.parametrize(("function", "source"), [(hang_in_native_code, 600), (stop_itself, "a")])
def test_a_hang_is_cut_off_and_costs_one_file(function, source, short_video, processes):
    with GuardedLoader(time_limit_s=0.5) as loader:
        with pytest.raises(VideoLimitError, match="longer than 0.5 s"):
            loader.run(function, source)
        assert processes[0].returncode == -signal.SIGKILL
        loader.time_limit_s = 60
        assert len(loader.load(short_video.path, TWO_CLIPS).frames) == 1
    assert len(processes) == 2
    assert all(process.returncode is not None for process in processes), "a process is left over"


@needs_linux
def test_memory_is_limited(short_video, processes):
    with GuardedLoader(memory_limit_bytes=200 * 2**20) as loader:
        assert loader.run(np.zeros, 150 * 2**20, np.uint8).nbytes == 150 * 2**20
        with pytest.raises(VideoLimitError, match="more than 200 MiB of memory"):
            loader.run(np.zeros, 201 * 2**20, np.uint8)
        assert len(loader.load(short_video.path, TWO_CLIPS).frames) == 1
    assert len(processes) == 2


@needs_linux
def test_lack_of_memory_is_not_taken_for_damage(tmp_path):
    video = write_numbered_video(tmp_path / "a.mp4", range(8), codec="mpeg4", size=(2000, 3000))
    expected = load_clips(video.path, TWO_CLIPS, size=(8, 40))
    outcomes = set()
    for num_mebibytes in (8, 32, 40, 64, 96, 400):
        with GuardedLoader(memory_limit_bytes=num_mebibytes * 2**20) as loader:
            try:
                clips = loader.load(video.path, TWO_CLIPS, size=(8, 40), num_threads=1)
            except VideoLimitError as error:
                outcomes.add("refused")
                assert "of memory" in str(error)
            else:
                outcomes.add("loaded")
                np.testing.assert_array_equal(clips.frames, expected.frames)
    assert outcomes == {"refused", "loaded"}


def test_lack_of_memory_is_seen_behind_other_errors(loader):
    with pytest.raises(VideoLimitError, match="memory"):
        loader.run(raise_one, "caused")


@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGABRT, "SIGABRT"), (signal.SIGKILL, "out of memory")],
)
def test_a_crash_costs_one_file(loader, short_video, number, text):
    with pytest.raises(VideoLimitError, match=text):
        loader.run(die, number)
    assert len(loader.load(short_video.path, TWO_CLIPS).frames) == 1


def test_a_signal_to_all_of_a_run_leaves_the_process_to_its_owner(loader):
    pid = loader.run(process_id, "a")
    os.kill(pid, signal.SIGTERM)
    assert loader.run(process_id, "b") == pid


def test_a_process_lost_between_files_is_replaced_quietly(loader, short_video):
    pid = loader.run(process_id, "a")
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert len(loader.load(short_video.path, TWO_CLIPS).frames) == 1


def test_one_process_serves_many_files(loader):
    assert len({loader.run(process_id, str(number)) for number in range(5)}) == 1


def test_the_process_imports_little(loader, short_video):
    loader.load(short_video.path)
    heavy = {"torch", "transformers", "matplotlib", "multiprocessing"}
    assert not heavy.intersection(loader.run(loaded_modules, "a"))


def test_noise_neither_blocks_nor_leaks(loader, capfd):
    assert loader.run(be_noisy, "a") == "heard"
    assert capfd.readouterr() == ("", "")


def test_warnings_come_through(loader, caplog):
    loader.run(warn, "a.mp4")
    assert [record.getMessage() for record in caplog.records] == ["a.mp4: skipped 3"]


def test_other_errors_come_through_with_their_place(loader):
    with pytest.raises(ValueError, match="no such mode") as caught:
        loader.run(raise_one, "value")
    assert str(caught.value) == "no such mode"
    assert "in raise_one" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="OddError: first"):
        loader.run(raise_one, "odd")


def test_an_unsendable_request_says_so(loader, short_video):
    with pytest.raises((AttributeError, pickle.PicklingError), match="local|pickle"):
        loader.run(lambda source: source, "a")
    assert len(loader.load(short_video.path, TWO_CLIPS).frames) == 1


@pytest.mark.parametrize("limits", [(0, 1), (1, 0), (float("nan"), 1)])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ValueError, match="must be positive"):
        GuardedLoader(*limits)


def test_a_process_that_does_not_start_is_not_the_files_fault(monkeypatch):
    monkeypatch.setattr(worker, "_BOOT", "raise SystemExit(1)")
    with GuardedLoader() as loader, pytest.raises(RuntimeError, match="does not start"):
        loader.load("a.mp4")


def test_closing_ends_a_busy_process(processes):
    loader = GuardedLoader(time_limit_s=600)
    loader.run(process_id, "a")
    errors = []

    def hang() -> None:
        try:
            loader.run(hang_in_native_code, 600)
        except VideoLimitError as error:
            errors.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    loader.close()
    thread.join()
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    with pytest.raises(ValueError, match="closed"):
        loader.load("a.mp4")


# The parent is killed, so that it cannot clean up.
ORPHAN = """
import os, signal, sys, threading, time
from apollo.video.guard import GuardedLoader
loader = GuardedLoader(time_limit_s=0.5)
loader.run(str, "a")
print(loader._worker._process.pid, flush=True)
if sys.argv[1] == "busy":
    loader.time_limit_s = 600
    threading.Thread(target=loader.run, args=(time.sleep, 600)).start()
    time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_linux
@pytest.mark.parametrize("state", ["idle", pytest.param("busy", marks=pytest.mark.slow)])
def test_the_process_does_not_outlive_its_parent(state):
    root = Path(worker.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, state], cwd=root, capture_output=True, text=True
    )
    pid = int(done.stdout)
    for _ in range(600):
        if not is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} is still there")


class OneVideo:
    """A dataset whose items come from a guarded loader."""

    def __init__(self, path: Path, loader: GuardedLoader):
        self.path, self.loader = path, loader

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        clips = self.loader.load(self.path, TWO_CLIPS)
        return len(clips.frames), self.loader.run(process_id, "a"), os.getpid()


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_works_in_data_workers(context, loader, short_video):
    from torch.utils.data import DataLoader

    own_pid = loader.run(process_id, "a")  # started before the fork: must not be shared
    rows = list(
        DataLoader(
            OneVideo(short_video.path, loader),
            batch_size=None,
            num_workers=2,
            multiprocessing_context=context,
        )
    )
    assert [num_clips for num_clips, _, _ in rows] == [1] * 4
    pids = {pid for _, pid, _ in rows}
    assert len(pids) == 2 and own_pid not in pids
    assert loader.run(process_id, "a") == own_pid, "a data worker ended its parent's process"


# ---- many files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """30 videos of different lengths, of which 3 are bad."""
    folder = tmp_path_factory.mktemp("folder")
    for number in range(30):
        write_numbered_video(folder / f"{number:02d}.mp4", range(10 + number))
    (folder / "04.mp4").write_bytes(b"")
    (folder / "17.mp4").write_bytes((folder / "17.mp4").read_bytes()[:-300])
    (folder / "29.mp4").write_bytes(b"<html>404</html>" * 50)
    return folder


BAD = ["04.mp4", "17.mp4", "29.mp4"]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_with_bad_files(folder, tmp_path, caplog, processes):
    quarantine, paths = tmp_path / "lists" / "bad.jsonl", sorted(folder.iterdir())
    with caplog.at_level(logging.INFO):
        stream = load_many(paths, TWO_CLIPS, num_workers=2, quarantine=quarantine)
        loaded = list(stream)
    good = [path for path in paths if path.name not in BAD]
    assert [path for path, _ in loaded] == good, "each good one, once, in order"
    for path, clips in loaded:
        assert isinstance(clips, VideoClips)
        assert clips.duration_s == pytest.approx((10 + int(path.stem)) / 30)  # and its own clips
    assert (stream.num_good, stream.num_bad, stream.num_known_bad) == (27, 3, 0)
    rows = rows_of(quarantine)
    assert [Path(row["file"]).name for row in rows] == BAD
    assert [row["error"] for row in rows] == ["NotAVideoError"] * 3
    assert all(row["file"] in row["reason"] and row["spent_s"] >= 0 for row in rows)
    assert f"27 good, 3 bad, 0 known to be bad: listed in {quarantine}" in caplog.text
    assert len(processes) == 2 and all(process.returncode is not None for process in processes)


def test_listed_files_are_skipped_until_they_change(folder, tmp_path, caplog):
    quarantine, path = tmp_path / "bad.jsonl", tmp_path / "a.mp4"
    path.write_bytes(b"still being copied")
    assert not list(load_many([path], quarantine=quarantine))
    caplog.clear()
    again = load_many([str(path)], quarantine=quarantine)
    assert not list(again)
    assert (again.num_bad, again.num_known_bad, len(rows_of(quarantine))) == (0, 1, 1)
    assert f"{path} is skipped: {quarantine} lists it" in caplog.text
    path.write_bytes((folder / "00.mp4").read_bytes())
    assert len(list(load_many([path], quarantine=quarantine))) == 1
    path.unlink()
    assert not list(load_many([path], quarantine=quarantine))
    assert [row["error"] for row in rows_of(quarantine)] == ["NotAVideoError", "VideoNotFoundError"]


@needs_linux
def test_higher_limits_are_a_reason_to_try_again(folder, tmp_path):
    quarantine, paths = tmp_path / "bad.jsonl", [folder / "00.mp4"]
    limits = dict(num_workers=1, quarantine=quarantine, size=(4000, 4000))

    def counts(**others) -> tuple[int, int, int]:
        stream = load_many(paths, TWO_CLIPS, **limits, **others)
        assert len(list(stream)) == stream.num_good
        return stream.num_good, stream.num_bad, stream.num_known_bad

    assert counts(memory_limit_bytes=64 * 2**20) == (0, 1, 0)
    assert counts(memory_limit_bytes=64 * 2**20) == (0, 0, 1)
    assert counts(memory_limit_bytes=2**30) == (1, 0, 0)
    assert rows_of(quarantine)[0]["error"] == "VideoLimitError"


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"path": "a.mp4"}', "3"])
def test_a_wrong_quarantine_list_is_refused(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="bad.jsonl"):
        load_many([], quarantine=path)


def test_without_a_list_bad_files_are_logged(folder, caplog):
    stream = load_many([folder / name for name in ("00.mp4", *BAD, "01.mp4")], TWO_CLIPS)
    assert [path.name for path, _ in stream] == ["00.mp4", "01.mp4"]
    assert sum("bad video" in record.message for record in caplog.records) == 3


def test_runs_ahead_only_so_far_and_stops_when_closed(folder, processes):
    taken = []
    paths = (taken.append(path) or path for path in sorted(folder.iterdir())[:4] * 100)
    stream = load_many(paths, TWO_CLIPS, num_workers=2)
    for num_read in range(1, 6):
        next(stream)
        assert len(taken) <= num_read + 2 * 2
    stream.close()
    assert len(processes) == 2 and all(process.returncode is not None for process in processes)
    assert next(stream, None) is None


def test_mistakes_are_raised_not_listed(folder, tmp_path):
    quarantine = tmp_path / "bad.jsonl"
    with pytest.raises(TypeError, match="colour"):
        list(load_many([folder / "00.mp4"], quarantine=quarantine, colour="red"))
    assert not quarantine.exists()
    with pytest.raises(ValueError, match="num_workers"):
        load_many([], num_workers=0)
