"""From uint8 frames to what an encoder takes: pad to a square, resize, normalise.

Each encoder was pre-trained with its own size, colours and resizing, and a picture prepared another
way is another picture to it; so each encoder of a model has its own `Preprocessing`. Follows the
released code (`mm_utils.py`), which never crops: the frame is padded with the encoder's mean colour
first. Read next: `encoders.py` for who uses what, `processing.py` for the text.

Shapes: N frames, H height, W width, S the encoder's frame size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """How one encoder wants its frames.

    Args:
        image_size: Height and width in pixels.
        mean: Mean of each channel, on a scale of 0 to 1.
        std: Standard deviation of each channel.
        resize: One of `RESIZES`.
    """

    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    resize: str

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ValueError(f"unknown resize {self.resize!r}; choose from {', '.join(RESIZES)}")

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """Prepare frames.

        Args:
            frames: uint8 (N, H, W, 3), RGB.

        Returns:
            float32 (N, 3, S, S).

        Raises:
            ValueError: If the frames are not uint8 (N, H, W, 3) with at least one pixel.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames must be uint8 (N, H, W, 3), got {frames.dtype} {tuple(frames.shape)}"
            )
        if 0 in frames.shape[1:]:
            raise ValueError(f"frames hold no pixels: {tuple(frames.shape)}")
        square = pad_to_square(frames, tuple(int(255 * value) for value in self.mean))
        if square.shape[1] != self.image_size:
            square = RESIZES[self.resize](square, self.image_size)
        pixels = torch.from_numpy(np.ascontiguousarray(square)).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std).contiguous()


def pad_to_square(frames: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """Centre frames (N, H, W, 3) on a square of `colour`; an odd pixel goes below or right."""
    num_frames, height, width, _ = frames.shape
    if height == width:
        return frames
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((num_frames, side, side, 3), dtype=np.uint8)
    square[:] = np.asarray(colour, dtype=np.uint8)
    square[:, top : top + height, left : left + width] = frames
    return square


def resize_pillow_bicubic(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize square frames as SigLIP's processor does, by Pillow's bicubic filter.

    It antialiases when it shrinks. It works frame by frame, but no other library gives its numbers:
    torch's antialiased bicubic differs by up to 5 levels.
    """
    out = np.empty((len(frames), size, size, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
        out[index] = np.asarray(picture)
    return out


def resize_bilinear(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize square frames as InternVideo2's processor does, by OpenCV's bilinear filter.

    It does not antialias. OpenCV computes with weights in units of 1/2048 and drops bits between
    its two passes; this does the same, so that no pixel differs. (Torch's floats are one level off
    in 7 % of them.)
    """
    index, next_index, weight, next_weight = _bilinear_weights(frames.shape[1], size)
    out = np.empty((len(frames), size, size, 3), dtype=np.uint8)
    for resized, frame in zip(out, frames, strict=True):  # one at a time stays in the CPU's cache
        wide = frame.take(index, axis=1) * weight[:, None]
        wide += frame.take(next_index, axis=1) * next_weight[:, None]  # (S0, S, 3), times 2048
        wide >>= 4
        blend = (weight[:, None, None] * wide[index]) >> 16
        blend += (next_weight[:, None, None] * wide[next_index]) >> 16
        resized[:] = (blend + 2) >> 2
    return out


def _bilinear_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return for each new pixel its two neighbours among the old, and their weights times 2048."""
    place = ((np.arange(new, dtype=np.float32) + 0.5) * (old / new) - 0.5).astype(np.float32)
    place = place.clip(0, old - 1)
    index = place.astype(np.int64)
    next_weight = np.rint((place - index) * 2048).astype(np.int32)
    return index, np.minimum(index + 1, old - 1), 2048 - next_weight, next_weight


RESIZES = {"pillow_bicubic": resize_pillow_bicubic, "bilinear": resize_bilinear}
"""Name of a way to resize -> function (uint8 (N, S0, S0, 3), S) -> uint8 (N, S, S, 3)."""
