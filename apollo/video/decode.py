"""Frames of a video by the time they are shown, from any file that FFmpeg reads (through PyAV).

Time is what the container says (presentation timestamps, PTS), counted from the first frame; it is
never computed as index / fps, which is wrong for variable frame rates, B-frames and files that do
not start at zero. The frame at time t is the one on the screen at t: the last whose timestamp is
not later. Files that cannot be read give one of the errors of files.py.

Only what is needed is decoded: the reader seeks to the keyframe before a wanted moment, leaves
out frames that nobody asked for and no other frame refers to (packets.py says which), converts the
wanted ones only, and lets several readers share the work. apollo/video/clips.py builds on this.
"""

import copy
import heapq
import itertools
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from apollo.runtime import num_available_cores
from apollo.video.files import DamagedVideoError, check_source, is_whole, open_file
from apollo.video.packets import (
    NO_TIMESTAMPS,
    Ends,
    demux,
    mark_needed,
    may_skip,
    promised_end,
    read_ends,
)
from apollo.video.pixels import convert_to_rgb, display_size
from apollo.video.webp import is_animated_webp, webp_to_matroska

logger = logging.getLogger(__name__)

# Timestamps are multiples of at least 1/90000 s in practice: this only absorbs rounding of the
# request.
_TOLERANCE_S = 1e-6
# Where the keyframes are not known, a gap shorter than this is decoded through: a seek goes back to
# a keyframe, typically a few seconds earlier.
_MIN_SEEK_GAP_S = 3.0
# Seeking to a keyframe that is known must save at least this much decoding, for it empties the
# decoder.
_MIN_SAVED_S = 0.25
# H.264 and HEVC reorder over at most 16 frames, so no timestamp is further than this from its
# place; a file that mixes them up does so within its first group of B-frames.
_MAX_REORDER, _NUM_PROBED = 16, 8
# Several readers pay when each has to decode this many pixels, about 50 ms of work. A reader takes
# one of several parts at a time, so that all finish together.
_MIN_PIXELS_PER_READER, _PARTS_PER_READER = 5e7, 4
# What an unknown keyframe may cost: the default distance of x264 at 25 to 30 frames per second.
_LIKELY_GOP_S = 8.0
Visitor = Callable[[np.ndarray, Callable[..., np.ndarray]], None]


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


