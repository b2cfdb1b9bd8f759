"""Thousands of damaged files: each gives frames or a typed error, within its limits.

All is drawn from a seed. A file that crashes or hangs the decoder is kept, and the message of the
failed test says where.
"""

import logging
import os
import struct
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import write_numbered_video

from apollo.video import ClipSampling, VideoClips, VideoError, load_clips
from apollo.video.guard import GuardedLoader, VideoLimitError

EIGHT_CLIPS = ClipSampling(max_clips=8)
TIME_LIMIT_S, MEMORY_LIMIT_BYTES = 10.0, 10**9
Random = np.random.Generator

# name -> how to write it
ORIGINALS = {
    "h264.mp4": dict(max_b_frames=2),
    "sound.mp4": dict(codec="mpeg4", with_audio_s=1.0),
    "h264.mkv": dict(max_b_frames=2),
    "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": dict(codec="mpeg4", max_b_frames=2),
    "mpeg2.ts": dict(codec="mpeg2video", max_b_frames=2, noise=True),
    "h264.flv": dict(),
    "picture.gif": dict(codec="gif", pixel_format="rgb8", time_base=Fraction(1, 25)),
    "mpeg2.mpg": dict(codec="mpeg2video", time_base=Fraction(1, 25), noise=True),
}

# Where a file says its size and its time: marker, bytes from its end to the fields, their layout.
SIZES = [
    (b"avc1", 24, ">HH"),
    (b"mp4v", 24, ">HH"),
    (b"tkhd", 80, ">II"),
    (b"\xb0\x82", 0, ">H"),  # Matroska PixelWidth and PixelHeight of two bytes
    (b"\xb0\x81", 0, ">B"),  # and of one
    (b"\xba\x82", 0, ">H"),
    (b"\xba\x81", 0, ">B"),
    (b"avih", 36, "<II"),
    (b"strf", 8, "<II"),
    (b"GIF89a", 0, "<HH"),
    (b"\x00\x00\x01\xb3", 0, ">HB"),  # MPEG-2 sequence header
    (b"width", 1, ">d"),  # FLV metadata
    (b"height", 1, ">d"),
    (b"stsz", 4, ">II"),
]
TIMES = [
    (b"mvhd", 12, ">II"),
    (b"mdhd", 12, ">II"),
    (b"stts", 8, ">II"),
    (b"ctts", 8, ">Ii"),
    (b"elst", 8, ">Ii"),
    (b"trak", 28, ">I"),
    (b"\x44\x89\x88", 0, ">d"),  # Matroska Duration
    (b"\x44\x89\x84", 0, ">f"),
    (b"\x2a\xd7\xb1\x83", 0, ">BH"),  # Matroska TimestampScale
    (b"\x23\xe3\x83\x84", 0, ">I"),  # Matroska DefaultDuration
    (b"avih", 4, "<I"),
    (b"avih", 20, "<I"),
    (b"vids", 20, "<II"),
    (b"vids", 32, "<I"),
    (b"duration", 1, ">d"),
    (b"framerate", 1, ">d"),
    (b"\x21\xf9\x04", 1, "<H"),  # GIF delay
]


# ---- ways to damage a file -----------------------------------------------------------------------


def flip_bits(data: bytearray, other: bytes, random: Random) -> bytearray:
    for place in random.integers(len(data), size=random.integers(1, 60)):
        data[place] ^= 1 << random.integers(8)
    return data


def flip_bits_of_header(data: bytearray, other: bytes, random: Random) -> bytearray:
    for place in random.integers(min(len(data), 700), size=random.integers(1, 10)):
        data[place] ^= 1 << random.integers(8)
    return data


def truncate(data: bytearray, other: bytes, random: Random) -> bytearray:
    return data[: random.integers(len(data))]


def splice(data: bytearray, other: bytes, random: Random) -> bytearray:
    return data[: random.integers(len(data))] + other[random.integers(len(other)) :]


def fill(data: bytearray, other: bytes, random: Random) -> bytearray:
    start, end = np.sort(random.integers(len(data), size=2))
    end = min(end, start + random.integers(1, 2000))
    data[start:end] = bytes([random.choice([0, 255])]) * int(end - start)
    return data


