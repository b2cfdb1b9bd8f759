"""The processor's two halves as vLLM and SGLang want them: pictures, or frames and what is known of
their file, in; one tensor out.

Everywhere else a video comes as loaded clips (apollo/media.py), cut by the file's own timestamps.
An engine decodes the file itself and hands over frames; here the same clips are cut from them by
`index / fps`, the only times that there are. It also moves tensors about by name, and SGLang knows
no other names than `pixel_values` and `pixel_values_videos`: so the squares of all encoders travel
as one row of bytes for each picture or clip (`pack`), which the model takes apart (`unpack`). Read
next: docs/engines.md for the commands, `processing.py` for the text.

Shapes: F given frames, C clips, T frames of a clip, S frame size of an encoder, P bytes of a row.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import logging
from transformers.video_utils import load_video

if TYPE_CHECKING:
    from .processing import ApolloProcessor

logger = logging.get_logger(__name__)

Grid = tuple[np.ndarray, np.ndarray]  # times or places (C, T), and spans (C, 2) in seconds
# A frame at its very time counts as shown; as in apollo/video/decode.py.
_TOLERANCE_S = 1e-6
CURE = '--media-io-kwargs \'{"video": {"num_frames": -1}}\''


@dataclass(frozen=True, eq=False)
class FrameClips:
    """Clips cut from given frames, with the fields of apollo.video's `VideoClips` that are read.

    Attributes:
        squares: For each encoder its frames, uint8 (C, T, S, S, 3).
        spans_s: float64 (C, 2), start and end of each clip.
        duration_s: Length of the video.
    """

    squares: tuple[np.ndarray, ...]
    spans_s: np.ndarray
    duration_s: float

    @property
    def frames(self) -> np.ndarray:
        """The first encoder's frames."""
        return self.squares[0]


class ApolloImageProcessor:
    """The image half of an `ApolloProcessor`; `model_input_names` are what it claims as its own."""

    model_input_names = ["pixel_values"]

    def __init__(self, processor: "ApolloProcessor") -> None:
        self.processor = processor

    @property
    def size(self) -> dict[str, int]:
        """The largest square that an encoder takes; larger pictures give no more tokens."""
        side = max(square.image_size for square in self.processor.squares)
        return {"height": side, "width": side}

    def to_json_string(self) -> str:
        """Say how pictures are prepared, as transformers' own processors do."""
        return json.dumps(self.processor.preprocessing, indent=2, sort_keys=True)

    def __call__(self, images: Sequence[Any]) -> dict[str, Any]:
        """Return `pixel_values`, a row for each picture, uint8 (C, P); one frame of each clip."""
        pixels = self.processor.pixels([("image", image) for image in images])
        return {"pixel_values": pack([part[:, :1] for part in pixels])}