def open_video(
    source: str | Path | bytes, num_threads: int | None = None, backend: str = "pyav"
) -> "VideoReader":
    """Open a video, given as a path or as the bytes of a file, for use in a `with` statement.

    Args:
        source: A file's path, or its bytes.
        num_threads: How many readers may share the decoding of one request; by default one for each
            core that the process may use. Data workers, of which there are many, take 1.
        backend: What decodes, one of `BACKENDS`.

    Raises:
        ValueError: there is no such backend, or it is not installed.
        VideoNotFoundError: no such file, or a directory, or no permission.
        NotAVideoError: empty, or not a format or codec that can be read.
        NoVideoStreamError: no video stream.
        DamagedVideoError: not a single frame decodes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    return BACKENDS[backend](source, num_threads)


class VideoReader:
    """An open video; made by `open_video`.

    The reader stands at a frame (`_current`) and has decoded one more (`_next`), so that it knows
    how long the current one is shown. It only moves forward and seeks where that saves decoding.
    """

    info: VideoInfo
    _container: InputContainer
    _current: _TimedFrame | None
    _next: _TimedFrame | None

    def __init__(self, source: str | Path | bytes, num_threads: int | None = None):
        self._source = source
        self._name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
        check_source(source, self._name)
        if is_animated_webp(source):
            try:
                self._source = webp_to_matroska(source)
            except (OSError, SyntaxError) as error:  # Pillow's words for damage
                raise DamagedVideoError(
                    f"{self._name} is damaged: its frames cannot be decoded ({error}); "
                    "copy or download it again"
                ) from error
        self._num_threads = num_threads or num_available_cores()
        self._helpers: list[VideoReader] = []
        self._num_damaged = 0
        self._longest_gop_s = 0.0
        self._reorder = 0
        self._start_ticks = 0
        self._wanted_s: np.ndarray | None = None  # None: whatever comes
        self._judged_to_s = 0.0
        self._reformatter = VideoReformatter()
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
        num_damaged = sum(reader._num_damaged for reader in (self, *self._helpers))
        if num_damaged and error_type is None:  # an error says enough by itself
            logger.warning("%s: skipped %d damaged packet(s)", self._name, num_damaged)

    def close(self) -> None:
        """Free the decoders and the file."""
        for reader in (self, *self._helpers):
            reader._container.close()

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
        height, width = size or (self.info.height, self.info.width)
        pixels = np.empty((len(times_s), height, width, 3), dtype=np.uint8)

        def put(places: np.ndarray, to_rgb: Callable[..., np.ndarray]) -> None:
            pixels[places] = to_rgb(size)

        return Frames(pixels, self.visit(times_s, put))

    def visit(self, times_s: Sequence[float] | np.ndarray, visitor: Visitor) -> np.ndarray:
        """Call `visitor(places, to_rgb)` for each frame on the screen at the given times.

        Of the frames only what the visitor keeps stays in memory. It may be called from several
        threads at once and for the frames in any order.

        Args:
            times_s: As in `frames_at`.
            visitor: Gets the places in `times_s` at which the frame is shown, and a function that
                converts it: `to_rgb(size)` returns uint8 (H, W, 3) of the size (height, width), or
                of the video's without one.

        Returns:
            float64 (T,): the true times of the frames.

        Raises:
            ValueError: a time that is negative or not a number.
            DamagedVideoError: decoding stops clearly before a wanted frame, as in a truncated file.
        """
        wanted_s = check_times(times_s)
        found_s = np.empty(len(wanted_s))
        order = np.argsort(wanted_s, kind="stable")
        parts = deque(np.split(order, self._cuts(wanted_s[order])))
        if len(parts) == 1:
            self._work(parts, wanted_s, found_s, visitor)
            return found_s
        while len(self._helpers) < self._num_threads - 1:
            self._helpers.append(self._another())
        readers = [self, *self._helpers]
        with ThreadPoolExecutor(len(readers)) as pool:
            work = [pool.submit(r._work, parts, wanted_s, found_s, visitor) for r in readers]
        for future in work:
            future.result()
        return found_s

    # ---- sharing the work ------------------------------------------------------------------------

    def _cuts(self, sorted_s: np.ndarray) -> list[int]:
        """Places at which to cut the sorted times into parts of about equal cost.

        Times within one group of pictures stay together where the keyframes are known: its frames
        would otherwise be decoded twice.
        """
        if self._num_threads == 1 or len(sorted_s) < 2 or not self._has_pts:
            return []
        if len(self._keyframes_s):
            group = np.searchsorted(self._keyframes_s, sorted_s + _TOLERANCE_S)
            firsts = np.flatnonzero(np.diff(group, prepend=-1))
            lasts_s = sorted_s[np.append(firsts[1:], len(sorted_s)) - 1]
            costs_s = lasts_s - self._keyframes_s[np.maximum(group[firsts] - 1, 0)]
            num_parts = self._num_threads * _PARTS_PER_READER
        else:
            firsts = np.arange(len(sorted_s))
            costs_s = np.minimum(np.diff(sorted_s, prepend=0.0), _LIKELY_GOP_S)
            num_parts = self._num_threads
        done_s = np.cumsum(np.maximum(costs_s, 1 / self._fps))
        pixels = done_s[-1] * self._fps * self.info.height * self.info.width
        if pixels < self._num_threads * _MIN_PIXELS_PER_READER:
            return []
        share = np.floor((done_s - done_s[0]) * num_parts / done_s[-1])
        return firsts[np.flatnonzero(np.diff(share)) + 1].tolist()

    def _another(self) -> "VideoReader":
        """A reader of the same file that knows what this one knows, and stands nowhere."""
        other = copy.copy(self)
        other._helpers, other._num_damaged = [], 0
        other._reformatter = VideoReformatter()
        other._current = other._next = None
        other._open_container()
        return other

    def _work(
        self, parts: deque[np.ndarray], wanted_s: np.ndarray, found_s: np.ndarray, visitor: Visitor
    ) -> None:
        """Take parts, each the places of increasing times, until none is left."""
        try:
            while parts:
                try:
                    places = parts.popleft()
                except IndexError:  # another reader was faster
                    return
                self._read_part(places, wanted_s[places], found_s, visitor)
        except BaseException:
            parts.clear()  # the request has failed: let the other readers stop
            raise

    def _read_part(
        self, places: np.ndarray, wanted_s: np.ndarray, found_s: np.ndarray, visitor: Visitor
    ) -> None:
        if len(wanted_s) and wanted_s[0] < self._judged_to_s - _TOLERANCE_S:
            self._current = None  # frames have been left out there that may be wanted now
        self._wanted_s = wanted_s
        shown: _TimedFrame | None = None
        same: list[int] = []  # places of the frame that is shown
        for place, time_s in zip(places, wanted_s, strict=True):
            now = self._frame_at(float(time_s))
            if shown is not None and now.time_s != shown.time_s:
                self._show(shown, same, visitor)
                same = []
            shown = now
            same.append(place)
            found_s[place] = now.time_s
        if shown is not None:
            self._show(shown, same, visitor)

    def _show(self, shown: _TimedFrame, places: list[int], visitor: Visitor) -> None:
        def to_rgb(size: tuple[int, int] | None = None) -> np.ndarray:
            height, width = size or (self.info.height, self.info.width)
            try:
                return convert_to_rgb(self._reformatter, shown.frame, height, width)
            except av.error.FFmpegError as error:  # a damaged header may name impossible colours
                raise DamagedVideoError(
                    f"{self._name} is damaged: its frames cannot be shown ({error.strerror}); "
                    "copy or download it again"
                ) from error

        visitor(np.array(places), to_rgb)

    # ---- where the reader stands -----------------------------------------------------------------

    def _frame_at(self, time_s: float) -> _TimedFrame:
        """Move to the frame shown at `time_s` and return it."""
        if self._is_seek_worth(time_s):
            self._seek(time_s)
        while self._next is not None and self._next.time_s <= time_s + _TOLERANCE_S:
            self._current, self._next = self._next, next(self._timed_frames, None)
        assert self._current is not None, "to seek is to stand somewhere"
        if self._next is None:
            self._check_complete(self._current.time_s, time_s)
        return self._current

    def _is_seek_worth(self, time_s: float) -> bool:
        if self._current is None or time_s < self._current.time_s - _TOLERANCE_S:
            return True
        if self._next is None:  # at the end
            return False
        place = bisect_right(self._keyframes_s, time_s)
        if place and place < len(self._keyframes_s):
            return self._keyframes_s[place - 1] > self._next.time_s + _MIN_SAVED_S
        return time_s - self._next.time_s > max(_MIN_SEEK_GAP_S, self._longest_gop_s)

    def _seek(self, time_s: float) -> None:
        """Stand at some frame not later than `time_s`, if possible at the keyframe before it."""
        # Some formats find a place by decoding time, or roughly: if too late, try further back.
        for margin_s in (0.0, 2.0, 10.0):
            ticks = int((time_s - margin_s + _TOLERANCE_S) / self._tick_s)
            if ticks <= 0 or not self._has_pts:
                break
            try:
                self._container.seek(self._start_ticks + ticks, stream=self._stream)
                self._decoder.flush_buffers()
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

    def _check_complete(self, last_s: float, time_s: float) -> None:
        """Past the last frame that decodes: make sure that the video really ends here."""
        end_s = last_s + 1 / self.info.source_fps
        if time_s > end_s and self._last_frame_s - end_s > _slack(self.info.duration_s):
            raise DamagedVideoError(
                f"{self._name} is truncated or damaged: it should last "
                f"{self.info.duration_s:.1f} s but can be decoded only up to {end_s:.1f} s; "
                "copy or download it again"
            )

    # ---- from file to frames ---------------------------------------------------------------------

    def _open_container(self) -> None:
        self._container, self._stream, self._decoder = open_file(self._source, self._name)
        # Slice threads, not frame threads: those decode several frames ahead, which each seek
        # throws away, and have deadlocked in processes that load a second FFmpeg. What one request
        # needs is shared between readers instead.
        self._decoder.thread_type = "SLICE"
        self._decoder.thread_count = self._num_threads

    def _reopen(self) -> None:
        self._container.close()
        self._open_container()

    def _decode(self, from_keyframe: bool = False) -> Iterator[av.VideoFrame]:
        """Frames in order of presentation from where the container stands.

        Damaged packets are counted and skipped; frames that are not wanted may be missing.

        Args:
            from_keyframe: After a seek: skip what lies before the next keyframe, in the file or on
                the screen, because it needs frames that were never decoded.
        """
        packets = demux(self._container, self._stream)
        first_ticks, is_early = None, from_keyframe
        if from_keyframe:
            packets = itertools.dropwhile(
                lambda p: p.size and (not p.is_keyframe or p.pts is None), packets
            )
            first = next(packets)  # there is always the empty one
            first_ticks, packets = first.pts, itertools.chain([first], packets)
        self._judged_to_s = 0.0
        for packet, is_wanted in mark_needed(packets, self._is_wanted):
            self._decoder.skip_frame = "DEFAULT" if is_wanted or not self._may_skip else "NONREF"
            try:
                frames = self._decoder.decode(packet)
            except av.error.EOFError:  # told to give its last frames, the decoder has none
                continue
            except MemoryError:  # which FFmpeg counts among its own: no damage of the file
                raise
            except av.error.FFmpegError:
                self._num_damaged += 1
                continue
            for frame in frames:
                if is_early and frame.pts is not None:
                    is_early = first_ticks is not None and frame.pts < first_ticks
                if not is_early:
                    yield frame

    def _is_wanted(self, start: int, end: float) -> bool:
        """Whether any wanted moment lies from `start` to before `end`, in ticks of the stream."""
        if self._wanted_s is None:
            return True
        start_s, end_s = ((t - self._start_ticks) * self._tick_s for t in (start, end))
        self._judged_to_s = max(self._judged_to_s, end_s)
        place = np.searchsorted(self._wanted_s, start_s - _TOLERANCE_S)
        return bool(place < len(self._wanted_s) and self._wanted_s[place] < end_s)

    def _time(self, frames: Iterator[av.VideoFrame]) -> Iterator[_TimedFrame]:
        """Give each frame its time; times increase strictly.

        A timestamp that leaps ahead, so that the next one comes back, is a mistake: as the frame's
        place is unknown, the frame is dropped.

        Some writers (old AVI files with B-frames, MP4 files without composition offsets) attach the
        right timestamps to the wrong frames. Decoders still return the frames in order, so the
        timestamps are sorted over a short window.
        """
        waiting: deque[av.VideoFrame] = deque()
        ticks: list[int] = []
        last_ticks, held = None, None
        stamped = itertools.chain(self._stamp(frames), itertools.repeat(None, self._reorder))
        for index, item in enumerate(stamped):
            if item is not None:
                waiting.append(item[1])
                heapq.heappush(ticks, item[0])
            if index < self._reorder or not waiting:
                continue
            shown, shown_ticks = waiting.popleft(), heapq.heappop(ticks)
            if last_ticks is not None and shown_ticks <= last_ticks:
                continue
            if held is not None and shown_ticks > held[0]:
                last_ticks = held[0]
                yield self._timed(*held)
            held = shown_ticks, shown
        if held is not None:
            yield self._timed(*held)

    def _timed(self, ticks: int, frame: av.VideoFrame) -> _TimedFrame:
        return _TimedFrame((ticks - self._start_ticks) * self._tick_s, frame)

    def _stamp(self, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Give each frame its timestamp; where there is none, the rate is all there is.

        Formats that know no times of showing (AVI) have those of decoding; bare streams of pictures
        have none, and what FFmpeg makes up for them is not to be trusted; of several frames that
        share a packet (MPEG) only the first has one.
        """
        step = 1 / (self._fps * self._tick_s)
        ticks = None
        for frame in frames:
            stamp = frame.pts if self._has_pts or frame.pts is not None else frame.dts
            if self._is_bare or stamp is None:
                stamp = 0 if ticks is None else ticks + round(step)
            ticks = stamp
            yield stamp, frame

    # ---- what the video is -----------------------------------------------------------------------

    def _read_info(self) -> None:
        """Find the start, the end and the shape of the video, and stand at its first frame."""
        stream, container = self._stream, self._container
        assert stream.time_base is not None, "only streams being written lack it"
        self._tick_s = float(stream.time_base)
        rates = (float(rate or 0) for rate in (stream.average_rate, stream.guessed_rate, 25))
        self._fps = next(rate for rate in rates if rate > 0)
        self._may_skip = self._has_pts = False
        self._is_bare = bool(container.format.flags & NO_TIMESTAMPS)
        promised_s = promised_end(container, stream)
        ends = self._find_ends(promised_s)
        if promised_s is None and ends.fps and not self._is_bare:  # counted: headers know less
            self._fps = ends.fps
        # Now, because Matroska's index is read when the end is looked for.
        keyframes = [e.timestamp for e in self._stream.index_entries if e.is_keyframe]

        self._reopen()
        decoder = self._decode()
        first = list(itertools.islice(decoder, _NUM_PROBED))
        if not first:
            raise DamagedVideoError(
                f"{self._name} is damaged: none of its frames can be decoded; "
                "copy or download it again"
            )
        self._has_pts = first[0].pts is not None and not self._is_bare
        ticks = [stamp for stamp, _ in self._stamp(first)]
        self._reorder = 0 if all(a < b for a, b in itertools.pairwise(ticks)) else _MAX_REORDER
        # Of interlaced video a packet may hold one field, whose timestamp is no frame's.
        is_plain = self._has_pts and not any(frame.interlaced_frame for frame in first)
        self._may_skip = is_plain and not self._reorder and may_skip(self._stream)
        self._start_ticks = min(ticks)
        start_s = self._start_ticks * self._tick_s
        # When the keyframes come, as far as the index says: hints for what to seek, since many
        # formats index decoding times, which are a little earlier than the times of showing.
        self._keyframes_s = np.unique(np.subtract(keyframes, self._start_ticks) * self._tick_s)

        duration_s, self._last_frame_s = ends.video_s - start_s, ends.last_frame_s - start_s
        if promised_s is not None and promised_s - ends.any_s > _slack(promised_s - start_s):
            if not is_whole(self._source):
                # Cut off: what is there may be used, and who asks for the rest is told so.
                duration_s = self._last_frame_s = promised_s - start_s
        height, width = display_size(first[0], self._stream.sample_aspect_ratio)
        self.info = VideoInfo(
            duration_s=max(duration_s, 0.0),
            start_s=start_s,
            source_fps=self._fps,
            width=width,
            height=height,
            codec=self._stream.codec_context.name,
            container=self._container.format.name,
            has_audio=len(self._container.streams.audio) > 0,
            num_frames=self._stream.frames or None,
        )
        self._timed_frames = self._time(itertools.chain(first, decoder))
        self._current, self._next = next(self._timed_frames), next(self._timed_frames, None)

    def _find_ends(self, promised_s: float | None) -> Ends:
        """Read the packets of the last seconds, or all if that fails, without decoding."""
        if promised_s is not None:
            try:
                self._container.seek(int(promised_s / self._tick_s), stream=self._stream)
                ends = read_ends(self._container, self._stream, self._fps)
                if ends is not None:
                    return ends
            except av.error.FFmpegError as error:
                logger.debug("%s: cannot seek to the end: %s", self._name, error)
            self._reopen()
        return read_ends(self._container, self._stream, self._fps) or Ends(0.0, 0.0, 0.0, None)


def check_times(times_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """The times as float64 (T,), if they can be."""
    wanted_s = np.asarray(times_s, dtype=np.float64)
    if wanted_s.ndim != 1 or not np.all(np.isfinite(wanted_s)) or np.any(wanted_s < 0):
        raise ValueError(f"times must be a list of seconds from 0, not {times_s}")
    return wanted_s


def _slack(duration_s: float) -> float:
    """How much shorter than its header says a video may be without counting as truncated."""
    return max(1.0, 0.1 * duration_s)


def _open_with_torchcodec(device: str) -> Callable[..., VideoReader]:
    def open_it(source: str | Path | bytes, num_threads: int | None) -> VideoReader:
        from apollo.video.torchcodec import TorchcodecReader  # which builds on this module

        return TorchcodecReader(source, num_threads, device)

    return open_it


BACKENDS: dict[str, Callable[..., VideoReader]] = {
    "pyav": VideoReader,
    "torchcodec": _open_with_torchcodec("cpu"),
    "torchcodec-cuda": _open_with_torchcodec("cuda"),
}
"""Name of what decodes -> its reader. PyAV is always there; the others need torchcodec."""
