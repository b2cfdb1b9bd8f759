"""Pixels and time: open a video, choose moments, get the frames shown then.

Knows nothing of models and needs no torch. decode.py opens files and finds frames by their true
timestamps, sampling.py chooses moments, clips.py joins the two.

    clips = load_clips("earth.mp4", ClipSampling(max_clips=8))
    clips.frames.shape, clips.times_s[0]
"""

from apollo.video.clips import VideoClips, load_clips
from apollo.video.decode import (
    DamagedVideoError,
    Frames,
    NotAVideoError,
    NoVideoStreamError,
    VideoError,
    VideoInfo,
    VideoNotFoundError,
    VideoReader,
    open_video,
)
from apollo.video.sampling import SAMPLERS, ClipSampling, max_clips_for_budget, sample

__all__ = [
    "SAMPLERS",
    "ClipSampling",
    "DamagedVideoError",
    "Frames",
    "NoVideoStreamError",
    "NotAVideoError",
    "VideoClips",
    "VideoError",
    "VideoInfo",
    "VideoNotFoundError",
    "VideoReader",
    "load_clips",
    "max_clips_for_budget",
    "open_video",
    "sample",
]
