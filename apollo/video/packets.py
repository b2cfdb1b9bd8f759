"""What the packets of a file tell without decoding them: where it ends, which are needed.

decode.py turns packets into frames; this module answers two questions before that: when does the
video end (headers lie), and which packets have to be decoded to show the wanted moments exactly.
"""

import itertools
import logging
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import NamedTuple

import av
from av.container import InputContainer

logger = logging.getLogger(__name__)

# FFmpeg's names for what a format lacks (AVFMT_* in avformat.h).
NO_TIMESTAMPS, _TS_DISCONT = 0x0080, 0x0200
# Decoders that leave out exactly the frames that no other frame refers to, when told so
# (AVDISCARD_NONREF); dav1d and libvpx take no notice, others have not been compared.
_SKIPPING_CODECS = {"h264", "hevc", "mpeg2video", "mpeg4"}
_NUM_REMEMBERED = 64  # timestamps; H.264 and HEVC reorder over at most 16 frames


class Ends(NamedTuple):
    """What the packets up to the end of the file say, on the container's clock, in seconds."""

    last_frame_s: float  # when the last frame appears
    video_s: float  # when it disappears
    any_s: float  # when the last stream of any kind ends
    fps: float | None  # average rate of the frames that were read


def demux(container: InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
    """Packets of the given streams, or of all, to the end of the file.

    Each stream's last packet is empty and tells the decoder to give the frames it still holds; it
    is made up where the data breaks off and so none came.
    """
    try:
        yield from container.demux(*streams)
    except (av.error.FFmpegError, IndexError) as error:
        # IndexError: PyAV trips at the end over a stream that had appeared only after opening.
        logger.debug("%s ends early: %s", container.name, error)
        for stream in streams:
            packet = av.Packet(0)
            packet.stream = stream
            yield packet


# ---- where the video ends ------------------------------------------------------------------------


def read_ends(container: InputContainer, stream: av.VideoStream, fps: float) -> Ends | None:
    """Read packets to the end of the file; None if none of them is of the video stream."""
    first_s, last_frame_s = inf, -inf
    video_s = any_s = -inf
    num_packets = 0
    for packet in without_leaps(demux(container)):
        is_video = packet.stream.index == stream.index and packet.size > 0
        if packet.is_discard:  # cut off by an edit list
            continue
        ticks = packet.pts if packet.pts is not None else packet.dts
        if ticks is None or packet.time_base is None:
            if not is_video:
                continue
            start_s = max(last_frame_s, -1 / fps) + 1 / fps  # not every packet has a timestamp
            duration_s = 1 / fps
        else:
            start_s = float(ticks * packet.time_base)
            duration_s = float((packet.duration or 0) * packet.time_base) or (
                1 / fps if is_video else 0.0
            )
        any_s = max(any_s, start_s + duration_s)
        if is_video:
            num_packets += 1
            first_s, last_frame_s = min(first_s, start_s), max(last_frame_s, start_s)
            video_s = max(video_s, start_s + duration_s)
    if not num_packets:
        return None
    spans_s = last_frame_s - first_s
    return Ends(last_frame_s, video_s, any_s, (num_packets - 1) / spans_s if spans_s else None)


def without_leaps(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """Leave out packets whose decoding time leaps ahead, so that their stream's next comes back.

    By more than a second: FFmpeg's guesses where a file has no decoding times may step back.
    """
    held: dict[int, av.Packet] = {}
    for packet in packets:
        previous = held.get(packet.stream.index)
        if previous is not None and not _comes_back(packet, previous):
            yield previous
        held[packet.stream.index] = packet
    yield from held.values()


def _comes_back(packet: av.Packet, previous: av.Packet) -> bool:
    if packet.dts is None or previous.dts is None or packet.time_base is None:
        return False
    return (previous.dts - packet.dts) * packet.time_base > 1


def promised_end(container: InputContainer, stream: av.VideoStream) -> float | None:
    """The end on the container's clock by its header; None for formats that do not say."""
    if container.format.flags & (_TS_DISCONT | NO_TIMESTAMPS):
        return None
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        # FFmpeg cuts the duration itself to what it finds.
        return float(stream.frames / stream.average_rate)
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    if container.duration is not None:
        # In Matroska an end, elsewhere a length: the smaller reading promises less.
        return container.duration / av.time_base
    return None


# ---- which packets are needed --------------------------------------------------------------------


def may_skip(stream: av.VideoStream) -> bool:
    """Whether the decoder can leave out frames without changing any other.

    HEVC with temporal layers cannot: what a frame's type says holds within its layer only. The
    number of layers stands in the header of MP4 and Matroska (ISO/IEC 14496-15, 8.3.3.1).
    """
    context = stream.codec_context
    if context.name != "hevc":
        return context.name in _SKIPPING_CODECS
    header = context.extradata or b""
    return len(header) > 21 and header[0] == 1 and (header[21] >> 3) & 7 == 1


def mark_needed(
    packets: Iterable[av.Packet], is_wanted: Callable[[int, float], bool]
) -> Iterator[tuple[av.Packet, bool]]:
    """Give each packet with whether its frame is wanted.

    A frame is shown from its timestamp to the next one in order of presentation, which may lie in a
    packet further on: packets are read ahead until it is certain. That is when a packet's decoding
    time has passed it, because no frame is shown before it is decoded.

    Args:
        packets: In order of decoding.
        is_wanted: Asked for each frame in turn, with the ticks at which it appears and disappears.

    Yields:
        Each packet. One without a timestamp, and all behind it, are wanted for safety.
    """
    waiting: deque[av.Packet] = deque()
    starts: list[int] = []  # of the packets in reach, in order of presentation
    decoded_to: float = -inf

    def judge(packet: av.Packet) -> tuple[av.Packet, bool]:
        if packet.is_discard or not packet.size:  # cut out by an edit list; the end of the stream
            return packet, not packet.size
        assert packet.pts is not None
        place = bisect_right(starts, packet.pts)
        return packet, is_wanted(packet.pts, starts[place] if place < len(starts) else inf)

    packets = iter(packets)
    for packet in packets:
        pts = packet.pts
        if packet.size and pts is None:
            yield from ((p, True) for p in itertools.chain(waiting, [packet], packets))
            return
        waiting.append(packet)
        if pts is None:
            continue
        if not packet.is_discard:
            insort(starts, pts)
        if packet.dts is not None:  # Matroska has none: FFmpeg infers them after some frames
            decoded_to = packet.dts
        num_certain = bisect_right(starts, decoded_to)
        while waiting and num_certain and (waiting[0].pts or 0) < starts[num_certain - 1]:
            yield judge(waiting.popleft())
        if num_certain > _NUM_REMEMBERED:  # what lies that far back was given out long ago
            first = min((p.pts or 0 for p in waiting), default=starts[num_certain - 1])
            del starts[: max(0, min(num_certain, bisect_right(starts, first)) - 1)]
    yield from map(judge, waiting)
