"""From a decoded frame to RGB pixels as a player shows them: upright, of the right shape.

decode.py calls this for the wanted frames only. The pixels are converted as they are: high dynamic
range is not tone-mapped, interlaced fields stay woven, and what is transparent is shown over black.
"""

from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter


def display_size(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Height and width as shown: pixels that are not square widened or narrowed, then turned."""
    height, width = frame.height, frame.width
    if pixel_aspect and 1 / 16 < pixel_aspect < 16:  # beyond, a mistake of the header
        width = max(1, round(width * pixel_aspect))
    return (width, height) if _quarter_turns(frame) % 2 else (height, width)


def convert_to_rgb(
    reformatter: VideoReformatter, frame: av.VideoFrame, height: int, width: int
) -> np.ndarray:
    """Convert and scale a frame, upright. Returns uint8 (H, W, 3 RGB).

    Args:
        reformatter: Remembers what the last conversion was prepared for; one for each thread.
        frame: Decoded.
        height: As shown, after rotation.
        width: As shown.

    Raises:
        av.error.FFmpegError: no conversion from the frame's colours is known.
    """
    turns = _quarter_turns(frame)
    if turns % 2:
        height, width = width, height
    has_alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    picture = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgba" if has_alpha else "rgb24",
        interpolation=Interpolation.BICUBIC,  # of all, the closest to Pillow's filter
        threads=1,
    )
    rows = np.frombuffer(memoryview(picture.planes[0]), np.uint8).reshape(height, -1)
    channels = 4 if has_alpha else 3
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    if has_alpha:
        opacity = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * opacity + 127) // 255).astype(np.uint8)
    return np.rot90(pixels, turns)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that show the frame upright; phones write them."""
    return round(frame.rotation / 90) % 4
