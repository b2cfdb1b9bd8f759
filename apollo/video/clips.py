"""From a video file to clips: sampling.py says when to look, decode.py fetches the frames.

`VideoClips` is all that the rest of the code knows of a video; the processor in apollo/model reads
its fields by name. A model sees small squares, so they can be made of each frame as soon as it is
decoded: an hour of video then costs no more memory than what the model is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from apollo.video.decode import VideoInfo, VideoReader, open_video
from apollo.video.sampling import ClipSampling, sample


class Square(Protocol):
    """Makes of a frame the square that an encoder sees; `Preprocessing` of apollo/model is one."""

    @property
    def image_size(self) -> int:
        """Height and width S in pixels."""

    @property
    def longest_side(self) -> int | None:
        """The longest side to which the decoder may scale a frame first; None if it may not."""

    def square(self, frame: np.ndarray) -> np.ndarray:
        """Turn a frame, uint8 (H, W, 3) RGB, into uint8 (S, S, 3)."""


@dataclass(frozen=True, eq=False)
class VideoClips:
    """The sampled frames of one video with their times.

    Attributes:
        frames: uint8 (C clips, T frames, H, W, 3 RGB); if squares were asked for, the first of
            them.
        times_s: float64 (C, T), the true presentation times of those frames, counted from the first
            frame of the video.
        spans_s: float64 (C, 2), start and end of each clip, as the prompt states them.
        duration_s: Length of the video.
        source_fps: Average frame rate of the file.
        sampled_fps: Frames asked for per second inside a clip; 0 if all of a clip is one moment.
        squares: For each encoder its frames, uint8 (C, T, S, S, 3); empty if none were asked for.
    """

    frames: np.ndarray
    times_s: np.ndarray
    spans_s: np.ndarray
    duration_s: float
    source_fps: float
    sampled_fps: float
    squares: tuple[np.ndarray, ...] = ()

    def __post_init__(self):
        assert self.frames.dtype == np.uint8 and self.frames.shape[4:] == (3,)
        assert self.times_s.shape == self.frames.shape[:2]
        assert self.spans_s.shape == (len(self.frames), 2)


def load_clips(
    source: str | Path | bytes,
    sampling: ClipSampling | None = None,
    size: tuple[int, int] | None = None,
    squares: Sequence[Square] = (),
    num_threads: int | None = None,
    backend: str = "pyav",
) -> VideoClips:
    """Open a video, choose clips and decode their frames.

    Args:
        source: A file's path, or the bytes of a file.
        sampling: How to choose the clips; by default the paper's 4 frames over 2 s, without limit.
        size: Height and width in pixels to scale the frames to; by default they keep the video's.
        squares: Instead of whole frames, what to make of each of them, for each encoder.
        num_threads: See `open_video`.
        backend: See `open_video`.

    Raises:
        VideoError: the video cannot be opened or decoded; see apollo/video/decode.py for the kinds.
    """
    sampling = sampling or ClipSampling()
    with open_video(source, num_threads, backend) as video:
        times_s, spans_s = sample(video.info.duration_s, sampling, video.info.source_fps)
        if squares:
            arrays, found_s = _squares_at(video, times_s.ravel(), squares)
        else:
            frames = video.frames_at(times_s.ravel(), size)
            arrays, found_s = [frames.pixels], frames.times_s
        arrays = [array.reshape(*times_s.shape, *array.shape[1:]) for array in arrays]
        return VideoClips(
            frames=arrays[0],
            times_s=found_s.reshape(times_s.shape),
            spans_s=spans_s,
            duration_s=video.info.duration_s,
            source_fps=video.info.source_fps,
            sampled_fps=_sampled_fps(times_s, spans_s),
            squares=tuple(arrays) if squares else (),
        )


def _squares_at(
    video: VideoReader, times_s: np.ndarray, squares: Sequence[Square]
) -> tuple[list[np.ndarray], np.ndarray]:
    """For each encoder uint8 (T, S, S, 3), and the true times (T,)."""
    arrays = [np.empty((len(times_s), s.image_size, s.image_size, 3), np.uint8) for s in squares]
    sizes = [_fit(video.info, square.longest_side) for square in squares]

    def put(places: np.ndarray, to_rgb: Callable[..., np.ndarray]) -> None:
        frames = {size: to_rgb(size) for size in set(sizes)}
        for array, square, size in zip(arrays, squares, sizes, strict=True):
            array[places] = square.square(frames[size])

    return arrays, video.visit(times_s, put)


def _fit(info: VideoInfo, longest_side: int | None) -> tuple[int, int] | None:
    """Height and width of the video's frames at another longest side."""
    if longest_side is None:
        return None
    scale = longest_side / max(info.height, info.width)
    return max(1, round(info.height * scale)), max(1, round(info.width * scale))


def _sampled_fps(times_s: np.ndarray, spans_s: np.ndarray) -> float:
    """Frames per second in clips, by the first one's times or, if of one frame, its span."""
    spacing_s = (
        times_s[0, 1] - times_s[0, 0] if times_s.shape[1] > 1 else spans_s[0, 1] - spans_s[0, 0]
    )
    return float(1 / spacing_s) if spacing_s > 0 else 0.0
