"""Frames of a video by the time they are shown, from any file that FFmpeg reads (through PyAV).

Time is what the container says (presentation timestamps, PTS), counted from the first frame; it is
never computed as index / fps, which is wrong for variable frame rates, B-frames and files that do
not start at zero. The frame at time t is the one on the screen at t: the last whose timestamp is
not later. Files that cannot be read give one of the errors below, each saying what is wrong, where,
and what to do. apollo/video/clips.py builds on this.
"""

import heapq
import io
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation

logger = logging.getLogger(__name__)

# Timestamps are multiples of at least 1/90000 s in practice: this only absorbs rounding of the
# request.
_TOLERANCE_S = 1e-6
# A gap shorter than this is decoded through: a seek goes back to a keyframe, typically a few
# seconds earlier.
_MIN_SEEK_GAP_S = 3.0
# H.264 and HEVC reorder over at most 16 frames, so no timestamp is further than this from its
# place; a file that mixes them up does so within its first group of B-frames.
_MAX_REORDER, _NUM_PROBED = 16, 8
# FFmpeg's names for what a format lacks (AVFMT_* in avformat.h).
_NO_TIMESTAMPS, _TS_DISCONT = 0x0080, 0x0200
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


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video after opening it.

    Attributes:
        duration_s: From the first frame to the end of the last one.
        start_s: The first frame's timestamp on the container's clock; other times count from it.
        source_fps: Average frame rate.
        width: In pixels, as shown (after rotation).
        height: In pixels, as shown.
        codec: FFmpeg's name, as "h264".
        container: FFmpeg's name, as "matroska,webm".
        has_audio: Whether there is a sound track.
        num_frames: What the header says; None where it says nothing.
    """

    duration_s: float
    start_s: float
    source_fps: float
    width: int
    height: int
    codec: str
    container: str
    has_audio: bool
    num_frames: int | None


@dataclass(frozen=True, eq=False)
class Frames:
    """Decoded frames: `pixels` uint8 (T frames, H, W, 3 RGB) and their `times_s` float64 (T,)."""

    pixels: np.ndarray
    times_s: np.ndarray


class _TimedFrame(NamedTuple):
    time_s: float  # from the first frame of the video
    frame: av.VideoFrame


def open_video(source: str | Path | bytes) -> "VideoReader":
    """Open a video, given as a path or as the bytes of a file, for use in a `with` statement.

    Raises:
        VideoNotFoundError: no such file, or a directory, or no permission.
        NotAVideoError: empty, or not a format or codec that can be read.
        NoVideoStreamError: no video stream.
        DamagedVideoError: not a single frame decodes.
    """
    return VideoReader(source)


class VideoReader:
    """An open video; made by `open_video`.

    The reader stands at a frame (`_current`) and has decoded one more (`_next`), so that it knows
    how long the current one is shown. It only moves forward, converts only frames that were asked
    for, and seeks where that saves decoding.
    """

    info: VideoInfo
    _container: InputContainer
    _current: _TimedFrame
    _next: _TimedFrame | None

    def __init__(self, source: str | Path | bytes):
        self._source = source
        self._name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
        if not isinstance(source, bytes):
            _check_path(self._name)
        if not (source if isinstance(source, bytes) else Path(source).stat().st_size):
            raise NotAVideoError(f"{self._name} is empty; copy or download it again")
        self._num_damaged = 0
        self._longest_gop_s = 0.0
        self._reorder = 0
        self._start_ticks = 0
        self._open_container()
        try:
            self._read_info()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        self.close()
        if self._num_damaged and error_type is None:  # an error says enough by itself
            logger.warning("%s: skipped %d damaged packet(s)", self._name, self._num_damaged)

    def close(self) -> None:
        """Free the decoder and the file."""
        self._container.close()

    def frames_at(
        self, times_s: Sequence[float] | np.ndarray, size: tuple[int, int] | None = None
    ) -> Frames:
        """Decode the frames on the screen at the given times.

        Args:
            times_s: Seconds from the first frame, in any order; beyond the end is the last frame.
            size: Height and width in pixels to scale to; by default the video's.

        Raises:
            ValueError: a time that is negative or not a number.
            DamagedVideoError: decoding stops clearly before a wanted frame, as in a truncated file.
        """
        wanted_s = np.asarray(times_s, dtype=np.float64)
        if wanted_s.ndim != 1 or not np.all(np.isfinite(wanted_s)) or np.any(wanted_s < 0):
            raise ValueError(f"times must be a list of seconds from 0, not {times_s}")
        height, width = size or (self.info.height, self.info.width)
        pixels = np.empty((len(wanted_s), height, width, 3), dtype=np.uint8)
        found_s = np.empty(len(wanted_s))
        previous: int | None = None
        for index in np.argsort(wanted_s, kind="stable"):
            shown = self._frame_at(float(wanted_s[index]))
            if previous is not None and found_s[previous] == shown.time_s:
                pixels[index] = pixels[previous]
            else:
                pixels[index] = self._to_rgb(shown.frame, height, width)
            found_s[index], previous = shown.time_s, index
        return Frames(pixels, found_s)

    # ---- where the reader stands -----------------------------------------------------------------

    def _frame_at(self, time_s: float) -> _TimedFrame:
        """Move to the frame shown at `time_s` and return it."""
        gap_s = time_s - (self._next.time_s if self._next else self._current.time_s)
        goes_back = time_s < self._current.time_s - _TOLERANCE_S
        if goes_back or (self._next and gap_s > max(_MIN_SEEK_GAP_S, self._longest_gop_s)):
            self._seek(time_s)
        while self._next is not None and self._next.time_s <= time_s + _TOLERANCE_S:
            self._current, self._next = self._next, next(self._timed_frames, None)
        if self._next is None:
            self._check_complete(time_s)
        return self._current

    def _seek(self, time_s: float) -> None:
        """Stand at some frame not later than `time_s`, if possible at the keyframe before it."""
        # Some formats find a place by decoding time, or roughly: if too late, try further back.
        for margin_s in (0.0, 2.0, 10.0):
            ticks = int((time_s - margin_s + _TOLERANCE_S) / self._tick_s)
            if ticks <= 0 or not self._has_timestamps:
                break
            try:
                self._container.seek(self._start_ticks + ticks, stream=self._stream)
            except av.error.FFmpegError:
                break
            self._timed_frames = self._time(self._decode(from_keyframe=True))
            first = next(self._timed_frames, None)
            if first is not None and first.time_s <= time_s + _TOLERANCE_S:
                self._current, self._next = first, next(self._timed_frames, None)
                self._longest_gop_s = max(self._longest_gop_s, time_s - first.time_s)
                return
        self._rewind()

    def _rewind(self) -> None:
        """Stand at the first frame. Opening again is the one way that works for every format."""
        self._reopen()
        self._timed_frames = self._time(self._decode())
        self._current, self._next = next(self._timed_frames), next(self._timed_frames, None)

    def _check_complete(self, time_s: float) -> None:
        """Past the last frame that decodes: make sure that the video really ends here."""
        end_s = self._current.time_s + 1 / self.info.source_fps
        if time_s > end_s and self._last_frame_s - end_s > _slack(self.info.duration_s):
            raise DamagedVideoError(
                f"{self._name} is truncated or damaged: it should last "
                f"{self.info.duration_s:.1f} s but can be decoded only up to {end_s:.1f} s; "
                "copy or download it again"
            )

    # ---- from file to frames ---------------------------------------------------------------------

    def _open_container(self) -> None:
        file = (
            io.BytesIO(self._source) if isinstance(self._source, bytes) else f"file:{self._source}"
        )
        only_files = {"protocol_whitelist": "file"}  # a hostile playlist must not make us fetch
        try:
            self._container = av.open(
                file, mode="r", metadata_errors="ignore", container_options=only_files
            )
        except av.error.PermissionError as error:
            raise VideoNotFoundError(f"{self._name} cannot be read: no permission") from error
        except av.error.FFmpegError as error:
            raise NotAVideoError(
                f"{self._name} is not a video that can be read ({error.strerror}); "
                "it may be of another type, or its end may be missing"
            ) from error
        try:
            self._stream = _choose_stream(self._container, self._name)
        except VideoError:
            self._container.close()
            raise
        # Slice threads, not frame threads: those decode several frames ahead, which each seek
        # throws away, and have deadlocked in processes that load a second FFmpeg. Many videos at
        # once are the business of data workers.
        self._stream.thread_type = "SLICE"

    def _reopen(self) -> None:
        self._container.close()
        self._open_container()

    def _decode(self, from_keyframe: bool = False) -> Iterator[av.VideoFrame]:
        """Frames in order of presentation from where the container stands.

        Damaged packets are counted and skipped.

        Args:
            from_keyframe: After a seek: skip what lies before the next keyframe, in the file or on
                the screen, because it needs frames that were never decoded.
        """
        first_ticks = None
        for packet in _packets(self._container, self._stream):
            if from_keyframe and packet.size:
                if not packet.is_keyframe:
                    continue
                from_keyframe, first_ticks = False, packet.pts
            try:
                frames = packet.decode()
            except av.error.EOFError:  # told to give its last frames, the decoder has none
                continue
            except av.error.FFmpegError:
                self._num_damaged += 1
                continue
            for frame in frames:
                if first_ticks is None or frame.pts is None or frame.pts >= first_ticks:
                    yield frame

    def _time(self, frames: Iterator[av.VideoFrame]) -> Iterator[_TimedFrame]:
        """Give each frame its time; times increase strictly.

        Some writers (old AVI files with B-frames, MP4 files without composition offsets) attach the
        right timestamps to the wrong frames. Decoders still return the frames in order, so the
        timestamps are sorted over a short window.
        """
        waiting: deque[av.VideoFrame] = deque()
        ticks: list[int] = []
        last_ticks = None
        for index, frame in enumerate(
            itertools.chain(frames, itertools.repeat(None, self._reorder))
        ):
            if frame is not None:
                waiting.append(frame)
                heapq.heappush(ticks, self._ticks_of(frame, index))
            if index < self._reorder or not waiting:
                continue
            shown, shown_ticks = waiting.popleft(), heapq.heappop(ticks)
            if last_ticks is None or shown_ticks > last_ticks:
                last_ticks = shown_ticks
                yield _TimedFrame((shown_ticks - self._start_ticks) * self._tick_s, shown)

    def _ticks_of(self, frame: av.VideoFrame, index: int) -> int:
        if frame.pts is not None:
            return frame.pts
        if frame.dts is not None:
            return frame.dts
        # A bare stream of pictures: its rate is all there is.
        return round(index / (self._fps * self._tick_s))

    def _to_rgb(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
        """Convert and scale a frame, upright. Returns uint8 (H, W, 3 RGB)."""
        turns = _quarter_turns(frame)
        if turns % 2:
            height, width = width, height
        shrinks = height < frame.height or width < frame.width
        interpolation = Interpolation.AREA if shrinks else Interpolation.BICUBIC
        try:
            rgb = frame.to_ndarray(
                format="rgb24", width=width, height=height, interpolation=interpolation
            )
        except av.error.FFmpegError as error:  # a damaged header may name impossible colours
            raise DamagedVideoError(
                f"{self._name} is damaged: its frames cannot be shown ({error.strerror}); "
                "copy or download it again"
            ) from error
        return np.rot90(rgb, turns)

    # ---- what the video is -----------------------------------------------------------------------

    def _read_info(self) -> None:
        """Find the start, the end and the shape of the video, and stand at its first frame."""
        stream, container = self._stream, self._container
        assert stream.time_base is not None, "only streams being written lack it"
        self._tick_s = float(stream.time_base)
        self._fps = float(stream.average_rate or stream.guessed_rate or 25)
        promised_s = _promised_end(container, stream)
        ends = self._find_ends(promised_s)

        self._reopen()
        decoder = self._decode()
        first = list(itertools.islice(decoder, _NUM_PROBED))
        if not first:
            raise DamagedVideoError(
                f"{self._name} is damaged: none of its frames can be decoded; "
                "copy or download it again"
            )
        self._has_timestamps = first[0].pts is not None
        ticks = [self._ticks_of(frame, index) for index, frame in enumerate(first)]
        self._reorder = 0 if all(a < b for a, b in itertools.pairwise(ticks)) else _MAX_REORDER
        self._start_ticks = min(ticks)
        start_s = self._start_ticks * self._tick_s

        duration_s, self._last_frame_s = ends.video_s - start_s, ends.last_frame_s - start_s
        if promised_s is not None and promised_s - ends.any_s > _slack(promised_s - start_s):
            # Truncated: what is there may be used, and who asks for the rest is told so.
            duration_s = self._last_frame_s = promised_s - start_s
        turned = _quarter_turns(first[0]) % 2 == 1
        height, width = first[0].height, first[0].width
        self.info = VideoInfo(
            duration_s=max(duration_s, 0.0),
            start_s=start_s,
            source_fps=self._fps,
            width=height if turned else width,
            height=width if turned else height,
            codec=self._stream.codec_context.name,
            container=self._container.format.name,
            has_audio=len(self._container.streams.audio) > 0,
            num_frames=self._stream.frames or None,
        )
        self._timed_frames = self._time(itertools.chain(first, decoder))
        self._current, self._next = next(self._timed_frames), next(self._timed_frames, None)

    def _find_ends(self, promised_s: float | None) -> "_Ends":
        """Read the packets of the last seconds, or all if that fails, without decoding."""
        if promised_s is not None:
            try:
                self._container.seek(int(promised_s / self._tick_s), stream=self._stream)
                ends = _read_ends(self._container, self._stream, self._fps)
                if ends is not None:
                    return ends
            except av.error.FFmpegError as error:
                logger.debug("%s: cannot seek to the end: %s", self._name, error)
            self._reopen()
        return _read_ends(self._container, self._stream, self._fps) or _Ends(0.0, 0.0, 0.0)


class _Ends(NamedTuple):
    """On the container's clock, in seconds."""

    last_frame_s: float  # when the last frame appears
    video_s: float  # when it disappears
    any_s: float  # when the last stream of any kind ends


