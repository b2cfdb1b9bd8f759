"""What a question's video shows under a condition, decoded where it cannot hang.

All answerers that look share this: they differ in how a video is sampled and in what becomes of its
frames, not in what "frame" or "shuffled" means. Free of torch. Read next: `answerers.py`.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from apollo.eval.questions import Question
from apollo.video import ClipSampling, GuardedLoader, VideoClips

VIDEO_TIME_LIMIT_S = 300.0
"""Longest that a video may take to load: what hangs a decoder is unreadable, too."""
CENTRE_FRAME = ClipSampling("center", frames_per_clip=1)


class Watcher:
    """Decodes what a condition shows; called as `Answerer.watch` is.

    Args:
        sampling: How clips are chosen from a video.
        squares: What the encoders see of a frame, prepared while decoding; see `load_clips`.
    """

    def __init__(self, sampling: ClipSampling, squares: Sequence[Any] = ()) -> None:
        self.sampling, self.squares = sampling, squares
        self.loader = GuardedLoader(VIDEO_TIME_LIMIT_S)

    def __call__(self, question: Question, condition: str) -> VideoClips | None:
        """Load the clips; None where nothing is shown.

        Raises:
            VideoError: The video cannot be read, or takes too long.
        """
        if condition == "text":
            return None
        if condition == "frame":
            return self.loader.load(question.video, CENTRE_FRAME)
        clips = self.loader.load(question.video, self.sampling, squares=self.squares)
        return shuffled(clips, question.video_id) if condition == "shuffled" else clips


def shuffled(clips: VideoClips, video_id: str) -> VideoClips:
    """Put the frames of all clips into an order that is drawn by the video's id.

    The spans, which the prompt states, stay as they were; `times_s` are the frames' true ones.
    """
    order = list(range(clips.times_s.size))
    seed = int(hashlib.sha256(video_id.encode()).hexdigest(), 16)
    random.Random(seed).shuffle(order)

    def permute(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(order), *array.shape[2:])[order].reshape(array.shape)

    squares = tuple(permute(square) for square in clips.squares)
    frames = squares[0] if squares else permute(clips.frames)
    return replace(clips, frames=frames, times_s=permute(clips.times_s), squares=squares)
