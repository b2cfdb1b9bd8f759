"""Opening a file: what it is, which of its streams is the video, and clear errors if it is none.

Here because a file that is not what its name says is the rule in large collections: each error says
what is wrong, where, and what to do. Whether a file was cut off is read from its own structure.
decode.py builds on this.
"""

import io
from math import inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition

# Containers that FFmpeg probes successfully although they are texts that refer to other files, or
# no video at all.
_NOT_VIDEO_CONTAINERS = {"hls", "dash", "concat", "ffmetadata", "tty"}


class VideoError(ValueError):
    """A video that cannot be used. Each subclass is one reason, with a message for the user."""


class VideoNotFoundError(VideoError):
    """There is no readable file at the path."""


class NotAVideoError(VideoError):
    """The file is not of a video format that can be read."""


class NoVideoStreamError(VideoError):
    """The file holds no moving picture, for example only sound."""


class DamagedVideoError(VideoError):
    """The file is a video, but the wanted frames cannot be decoded."""


class OpenFile(NamedTuple):
    """An open container, its video stream, and what decodes it."""

    container: InputContainer
    stream: av.VideoStream
    decoder: av.VideoCodecContext


def check_source(source: str | Path | bytes, name: str) -> None:
    """Refuse what cannot be a file with something in it."""
    if not isinstance(source, bytes):
        _check_path(name)
    if not (source if isinstance(source, bytes) else Path(source).stat().st_size):
        raise NotAVideoError(f"{name} is empty; copy or download it again")


def open_file(source: str | Path | bytes, name: str) -> OpenFile:
    """Open a path or bytes, called `name` in messages."""
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    only_files = {"protocol_whitelist": "file"}  # a hostile playlist must not make us fetch
    try:
        container = av.open(file, mode="r", metadata_errors="ignore", container_options=only_files)
    except av.error.PermissionError as error:
        raise VideoNotFoundError(f"{name} cannot be read: no permission") from error
    except av.error.FFmpegError as error:
        raise NotAVideoError(
            f"{name} is not a video that can be read ({error.strerror}); "
            "it may be of another type, or its end may be missing"
        ) from error
    try:
        stream = _choose_stream(container, name)
    except VideoError:
        container.close()
        raise
    return OpenFile(container, stream, _decoder_of(stream))


def _choose_stream(container: InputContainer, name: str) -> av.VideoStream:
    if container.format.name in _NOT_VIDEO_CONTAINERS:
        raise NotAVideoError(
            f"{name} is not a video but {container.format.long_name}; give the video file itself"
        )
    # A cover picture in a sound file is a video stream to FFmpeg.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise NoVideoStreamError(
            f"{name} holds no video, only {_kinds(container)}; give a file with moving pictures"
        )
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise NotAVideoError(
            f"{name} uses a video codec that cannot be decoded; convert it, for example to H.264"
        )
    return stream


def _decoder_of(stream: av.VideoStream) -> av.VideoCodecContext:
    """The stream's decoder; for WebM with transparency, which FFmpeg's own leave out, libvpx."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if name and stream.metadata.get("alpha_mode") == "1" and name in av.codecs_available:
        return av.CodecContext.create(name, "r")  # type: ignore[return-value]
    return stream.codec_context


def _kinds(container: InputContainer) -> str:
    kinds = {"picture" if s.type == "video" else s.type for s in container.streams}
    return " and ".join(sorted(kinds)) or "nothing"


def _check_path(path: str) -> None:
    if "://" in path:
        raise VideoNotFoundError(f"{path} is a URL; download the video and give the file's path")
    if not Path(path).exists():
        raise VideoNotFoundError(f"{path} does not exist; check the path of the video")
    if Path(path).is_dir():
        raise VideoNotFoundError(f"{path} is a directory; give the path of one video file")


# ---- whether it is whole -------------------------------------------------------------------------


def is_whole(source: str | Path | bytes) -> bool:
    """Whether the lengths written in a file's own structure fit into the file.

    Then nothing was cut off, and a header that promises more than the last frame is wrong. False
    where the format has no such lengths (MPEG streams), or none were written (live recordings).
    """
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head[:4] == b"RIFF":  # AVI
            return 8 + int.from_bytes(head[4:8], "little") <= size
        if head[:4] == b"\x1aE\xdf\xa3":  # Matroska, WebM: the EBML header, then one segment
            return _segment_end(file) <= size
        if head[:3] == b"FLV":  # each tag is followed by its length
            return _is_flv_tag_at_end(file, size)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):  # MP4, MOV
            return _last_box_end(file, size) == size
    return False


def _last_box_end(file: BinaryIO, size: int) -> int:
    """Walk the boxes of the top level; past the file's size if one of them is incomplete."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0 is "to the end of the file", whatever that may be
            return size + 1
        place += length
    return place


def _segment_end(file: BinaryIO) -> float:
    file.seek(4)
    header_length = _vint(file)
    if header_length == inf:
        return inf
    file.seek(int(header_length), io.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return inf
    return _vint(file) + file.tell()


def _vint(file: BinaryIO) -> float:
    """A length in EBML: the leading zero bits say how many bytes follow; all ones is unknown."""
    first = (file.read(1) or b"\0")[0]
    extra = 8 - first.bit_length()
    if extra == 8:
        return inf if not first else 0.0
    value = int.from_bytes(bytes([first & (0x7F >> extra)]) + file.read(extra), "big")
    return inf if value == 2 ** (7 * (extra + 1)) - 1 else value


def _is_flv_tag_at_end(file: BinaryIO, size: int) -> bool:
    file.seek(max(0, size - 4))
    length = int.from_bytes(file.read(4), "big")
    if not 11 <= length <= size - 4:
        return False
    file.seek(size - 4 - length + 1)
    return int.from_bytes(file.read(3), "big") == length - 11
