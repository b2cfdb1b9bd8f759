"""From uint8 frames to what an encoder takes: pad to a square, resize, normalise.

Each encoder was pre-trained with its own size, colours and resizing, and a picture prepared another
way is another picture to it; so each encoder of a model has its own `Preprocessing`. Follows the
released code (`mm_utils.py`), which never crops: the frame is padded with the encoder's mean colour
first. Squares are made frame by frame while a video is decoded (apollo/video/clips.py), so that no
full-size video is ever held, and this needs no torch. Pixels stay uint8, a quarter of the memory,
until an encoder takes them (`encoders.encode`). Read next: `encoders.py` for who uses what,
`processing.py` for the text.

Shapes: H height, W width, S the encoder's frame size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

Colour = tuple[int, int, int]


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

    def faster(self) -> Preprocessing:
        """The same with the decoder's bicubic filter in the place of Pillow's, a little different.

        The bilinear one stays: decoders antialias, it does not, and it is quick as it is.
        """
        return replace(self, resize="decoder") if self.resize == "pillow_bicubic" else self

    @property
    def longest_side(self) -> int | None:
        """The longest side to which whoever decodes a frame may scale it; None if it may not."""
        return self.image_size if self.resize == "decoder" else None

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """All of it for frames, uint8 (N, H, W, 3): float32 (N, 3, S, S)."""
        squares = np.stack([self.square(frame) for frame in frames])
        return self.normalise(channels_first(squares))

    def square(self, frame: np.ndarray) -> np.ndarray:
        """Pad and resize a frame, uint8 (H, W, 3) RGB, to uint8 (S, S, 3).

        Raises:
            ValueError: If the frame is not uint8 (H, W, 3) with at least one pixel.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(f"a frame must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        if 0 in frame.shape:
            raise ValueError(f"the frame holds no pixels: {frame.shape}")
        red, green, blue = (int(255 * value) for value in self.mean)
        if max(frame.shape[:2]) == self.image_size:
            return pad_to_square(frame, (red, green, blue))
        return RESIZES[self.resize](frame, self.image_size, (red, green, blue))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bring uint8 pixels (..., 3, S, S) to the encoder's scale: float32, on their device."""
        import torch

        mean, std = (
            torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std).contiguous()


def channels_first(squares: np.ndarray) -> torch.Tensor:
    """See squares, uint8 (..., S, S, 3), as a tensor (..., 3, S, S); copied only if read-only."""
    import torch

    return torch.from_numpy(np.require(np.moveaxis(squares, -1, -3), requirements=["W"]))


def pad_to_square(frame: np.ndarray, colour: Colour) -> np.ndarray:
    """Centre a frame (H, W, 3) on a square of `colour`; an odd pixel goes below or right."""
    height, width, _ = frame.shape
    side = max(height, width)
    if height == width:
        return frame
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = colour
    square[top : top + height, left : left + width] = frame
    return square


def resize_pillow_bicubic(frame: np.ndarray, size: int, colour: Colour) -> np.ndarray:
    """Pad, then resize as SigLIP's processor does, by Pillow's bicubic filter.

    It antialiases when it shrinks. No other library gives its numbers: torch's antialiased bicubic
    differs by up to 5 levels. Pillow resizes rows first, then columns, so the rows of padding above
    and below a wide frame need not go through the first pass.
    """
    height, width, _ = frame.shape
    if height > width:
        frame = pad_to_square(frame, colour)
    picture = Image.fromarray(frame).resize((size, height), Image.Resampling.BICUBIC)
    side = max(height, width)
    padded = Image.new("RGB", (size, side), colour)
    padded.paste(picture, (0, (side - height) // 2))
    return np.asarray(padded.resize((size, size), Image.Resampling.BICUBIC))


def resize_bilinear(frame: np.ndarray, size: int, colour: Colour) -> np.ndarray:
    """Pad, then resize as InternVideo2's processor does, by OpenCV's bilinear filter.

    It does not antialias, so of a large frame most pixels are never looked at. OpenCV computes with
    weights in units of 1/2048 and drops bits between its two passes; this does the same, so that no
    pixel differs. (Torch's floats are one level off in 7 % of them.)
    """
    height, width, _ = frame.shape
    side = max(height, width)
    index, next_index, weight, next_weight = _bilinear_weights(side, size)
    columns, is_beside = _inside(np.stack([index, next_index]), (side - width) // 2, width)
    blend = np.full((size, size, 3), 2, dtype=np.int32)
    for rows, row_weight in ((index, weight), (next_index, next_weight)):
        rows, is_above = _inside(rows, (side - height) // 2, height)
        lines = frame.take(rows, axis=0)
        near, far = (lines.take(column, axis=1).astype(np.int32) for column in columns)
        near[:, is_beside[0]] = far[:, is_beside[1]] = colour
        near[is_above] = far[is_above] = colour
        wide = near * weight[:, None] + far * next_weight[:, None]  # (S, S, 3), times 2048
        blend += (row_weight[:, None, None] * (wide >> 4)) >> 16
    return (blend >> 2).astype(np.uint8)


def _inside(places: np.ndarray, padding: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places on the padded square as places in the frame, and which of them lie outside of it."""
    places = places - padding
    return places.clip(0, length - 1), (places < 0) | (places >= length)


def _bilinear_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return for each new pixel its two neighbours among the old, and their weights times 2048."""
    place = ((np.arange(new, dtype=np.float32) + 0.5) * (old / new) - 0.5).astype(np.float32)
    place = place.clip(0, old - 1)
    index = place.astype(np.int64)
    next_weight = np.rint((place - index) * 2048).astype(np.int32)
    return index, np.minimum(index + 1, old - 1), 2048 - next_weight, next_weight


def resize_before_padding(frame: np.ndarray, size: int, colour: Colour) -> np.ndarray:
    """Resize, then pad: the fast way. A video's frames come resized by its decoder already."""
    height, width, _ = frame.shape
    scale = size / max(height, width)
    shape = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(frame).resize(shape, Image.Resampling.BICUBIC)
    return pad_to_square(np.asarray(picture), colour)


RESIZES = {
    "pillow_bicubic": resize_pillow_bicubic,
    "bilinear": resize_bilinear,
    "decoder": resize_before_padding,
}
"""Name of a way to resize -> function (uint8 (H, W, 3), S, colour) -> uint8 (S, S, 3). The first
two are those of the reference, pixel for pixel; "decoder" lets a video's decoder scale the frames,
which is faster and a little different (docs/released.md).
"""
