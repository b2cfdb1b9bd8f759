"""Which moments of a video to look at: pure functions from a duration to times. NumPy only.

The paper samples clips at a constant rate (4 frames over 2 seconds). A long video gets no more
clips than the token budget allows: then the clips move apart, while the spacing of frames inside a
clip, which the video encoder was trained on, never changes (Sec. 4.1, App. C.1). Uniform sampling,
which the paper shows to be worse, and a single centre frame are here for comparison, the released
code's own way for the released weights.
apollo/video/clips.py turns the times into pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClipSampling:
    """How to choose clips.

    Args:
        mode: A key of `SAMPLERS`.
        frames_per_clip: Frames in each clip. 4 in the paper, what its video encoder takes.
        clip_duration_s: Seconds from the start of a clip to the start of the next one; with 4
            frames, 2 s are the paper's 2 frames per second.
        max_clips: Most clips a video may have (see `max_clips_for_budget`); None is no limit.
    """

    mode: str = "fps"
    frames_per_clip: int = 4
    clip_duration_s: float = 2.0
    max_clips: int | None = None

    def __post_init__(self):
        if self.mode not in SAMPLERS:
            raise ValueError(
                f"sampling mode must be one of {', '.join(SAMPLERS)}, not {self.mode!r}"
            )
        if self.frames_per_clip < 1:
            raise ValueError(f"frames_per_clip must be at least 1, not {self.frames_per_clip}")
        if not (math.isfinite(self.clip_duration_s) and self.clip_duration_s > 0):
            raise ValueError(
                f"clip_duration_s must be a positive number, not {self.clip_duration_s}"
            )
        if self.max_clips is not None and self.max_clips < 1:
            raise ValueError(f"max_clips must be at least 1, not {self.max_clips}")
        if self.mode == "uniform" and self.max_clips is None:
            raise ValueError("uniform sampling needs max_clips: it always takes that many clips")


def sample(
    duration_s: float, sampling: ClipSampling, source_fps: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the clips of a video.

    Args:
        duration_s: Length of the video in seconds; 0 is allowed (a single picture).
        sampling: How to choose.
        source_fps: Frame rate of the video; only the released way asks for it.

    Returns:
        `times_s`, float64 (C clips, T frames): when to take each frame. Times may lie beyond
        the end in a clip that the video does not fill; the frame shown then is the last one.
        `spans_s`, float64 (C, 2): start and end of each clip, the end never beyond the video's.
    """
    if not (math.isfinite(duration_s) and duration_s >= 0):
        raise ValueError(f"a video's duration must be a number of seconds from 0, not {duration_s}")
    return SAMPLERS[sampling.mode](duration_s, sampling, source_fps)


def sample_fps(
    duration_s: float, sampling: ClipSampling, source_fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Consecutive clips from 0; if too many, as many as allowed, evenly from start to end.

    A rest shorter than 1 % of a clip makes no clip of its own: 20 ms of 2 s are less than a frame,
    and files at 29.97 frames per second, a little longer than their round number of seconds, would
    all have one.
    """
    clip_duration_s = sampling.clip_duration_s
    num_clips = max(1, math.ceil(duration_s / clip_duration_s - 0.01))
    if sampling.max_clips is None or num_clips <= sampling.max_clips:
        starts_s = np.arange(num_clips) * clip_duration_s
    else:
        starts_s = np.linspace(0.0, duration_s - clip_duration_s, sampling.max_clips)
    offsets_s = np.arange(sampling.frames_per_clip) * (clip_duration_s / sampling.frames_per_clip)
    ends_s = np.minimum(starts_s + clip_duration_s, duration_s)
    return starts_s[:, None] + offsets_s, np.stack([starts_s, ends_s], axis=1)


def sample_uniform(
    duration_s: float, sampling: ClipSampling, source_fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """`max_clips` clips whose frames lie evenly over the whole video, each mid-way in its share."""
    assert sampling.max_clips is not None, "ClipSampling checks this"
    num_frames = sampling.max_clips * sampling.frames_per_clip
    times_s = (np.arange(num_frames) + 0.5) * (duration_s / num_frames)
    edges_s = np.linspace(0.0, duration_s, sampling.max_clips + 1)
    return times_s.reshape(sampling.max_clips, -1), np.stack([edges_s[:-1], edges_s[1:]], axis=1)


def sample_center(
    duration_s: float, sampling: ClipSampling, source_fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The frame in the middle of the video, repeated to one clip: what a single picture tells."""
    middle_s = duration_s / 2
    return np.full((1, sampling.frames_per_clip), middle_s), np.full((1, 2), middle_s)


def sample_released(
    duration_s: float, sampling: ClipSampling, source_fps: float
) -> tuple[np.ndarray, np.ndarray]:
    """As the released code does (`calculate_sample_indices`; facts, 2.2), flaws included.

    It counts frames rather than seconds and rounds their spacing down, so that clips drift ahead of
    their seconds and the last frames of some videos are never seen; a clip ends at its last frame,
    1.5 s after its first. Each time is the middle of a frame's showing.

    Raises:
        ValueError: No frame rate is given.
    """
    if not source_fps > 0:
        raise ValueError("the released sampling counts frames: it needs the video's frame rate")
    num_frames = max(1, round(duration_s * source_fps))
    num_clips = max(1, math.ceil(num_frames / source_fps / sampling.clip_duration_s))
    if sampling.max_clips is not None:
        num_clips = min(num_clips, sampling.max_clips)
    wanted = sampling.frames_per_clip
    spacing = source_fps * sampling.clip_duration_s / wanted  # in frames
    step = max(1, int(spacing))
    # Where frames are rarer than looks at them, each is looked at several times.
    repeats = 1 if spacing > 0.5 else min(wanted, int(1 / spacing))
    length = step * wanted // repeats
    part = num_frames // num_clips
    if repeats == 1 and part > length:  # far apart: each in the middle of its part
        first = (part - length) // 2 + np.arange(num_clips) * part
    elif spacing * wanted < 1:  # less than a frame for a clip: the released code asks for frame -1
        first = np.arange(num_clips) * num_frames // num_clips
    else:
        first = np.arange(num_clips) * (max(0, num_frames - length) // max(1, num_clips - 1))
    inside = np.repeat(np.arange(0, length, step), repeats)
    inside = np.minimum(inside, num_frames - 1)
    indices = first[:, None] + np.pad(inside, (0, wanted - len(inside)), mode="edge")
    return (indices + 0.5) / source_fps, indices[:, [0, -1]] / source_fps


Sampler = Callable[[float, ClipSampling, float], tuple[np.ndarray, np.ndarray]]
SAMPLERS: dict[str, Sampler] = {
    "fps": sample_fps,
    "uniform": sample_uniform,
    "center": sample_center,
    "released": sample_released,
}
"""Name of a mode -> (duration in seconds, how, frame rate) -> times and spans."""


def max_clips_for_budget(token_budget: int, tokens_per_clip: int) -> int:
    """How many clips fit into `token_budget` tokens of the LLM's context.

    Raises:
        ValueError: not even one fits.
    """
    if tokens_per_clip < 1 or token_budget < tokens_per_clip:
        raise ValueError(
            f"a budget of {token_budget} tokens holds no clip of {tokens_per_clip} tokens; "
            "raise the budget or use fewer tokens per clip"
        )
    return token_budget // tokens_per_clip