def _packets(container: InputContainer, *streams: av.VideoStream) -> Iterator[av.Packet]:
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


def _read_ends(container: InputContainer, stream: av.VideoStream, fps: float) -> _Ends | None:
    """Read packets to the end of the file; None if none of them is of the video stream."""
    last_frame_s = video_s = any_s = -float("inf")
    num_packets = 0
    for packet in _packets(container):
        is_video = packet.stream.index == stream.index and packet.size > 0
        ticks = packet.pts if packet.pts is not None else packet.dts
        if ticks is None or packet.time_base is None:
            if not is_video:
                continue
            start_s, duration_s = num_packets / fps, 1 / fps  # a bare stream of pictures
        else:
            start_s = float(ticks * packet.time_base)
            duration_s = float((packet.duration or 0) * packet.time_base) or (
                1 / fps if is_video else 0.0
            )
        any_s = max(any_s, start_s + duration_s)
        if is_video:
            num_packets += 1
            last_frame_s, video_s = max(last_frame_s, start_s), max(video_s, start_s + duration_s)
    return _Ends(last_frame_s, video_s, any_s) if num_packets else None


def _promised_end(container: InputContainer, stream: av.VideoStream) -> float | None:
    """The end on the container's clock by its header; None for formats that do not say."""
    if container.format.flags & (_TS_DISCONT | _NO_TIMESTAMPS):
        return None
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        return float(
            stream.frames / stream.average_rate
        )  # the duration itself is cut by FFmpeg to what it finds
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    if (
        container.duration is not None
    ):  # in Matroska an end, elsewhere a length: the smaller reading promises less
        return container.duration / av.time_base
    return None


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


def _slack(duration_s: float) -> float:
    """How much shorter than its header says a video may be without counting as truncated."""
    return max(1.0, 0.1 * duration_s)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that show the frame upright; phones write them."""
    return round(frame.rotation / 90) % 4
