"""Load a video or an image as a model wants to see it.

The processor saved with a model knows how a video is to be sampled and what each encoder sees of a
frame; it opens no files. apollo/video opens files and knows no models. This joins the two, so that
chat, training and evaluation all look at a video in the same way.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from apollo.video import ClipSampling, VideoClips, load_clips

if TYPE_CHECKING:
    from PIL.Image import Image

    from apollo.model import ApolloProcessor


def sampling_of(processor: ApolloProcessor, mode: str | None = None) -> ClipSampling:
    """How a model wants videos sampled: as it was trained, or in another mode (`SAMPLERS`)."""
    return ClipSampling(
        mode=mode or processor.sampling,
        frames_per_clip=processor.frames_per_clip,
        clip_duration_s=processor.clip_duration_s,
        max_clips=processor.max_clips,
    )


def load_video(
    source: str | Path | bytes,
    processor: ApolloProcessor,
    mode: str | None = None,
    num_threads: int | None = None,
) -> VideoClips:
    """Load the clips of a video, ready for a model's encoders.

    Args:
        source: A file's path, or the bytes of a file.
        processor: The processor saved with the model.
        mode: A sampling mode other than the processor's.
        num_threads: See `apollo.video.open_video`.

    Raises:
        VideoError: The video cannot be opened or decoded.
    """
    return load_clips(
        source, sampling_of(processor, mode), squares=processor.squares, num_threads=num_threads
    )


def load_image(source: str | Path | bytes) -> Image:
    """Open an image, upright and in RGB.

    Raises:
        ValueError: It is not an image that can be read.
        OSError: The file cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        name = f"<{len(source)} bytes>" if isinstance(source, bytes) else source
        raise ValueError(f"{name} is not an image that can be read") from error