class ApolloVideoProcessor(ApolloImageProcessor):
    """The video half.

    Attributes:
        do_sample_frames: Tells an engine to hand over metadata with the frames.
    """

    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    do_sample_frames = True

    @property
    def temporal_patch_size(self) -> int:
        """Frames T of a clip: an engine measures its memory with multiples of these."""
        return self.processor.frames_per_clip

    @property
    def fps(self) -> float:
        """Frames per second inside a clip."""
        return self.processor.frames_per_clip / self.processor.clip_duration_s

    def __call__(
        self, videos: Sequence[Any], video_metadata: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Cut videos into clips.

        Args:
            videos: Of each its frames, uint8 (F, H, W, 3), or an address that transformers loads.
            video_metadata: Of each what is known of the file, see `cut_clips`.

        Returns:
            `pixel_values_videos`, a row for each clip of all videos, uint8 (C, P);
            `video_grid_thw` (videos, 3): the number of rows of each, and two ones; `clips`, a
            `FrameClips` of each, for the text.
        """
        metadata = video_metadata if video_metadata is not None else [None] * len(videos)
        if len(metadata) != len(videos):
            raise ValueError(f"{len(videos)} videos came with {len(metadata)} video_metadata")
        clips = [self._clips(*video) for video in zip(videos, metadata, strict=True)]
        return {
            "pixel_values_videos": pack(self.processor.pixels([("video", c) for c in clips])),
            "video_grid_thw": torch.tensor([[len(c.spans_s), 1, 1] for c in clips]),
            "clips": clips,
        }

    def _clips(self, video: Any, metadata: Any) -> FrameClips:
        if isinstance(video, str):
            address: Any = video  # which load_video's annotation forgets
            video, metadata = load_video(address, sample_indices_fn=self._wanted_indices)
        if metadata is None:
            raise ValueError(
                "frames need video_metadata (total_num_frames, fps, frames_indices): without it "
                "nobody knows when they were shown"
            )
        return cut_clips(video, metadata, self.processor)

    def _wanted_indices(self, metadata: Any, **kwargs: Any) -> np.ndarray:
        """What `load_video` asks: which frames of a file to keep."""
        return np.unique(wanted_frames(metadata, self.processor)[0])


def wanted_frames(
    metadata: Mapping[str, Any], processor: "ApolloProcessor"
) -> tuple[np.ndarray, np.ndarray, float]:
    """Choose the clips of a video.

    Args:
        metadata: `total_num_frames` and `fps` of its file.
        processor: Says how to sample.

    Returns:
        Indices of the frames, int64 (C, T); `spans_s` (C, 2); the video's duration.

    Raises:
        ValueError: The metadata do not say how long the video is.
    """
    num_frames, fps = metadata.get("total_num_frames"), metadata.get("fps")
    if not num_frames or not fps or not math.isfinite(fps):
        raise ValueError(
            f"the video's length is unknown ({num_frames} frames at {fps} per second); store it in "
            "a container that says it, such as MP4"
        )
    if processor.sampling not in SAMPLERS:
        raise ValueError(
            f"engines can sample in the ways {', '.join(SAMPLERS)}, not {processor.sampling!r}"
        )
    duration_s = num_frames / fps
    times_s, spans_s = SAMPLERS[processor.sampling](duration_s, fps, processor)
    indices = np.floor((times_s + _TOLERANCE_S) * fps).astype(np.int64)
    return np.minimum(indices, num_frames - 1), spans_s, duration_s


def cut_clips(frames: Any, metadata: Mapping[str, Any], processor: "ApolloProcessor") -> FrameClips:
    """Cut clips from frames of a video.

    Where a frame on the clips' grid is not among the given ones, the nearest takes its place, up to
    half of the spacing inside a clip. If that is not enough, as with the 32 frames that are vLLM's
    default, consecutive frames make the clips, announced by their true times: the uniform sampling
    that the paper shows to be worse. Either is said once.

    Args:
        frames: uint8 (F, H, W, 3), an array or a tensor on any device.
        metadata: `total_num_frames` and `fps` of the file, and `frames_indices` (F,): which of its
            frames these are, in rising order; without it, all of them.
        processor: Says how to sample and what each encoder sees.

    Raises:
        ValueError: The frames are of another shape or do not match the metadata.
    """
    frames = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"a video's frames must be uint8 (frames, height, width, 3), got {frames.dtype} "
            f"{frames.shape}"
        )
    wanted, spans_s, duration_s = wanted_frames(metadata, processor)
    given = metadata.get("frames_indices")
    given = np.arange(metadata["total_num_frames"]) if given is None else np.asarray(given)
    if len(given) != len(frames):
        raise ValueError(f"{len(frames)} frames came with {len(given)} frames_indices")
    places = _nearest(given, wanted)
    spacing_s = processor.clip_duration_s / processor.frames_per_clip
    beside_s = np.abs(given[places] - wanted).max() / metadata["fps"]
    if beside_s > spacing_s / 2:
        logger.warning_once(
            f"the frames of a video are too few: Apollo's clips need one every {spacing_s:g} s. "
            "They are taken as they are, far apart, which the model was not trained on. Let the "
            f"engine hand over all frames, in vLLM with {CURE}"
        )
        places, spans_s = _consecutive(given / metadata["fps"], duration_s, processor)
    elif beside_s:
        logger.warning_once(
            "some frames that Apollo's clips need were not handed over; their neighbours are "
            f"taken. To see what the model was trained on, hand over all, in vLLM with {CURE}"
        )
    shape = places.shape
    kept, places = np.unique(places, return_inverse=True)
    squares = [
        np.stack([square.square(frames[place]) for place in kept])[places.reshape(shape)]
        for square in processor.squares
    ]
    return FrameClips(tuple(squares), spans_s, duration_s)


def _nearest(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the places of the numbers of rising `given` nearest to `wanted`, the first of two."""
    right = np.searchsorted(given, wanted).clip(1, max(1, len(given) - 1))
    left = right - 1
    right = right.clip(max=len(given) - 1)
    return np.where(wanted - given[left] <= given[right] - wanted, left, right)


def _consecutive(times_s: np.ndarray, duration_s: float, processor: "ApolloProcessor") -> Grid:
    """Make clips of frames as they come: their places (C, T), and spans that leave no gap."""
    most = processor.max_clips * processor.frames_per_clip
    places = np.arange(len(times_s))
    if len(places) > most:
        places = np.linspace(0, len(times_s) - 1, most).astype(np.int64)
    padded = np.pad(places, (0, -len(places) % processor.frames_per_clip), mode="edge")
    clips = padded.reshape(-1, processor.frames_per_clip)
    starts_s = times_s[clips[:, 0]]
    return clips, np.stack([starts_s, np.append(starts_s[1:], duration_s)], axis=1)


# ---- the grid of clips ---------------------------------------------------------------------------


def sample_fps(duration_s: float, source_fps: float, processor: "ApolloProcessor") -> Grid:
    """As `apollo.video.sampling.sample_fps`, which says why.

    The model stands alone and cannot import it; tests/test_engines.py holds the two together, as it
    does for `sample_released`.
    """
    length_s, num_frames = processor.clip_duration_s, processor.frames_per_clip
    num_clips = max(1, math.ceil(duration_s / length_s - 0.01))
    starts_s = np.arange(num_clips) * length_s
    if num_clips > processor.max_clips:
        starts_s = np.linspace(0.0, duration_s - length_s, processor.max_clips)
    offsets_s = np.arange(num_frames) * (length_s / num_frames)
    ends_s = np.minimum(starts_s + length_s, duration_s)
    return starts_s[:, None] + offsets_s, np.stack([starts_s, ends_s], axis=1)


def sample_released(duration_s: float, source_fps: float, processor: "ApolloProcessor") -> Grid:
    """As `apollo.video.sampling.sample_released`: the released code's way, flaws included."""
    length_s, wanted = processor.clip_duration_s, processor.frames_per_clip
    num_frames = max(1, round(duration_s * source_fps))
    num_clips = max(1, math.ceil(num_frames / source_fps / length_s))
    num_clips = min(num_clips, processor.max_clips)
    spacing = source_fps * length_s / wanted  # in frames
    step = max(1, int(spacing))
    repeats = 1 if spacing > 0.5 else min(wanted, int(1 / spacing))
    length = step * wanted // repeats
    part = num_frames // num_clips
    if repeats == 1 and part > length:
        first = (part - length) // 2 + np.arange(num_clips) * part
    elif spacing * wanted < 1:
        first = np.arange(num_clips) * num_frames // num_clips
    else:
        first = np.arange(num_clips) * (max(0, num_frames - length) // max(1, num_clips - 1))
    inside = np.minimum(np.repeat(np.arange(0, length, step), repeats), num_frames - 1)
    indices = first[:, None] + np.pad(inside, (0, wanted - len(inside)), mode="edge")
    return (indices + 0.5) / source_fps, indices[:, [0, -1]] / source_fps


SAMPLERS: dict[str, Callable[[float, float, "ApolloProcessor"], Grid]] = {
    "fps": sample_fps,
    "released": sample_released,
}
"""The processor's `sampling` -> (duration in seconds, frame rate, processor) -> times and spans."""


# ---- one tensor for all encoders -----------------------------------------------------------------


def pack(pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lay the clips (C, T, 3, S, S) of each encoder side by side: uint8 (C, P)."""
    return torch.cat([part.flatten(1) for part in pixels], dim=1)


def unpack(
    rows: torch.Tensor, image_sizes: Sequence[int], frames_per_clip: int
) -> list[torch.Tensor]:
    """Undo `pack`; a row of one frame, a picture, becomes a clip that repeats it.

    Args:
        rows: uint8 (C, P).
        image_sizes: For each encoder its frame size S.
        frames_per_clip: Frames T of a clip.

    Returns:
        For each encoder (C, T, 3, S, S).

    Raises:
        ValueError: The rows hold neither one frame nor T.
    """
    shapes = [(3, size, size) for size in image_sizes]
    lengths = [math.prod(shape) for shape in shapes]
    num_frames = 1 if rows.shape[1] == sum(lengths) else frames_per_clip
    if rows.shape[1] != num_frames * sum(lengths):
        raise ValueError(
            f"a row of pixels must be of {sum(lengths)} or {frames_per_clip} times as many bytes, "
            f"got {rows.shape[1]}; use the model's own processor"
        )
    parts = rows.split([num_frames * length for length in lengths], dim=1)
    return [
        part.unflatten(1, (num_frames, *shape)).expand(-1, frames_per_clip, *shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]
