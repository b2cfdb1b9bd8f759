"""Pixels and time: open a video, choose moments, get the frames shown then.

Knows nothing of models and needs no torch. decode.py opens files and finds frames by their true
timestamps, sampling.py chooses moments, clips.py joins the two, guard.py does so under limits.

    clips = load_clips("earth.mp4", ClipSampling(max_clips=8))
    clips.frames.shape, clips.times_s[0]
"""

from apollo.video.clips import Square, VideoClips, load_clips
from apollo.video.decode import BACKENDS, Frames, VideoInfo, VideoReader, open_video
from apollo.video.files import (
    DamagedVideoError,
    NotAVideoError,
    NoVideoStreamError,
    VideoError,
    VideoNotFoundError,
)
from apollo.video.guard import ClipStream, GuardedLoader, VideoLimitError, load_many
from apollo.video.sampling import SAMPLERS, ClipSampling, max_clips_for_budget, sample

__all__ = [
    "BACKENDS",
    "SAMPLERS",
    "ClipSampling",
    "ClipStream",
    "DamagedVideoError",
    "Frames",
    "GuardedLoader",
    "NoVideoStreamError",
    "NotAVideoError",
    "Square",
    "VideoClips",
    "VideoError",
    "VideoInfo",
    "VideoLimitError",
    "VideoNotFoundError",
    "VideoReader",
    "load_clips",
    "load_many",
    "max_clips_for_budget",
    "open_video",
    "sample",
]