def swap(data: bytearray, other: bytes, random: Random) -> bytearray:
    a, b, c, d = np.sort(random.integers(len(data) + 1, size=4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def absurd_sizes(data: bytearray, other: bytes, random: Random) -> bytearray:
    return _patch(data, SIZES, random)


def absurd_times(data: bytearray, other: bytes, random: Random) -> bytearray:
    return _patch(data, TIMES, random)


def _patch(data: bytearray, fields: list[tuple[bytes, int, str]], random: Random) -> bytearray:
    present = [field for field in fields if field[0] in data]
    for index in random.permutation(len(present))[: random.integers(1, 3)]:
        marker, offset, layout = present[index]
        values = [_absurd(letter, random) for letter in layout[1:]]
        place = data.index(marker) + len(marker) + offset
        if place + struct.calcsize(layout) <= len(data):
            struct.pack_into(layout, data, place, *values)
    return data


def _absurd(letter: str, random: Random) -> float:
    if letter in "fd":
        return float(random.choice([0, -1, 1e-30, 1e9, 1e30, np.inf, np.nan]))
    bits = 8 * struct.calcsize(letter)
    lowest = 0 if letter.isupper() else -(2 ** (bits - 1))
    highest = lowest + 2**bits - 1
    return int(random.choice([lowest, 0, 1, 2, highest // 2, highest, random.integers(highest)]))


MUTATIONS: list[Callable[[bytearray, bytes, Random], bytearray]] = [
    flip_bits,
    flip_bits_of_header,
    truncate,
    splice,
    fill,
    swap,
    absurd_sizes,
    absurd_times,
]


# ---- the files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    files = {}
    for name, how in ORIGINALS.items():
        options = {"ticks": range(40), "gop_size": 12, "time_base": Fraction(1, 25), **how}
        files[name] = write_numbered_video(folder / name, **options).path.read_bytes()
    return files


def damaged(originals: dict[str, bytes], index: int, seed: int) -> tuple[str, bytes]:
    """A damaged file and what was done to it; all pairs of files and mutations take turns."""
    random = np.random.default_rng([seed, index])
    names = list(originals)
    name, first = names[index % len(names)], index // len(names) % len(MUTATIONS)
    data = bytearray(originals[name])
    chosen = [MUTATIONS[first], *random.choice(MUTATIONS, size=random.choice([0, 0, 1, 2]))]
    for mutate in chosen:
        if data:
            data = mutate(data, originals[str(random.choice(names))], random)
    kinds = "+".join(mutate.__name__ for mutate in chosen)
    return f"{index:04d}_{kinds}_{name}", bytes(data)


def check(clips: VideoClips) -> None:
    """What holds of all clips, whatever the file."""
    num_clips, num_frames = clips.times_s.shape
    assert 1 <= num_clips <= 8 and num_frames == 4
    assert clips.frames.shape[:2] == (num_clips, 4) and clips.frames.size > 0
    assert np.all(np.isfinite(clips.times_s)) and np.all(clips.times_s >= 0)
    assert np.all(np.diff(clips.times_s.ravel()) >= 0)
    assert np.all(np.isfinite(clips.spans_s)) and np.all(clips.spans_s >= 0)
    assert np.isfinite(clips.duration_s) and clips.duration_s >= 0, clips.duration_s
    assert np.isfinite(clips.source_fps) and clips.source_fps > 0, clips.source_fps


def load_and_check(loader: GuardedLoader, source: Path | bytes) -> str:
    """What became of a file: "frames" or the name of its error; fails on all that must not be."""
    try:
        clips = loader.load(source, EIGHT_CLIPS)
    except VideoLimitError as error:
        assert "of memory" in str(error), error
        return "too much memory"
    except VideoError as error:
        assert "\n" not in str(error), error
        return type(error).__name__
    check(clips)
    return "frames"


def survive(originals: dict[str, bytes], num_files: int, seed: int, folder: Path) -> Counter[str]:
    """Load damaged files, every second one from memory, and count what became of them."""
    outcomes: Counter[str] = Counter()
    failures = []
    with GuardedLoader(TIME_LIMIT_S, MEMORY_LIMIT_BYTES) as loader:
        for index in range(num_files):
            name, data = damaged(originals, index, seed)
            path = folder / name
            path.write_bytes(data)
            try:
                outcomes[load_and_check(loader, data if index % 2 else path)] += 1
            except Exception as error:
                failures.append(f"{path}: {type(error).__name__}: {str(error):.300}")
            else:
                path.unlink()
    assert not failures, "\n".join(failures)
    print(dict(outcomes))
    return outcomes


def test_damaged_files_give_frames_or_typed_errors(originals, tmp_path):
    outcomes = survive(originals, 150, seed=1, folder=tmp_path)
    assert outcomes["frames"] > 30, "the damage is so heavy that nothing is tested"
    assert outcomes["NotAVideoError"] > 5 and outcomes["DamagedVideoError"] > 0


@pytest.mark.slow
def test_a_thousand_damaged_files(originals, tmp_path):
    outcomes = survive(originals, 1000, seed=2, folder=tmp_path)
    assert outcomes["frames"] > 200 and outcomes["NotAVideoError"] > 50


# ---- memory --------------------------------------------------------------------------------------


def open_many(folder: str, num_opens: int) -> list[tuple[int, int]]:
    """Open the folder's files in turn; bytes of memory and open files after each hundred."""
    logging.disable(logging.WARNING)  # in this process, which is not that of the tests
    paths = sorted(Path(folder).iterdir())
    occupied = []
    for count in range(num_opens):
        try:
            load_clips(paths[count % len(paths)], EIGHT_CLIPS)
        except VideoError:
            pass
        if count % 100 == 99:
            num_pages = int(Path("/proc/self/statm").read_text().split()[1])
            num_files = len(list(Path("/proc/self/fd").iterdir()))
            occupied.append((num_pages * os.sysconf("SC_PAGE_SIZE"), num_files))
    return occupied


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow(originals, tmp_path):
    for name, data in originals.items():
        (tmp_path / name).write_bytes(data)
    for index in range(100):
        name, data = damaged(originals, index, seed=3)
        (tmp_path / name).write_bytes(data)
    with GuardedLoader(time_limit_s=1200, memory_limit_bytes=MEMORY_LIMIT_BYTES) as loader:
        occupied = loader.run(open_many, str(tmp_path), 3000)
    mebibytes = [num_bytes / 2**20 for num_bytes, _ in occupied]
    # The heap settles in the first half: 86 MiB after 500, 97 from 1,600 to 6,000 when measured.
    assert mebibytes[-1] - mebibytes[4] < 30, mebibytes
    assert mebibytes[-1] - mebibytes[19] < 5, mebibytes
    assert len({num_files for _, num_files in occupied}) == 1, occupied
