"""The files of benchmarks/video.py: 30 s of video, written once, then repeated by copying packets.

A camera moves over a textured ground with things on it, under grain: 2.5 Mbit/s at x264's preset
"medium", B-frames included. Each frame carries its number as a row of light and dark blocks, so
that a wrong frame is noticed whoever returns it. Repeating makes an hour of video in seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

NUM_BASE_FRAMES, FPS = 900, 30  # what `NUM_BITS` can count
NUM_BITS, BLOCK = 10, 32  # a frame's number: blocks of 32 pixels, the lowest bit at the left
ENCODERS = {
    "libx264": {"preset": "medium", "threads": "4"},
    "libx265": {"preset": "fast", "x265-params": "pools=2:frame-threads=2:log-level=error"},
}


@dataclass(frozen=True)
class VideoFile:
    """What a file is like; all are 1280 x 720 (portrait: 720 x 1280 by rotation)."""

    length_s: int
    codec: str = "libx264"
    gop: int = 250
    is_portrait: bool = False
    has_variable_rate: bool = False
    suffix: str = ".mp4"

    @property
    def base_name(self) -> str:
        """Of the piece that is repeated."""
        oddities = "_portrait" * self.is_portrait + "_variable" * self.has_variable_rate
        return f"{self.codec}_gop{self.gop}{oddities}"


def make_file(file: VideoFile, folder: Path) -> Path:
    """Return the file's path; make it if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"{file.base_name}.mp4"
    path = folder / f"{file.base_name}_{file.length_s}s{file.suffix}"
    _make(base, partial(_encode_base, file))
    _make(path, partial(_repeat, file, base))
    return path


def _make(path: Path, write: Callable[[Path], None]) -> None:
    if not path.exists():
        print(f"making {path}", flush=True)
        unfinished = path.with_name(f"unfinished_{path.name}")
        write(unfinished)
        unfinished.rename(path)


def _encode_base(file: VideoFile, path: Path) -> None:
    """Write 30 s of 720p. Pictures of a portrait file lie on their side, as phones store them."""
    height, width = (1280, 720) if file.is_portrait else (720, 1280)
    # Between 21 and 46 ms in steps, as of a phone in changing light.
    spacing_ms = 33 + (12 * np.sin(np.arange(NUM_BASE_FRAMES) / 9)).round().astype(int)
    ticks = np.cumsum(spacing_ms) if file.has_variable_rate else np.arange(NUM_BASE_FRAMES)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(file.codec, rate=FPS, options=ENCODERS[file.codec])
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        time_base = Fraction(1, 1000 if file.has_variable_rate else FPS)
        stream.codec_context.time_base, stream.codec_context.gop_size = time_base, file.gop
        for tick, picture in zip(ticks - ticks[0], pictures(height, width), strict=True):
            if file.is_portrait:
                picture = np.ascontiguousarray(np.rot90(picture))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(tick), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _repeat(file: VideoFile, base: Path, path: Path) -> None:
    """Copy the packets of `base` again and again, up to the length of the file."""
    with av.open(str(base)) as container:
        source = container.streams.video[0]
        packets = [p for p in container.demux(source) if p.size]
        before_last, last = sorted(p.pts for p in packets)[-2:]
        period = 2 * last - before_last
        num_repeats = max(1, round(file.length_s / float(period * source.time_base)))
        with av.open(str(path), "w") as out:
            stream = out.add_stream_from_template(source)
            if file.is_portrait:
                stream.set_display_rotation(-90)
            for number in range(num_repeats):
                container.seek(0)
                for packet in container.demux(source):
                    if packet.size:
                        packet.pts += number * period
                        packet.dts += number * period
                        packet.stream = stream
                        out.mux(packet)


def pictures(height: int, width: int) -> Iterator[np.ndarray]:
    """Yield uint8 (H, W, 3) pictures: a camera over a ground, moving things, grain, the number."""
    rng = np.random.default_rng(0)
    ground, things = _fractal(rng, 2048), _fractal(rng, 512)
    grain = rng.normal(0, 3.0, (2 * height, 2 * width)).round().astype(np.int16)
    starts, speeds = rng.uniform(0, 1, (6, 2)), rng.uniform(-0.4, 0.4, (6, 2))
    for number in range(NUM_BASE_FRAMES):
        angle = 2 * np.pi * number / NUM_BASE_FRAMES
        zoom = 0.9 + 0.1 * np.sin(angle)
        rows, columns = int(height * zoom), int(width * zoom)
        top = int((2048 - rows) * (0.5 + 0.5 * np.sin(angle)))
        left = int((2048 - columns) * (0.5 + 0.5 * np.sin(2 * angle + 1)))
        crop = np.ascontiguousarray(ground[top : top + rows, left : left + columns])
        frame = av.VideoFrame.from_ndarray(crop, format="rgb24").reformat(width, height)
        picture = frame.to_ndarray().astype(np.int16)
        for index, (start, speed) in enumerate(zip(starts, speeds, strict=True)):
            side = 60 + 30 * index
            place = np.abs((start + speed * number / FPS) % 2 - 1)  # to and fro
            y, x = (place * (height - side, width - side)).astype(int)
            picture[y : y + side, x : x + side] = things[:side, 40 * index : 40 * index + side]
        dy, dx = rng.integers(0, (height, width))
        picture += grain[dy : dy + height, dx : dx + width, None]
        for bit in range(NUM_BITS):
            level = 235 if number >> bit & 1 else 20
            picture[-BLOCK:, bit * BLOCK : (bit + 1) * BLOCK] = level
        yield picture.clip(0, 255).astype(np.uint8)


def _fractal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a uint8 (size, size, 3) texture whose detail falls with frequency, as in nature."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3):
        noise = np.fft.rfft2(rng.normal(size=(size, size))) / frequency**1.25
        plane = np.fft.irfft2(noise)
        planes.append(plane / plane.std())
    colours = 0.8 * planes[0][..., None] + 0.4 * np.stack(planes, axis=2)
    return (128 + 50 * colours).clip(0, 255).astype(np.uint8)


def read_number(picture: np.ndarray) -> int:
    """Return the number that `pictures` wrote."""
    levels = picture[-BLOCK:, : NUM_BITS * BLOCK].reshape(BLOCK, NUM_BITS, BLOCK, 3)
    bits = levels[8:-8, :, 8:-8].mean(axis=(0, 2, 3)) > 128
    return int(bits @ (1 << np.arange(NUM_BITS)))
