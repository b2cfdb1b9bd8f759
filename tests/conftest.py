"""Videos whose every frame carries its number as bits, so that tests can prove which they got."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

NUM_BITS = 10
BLOCK = 16  # pixels; survives strong compression
HEIGHT, WIDTH = 2 * BLOCK, NUM_BITS * BLOCK


def draw_number(number: int, noise: bool = False) -> np.ndarray:
    """A frame, uint8 (H, W, 3): one block per bit above; the lower half is white, or noise."""
    bits = np.array([number >> bit & 1 for bit in range(NUM_BITS)], dtype=np.uint8) * 220 + 16
    upper = np.repeat(np.repeat(bits[None], BLOCK, axis=0), BLOCK, axis=1)
    random = np.random.default_rng(number).integers(16, 236, upper.shape, dtype=np.uint8)
    gray = np.concatenate([upper, random if noise else np.full_like(upper, 236)])
    return np.repeat(gray[:, :, None], 3, axis=2)


def read_number(frame: np.ndarray) -> int:
    """The number that `draw_number` drew, of any frame size."""
    height, width = frame.shape[:2]
    columns = (np.arange(NUM_BITS) + 0.5) * width / NUM_BITS
    bits = frame[height // 4, columns.astype(int), 0] > 126
    return int((bits * 2 ** np.arange(NUM_BITS)).sum())


@dataclass(frozen=True)
class NumberedVideo:
    """A file and the times at which its frames 0, 1, 2... appear, counted from the first."""

    path: Path
    times_s: np.ndarray

    def number_at(self, time_s: float) -> int:
        return max(0, int(np.searchsorted(self.times_s, time_s + 1e-6, side="right")) - 1)


def write_numbered_video(
    path: Path,
    ticks: Sequence[int],
    time_base: Fraction = Fraction(1, 30),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    max_b_frames: int = 0,
    gop_size: int = 30,
    rate: Fraction | None = None,
    pixel_format: str = "yuv420p",
    with_audio_s: float = 0.0,
    noise: bool = False,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    container_options: dict[str, str] | None = None,
    prepare: Callable[[av.VideoStream], None] | None = None,
) -> NumberedVideo:
    """Write one frame per timestamp in `ticks`, which count in `time_base`.

    Args:
        size: Height and width of the frames, to which the picture of the number is stretched.
        prepare: Called with the stream before the first frame, for settings that are rare.
    """
    rows, columns = (
        np.arange(length) * drawn // length
        for length, drawn in zip(size, (HEIGHT, WIDTH), strict=True)
    )
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate or 1 / time_base, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = time_base
        stream.codec_context.max_b_frames = max_b_frames
        stream.codec_context.gop_size = gop_size
        stream.codec_context.thread_count = 1
        if prepare:
            prepare(stream)
        if with_audio_s:
            audio = container.add_stream("aac", rate=8000)
            sound = np.zeros((1, int(8000 * with_audio_s)), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux([*audio.encode(frame), *audio.encode(None)])
        for number, tick in enumerate(ticks):
            drawn = draw_number(number, noise)[rows][:, columns]
            picture = av.VideoFrame.from_ndarray(drawn, format="rgb24")
            picture.pts, picture.time_base = tick, time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    times_s = (np.asarray(ticks) - ticks[0]) * float(time_base)
    return NumberedVideo(path, times_s)


@pytest.fixture(scope="session")
def plain_video(tmp_path_factory: pytest.TempPathFactory) -> NumberedVideo:
    """H.264 in MP4, 30 frames per second, 12 s, a keyframe each second."""
    path = tmp_path_factory.mktemp("videos") / "plain.mp4"
    return write_numbered_video(path, range(360))
