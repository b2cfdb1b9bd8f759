"""From a video file to clips: sampling.py says when to look, decode.py fetches the frames.

`VideoClips` is all that the rest of the code knows of a video; the processor in apollo/model reads
its fields by name.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apollo.video.decode import open_video
from apollo.video.sampling import ClipSampling, sample


@dataclass(frozen=True, eq=False)
class VideoClips:
    """The sampled frames of one video with their times.

    Attributes:
        frames: uint8 (C clips, T frames, H, W, 3 RGB).
        times_s: float64 (C, T), the true presentation times of those frames, counted from the first
            frame of the video.
        spans_s: float64 (C, 2), start and end of each clip, as the prompt states them.
        duration_s: Length of the video.
        source_fps: Average frame rate of the file.
        sampled_fps: Frames asked for per second inside a clip; 0 if all of a clip is one moment.
    """

    frames: np.ndarray
    times_s: np.ndarray
    spans_s: np.ndarray
    duration_s: float
    source_fps: float
    sampled_fps: float

    def __post_init__(self):
        assert self.frames.dtype == np.uint8 and self.frames.shape[4:] == (3,)
        assert self.times_s.shape == self.frames.shape[:2]
        assert self.spans_s.shape == (len(self.frames), 2)


def load_clips(
    source: str | Path | bytes,
    sampling: ClipSampling | None = None,
    size: tuple[int, int] | None = None,
) -> VideoClips:
    """Open a video, choose clips and decode their frames.

    Args:
        source: A file's path, or the bytes of a file.
        sampling: How to choose the clips; by default the paper's 4 frames over 2 s, without limit.
        size: Height and width in pixels to scale the frames to; by default they keep the video's.

    Raises:
        VideoError: the video cannot be opened or decoded; see apollo/video/decode.py for the kinds.
    """
    sampling = sampling or ClipSampling()
    with open_video(source) as video:
        times_s, spans_s = sample(video.info.duration_s, sampling, video.info.source_fps)
        frames = video.frames_at(times_s.ravel(), size)
        return VideoClips(
            frames=frames.pixels.reshape(*times_s.shape, *frames.pixels.shape[1:]),
            times_s=frames.times_s.reshape(times_s.shape),
            spans_s=spans_s,
            duration_s=video.info.duration_s,
            source_fps=video.info.source_fps,
            sampled_fps=_sampled_fps(times_s, spans_s),
        )


def _sampled_fps(times_s: np.ndarray, spans_s: np.ndarray) -> float:
    """Frames per second in clips, by the first one's times or, if of one frame, its span."""
    spacing_s = (
        times_s[0, 1] - times_s[0, 0] if times_s.shape[1] > 1 else spans_s[0, 1] - spans_s[0, 0]
    )
    return float(1 / spacing_s) if spacing_s > 0 else 0.0
