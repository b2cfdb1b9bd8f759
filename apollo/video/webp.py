"""Animated WebP, which FFmpeg cannot decode: Pillow can, and hands it over as Matroska in memory.

The copy is lossless (FFV1) and has the animation's own timestamps, so that decode.py reads it like
any other file. Animations are short; a long one costs the memory of its compressed copy.
"""

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
from PIL import Image

_MILLISECONDS = Fraction(1, 1000)


def is_animated_webp(source: str | Path | bytes) -> bool:
    """Whether it is a WebP whose header has the animation flag (RFC 9649, 2.7)."""
    if isinstance(source, bytes):
        head = source[:21]
    else:
        with Path(source).open("rb") as file:
            head = file.read(21)
    is_extended = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X"
    return is_extended and len(head) == 21 and bool(head[20] & 2)


def webp_to_matroska(source: str | Path | bytes) -> bytes:
    """Copy the frames of an animated WebP, transparency included, into a Matroska file.

    Raises:
        OSError: Pillow cannot read it.
    """
    copy = BytesIO()
    with (
        Image.open(BytesIO(source) if isinstance(source, bytes) else source) as picture,
        av.open(copy, "w", format="matroska") as container,
    ):
        # The header wants a rate: that of the first frame will do.
        stream = container.add_stream("ffv1", rate=Fraction(1000, _duration_ms(picture)))
        stream.width, stream.height, stream.pix_fmt = *picture.size, "bgra"
        stream.codec_context.time_base = _MILLISECONDS
        time_ms = 0
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            frame = av.VideoFrame.from_image(picture.convert("RGBA")).reformat(format="bgra")
            frame.pts, frame.time_base = time_ms, _MILLISECONDS
            time_ms += _duration_ms(picture)
            for packet in stream.encode(frame):
                packet.duration = time_ms - frame.pts
                container.mux(packet)
        container.mux(stream.encode(None))
    return copy.getvalue()


def _duration_ms(picture: Image.Image) -> int:
    """How long the current frame is shown; for 0, what browsers make of it."""
    picture.load()
    return int(picture.info.get("duration", 0)) or 100
