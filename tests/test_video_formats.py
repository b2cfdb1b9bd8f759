"""The right frame at its true time from every container, codec and oddity that files come with.

Two tables name the files: GRID what is ordinary, ODD what is hard. Each file is written here, its
frames carry their numbers (conftest.py), and the same few checks run over all of them. Below the
tables' checks come the faults of other projects' readers, each a test that passes here, and the
files that need a look of their own. tests/test_video.py has the engine's other tests.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from conftest import (
    BLOCK,
    HEIGHT,
    NUM_BITS,
    WIDTH,
    NumberedVideo,
    draw_number,
    read_number,
    write_numbered_video,
)
from PIL import Image

from apollo.video import ClipSampling, NoVideoStreamError, load_clips, open_video

MILLISECONDS, TICKS_90K = Fraction(1, 1000), Fraction(1, 90000)
FPS = Fraction(25)
NUM_FRAMES = 120  # 4.8 s, ten groups of pictures: long enough to make seeking worth it
PLAIN = dict(ticks=range(NUM_FRAMES), time_base=1 / FPS, gop_size=12)
VARIABLE = np.cumsum(np.random.default_rng(5).integers(11, 120, size=NUM_FRAMES)).tolist()
VARIABLE_COARSE = np.cumsum(np.random.default_rng(6).integers(3, 12, size=60)).tolist()
WITH_PAUSES = [0, *np.cumsum(np.random.default_rng(8).choice([1, 2, 5], NUM_FRAMES - 1)).tolist()]
TS_WRAP = 2**33  # MPEG counts 90,000 ticks per second in 33 bits, and starts again after 26.5 hours

X265 = "log-level=none:pools=none:frame-threads=1:keyint=12:min-keyint=12:scenecut=0:"
OPEN_GOP_264 = dict(
    options={"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"},
    max_b_frames=3,
)
OPEN_GOP_265 = dict(
    codec="libx265", options={"x265-params": X265 + "open-gop=1:bframes=3:b-adapt=0"}
)


def interlaced(stream: av.VideoStream) -> None:
    stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct
    stream.codec_context.flags |= av.codec.context.Flags.interlaced_me


def display_aspect(sample_aspect_ratio: Fraction) -> Callable[[av.VideoStream], None]:
    def prepare(stream: av.VideoStream) -> None:
        stream.sample_aspect_ratio = sample_aspect_ratio
        stream.codec_context.sample_aspect_ratio = sample_aspect_ratio

    return prepare


def hdr(stream: av.VideoStream) -> None:
    context = stream.codec_context
    context.color_primaries, context.color_trc, context.colorspace = 9, 16, 9  # BT.2020, PQ


# codec -> how to write it, where the defaults do not do
CODECS = {
    "libx264": dict(max_b_frames=2),
    "libx265": dict(options={"x265-params": X265 + "bframes=3"}),
    "libvpx": dict(options={"deadline": "realtime", "cpu-used": "8"}),
    "libvpx-vp9": dict(options={"deadline": "realtime", "cpu-used": "8"}),
    "libsvtav1": dict(options={"preset": "12", "svtav1-params": "lp=1"}),
    "mpeg2video": dict(max_b_frames=2),
    "mpeg4": dict(max_b_frames=2),
    "mjpeg": dict(pixel_format="yuvj420p"),
    "cinepak": dict(pixel_format="rgb24", ticks=range(30)),  # slow to encode
    "prores_ks": dict(pixel_format="yuv422p10le"),
    "png": dict(pixel_format="rgb24"),
    "qtrle": dict(pixel_format="rgb24"),
    # Without its skipping of blocks, because FFmpeg calls each frame a keyframe all the same.
    "rpza": dict(pixel_format="rgb555le", options={"skip_frame_thresh": "0"}),
    "msvideo1": dict(pixel_format="rgb555le"),
    "svq1": dict(pixel_format="yuv410p"),
    "huffyuv": dict(pixel_format="yuv422p"),
    "magicyuv": dict(pixel_format="yuv422p"),
    "v210": dict(pixel_format="yuv422p10le"),
    "flashsv2": dict(pixel_format="bgr24"),
    "dnxhd": dict(
        pixel_format="yuv422p", options={"profile": "dnxhr_sq"}, size=(128, 256), ticks=range(30)
    ),
    "dvvideo": dict(size=(576, 720), ticks=range(15)),
    "h263": dict(size=(144, 176)),
}
# codec -> height and width as shown, where it fixes a shape of pixels that is not square
SHOWN = {"dvvideo": (576, 768), "h263": (144, 192)}

# container -> the codecs that it takes and that PyAV's FFmpeg writes
GRID = {
    "mp4": "libx264 libx265 libvpx-vp9 libsvtav1 mpeg1video mpeg2video mpeg4 mjpeg png ffv1 "
    "jpeg2000",
    "mov": "libx264 libx265 mpeg1video mpeg2video mpeg4 mjpeg cinepak prores_ks png qtrle svq1 "
    "rpza magicyuv v210 msmpeg4 jpeg2000 dnxhd dvvideo h263",
    "mkv": "libx264 libx265 libvpx libvpx-vp9 libsvtav1 mpeg1video mpeg2video mpeg4 msmpeg4 mjpeg "
    "prores_ks ffv1 snow rawvideo jpeg2000",
    "webm": "libvpx libvpx-vp9 libsvtav1",
    # Not MPEG-1 in AVI: FFmpeg counts its frames 0, 2, 3, 4...
    "avi": "libx264 libvpx libvpx-vp9 libsvtav1 mpeg2video mpeg4 mjpeg cinepak ffv1 png "
    "h263p flv wmv1 wmv2 msmpeg4 msmpeg4v2 snow huffyuv utvideo magicyuv rawvideo svq1 rpza "
    "msvideo1 v210 dvvideo",
    "mpg": "libx264 libx265 mpeg1video mpeg2video mpeg4",
    "vob": "mpeg2video",
    "ts": "libx264 libx265 mpeg1video mpeg2video mpeg4",
    "m2ts": "libx264 mpeg2video",
    "flv": "libx264 libx265 libvpx-vp9 libsvtav1 flv flashsv2",
    "3gp": "libx264 mpeg4 h263",
    "ogv": "libvpx",
    "wmv": "wmv1 wmv2 msmpeg4 mpeg4",
    "mxf": "libx264 mpeg2video prores_ks",
    "nut": "libx264 mpeg4",
    "ivf": "libvpx libvpx-vp9 libsvtav1",
    # Bare streams: pictures, and a rate to count them by.
    "h264": "libx264",
    "hevc": "libx265",
    "m1v": "mpeg1video",
    "m2v": "mpeg2video",
    "m4v": "mpeg4",
    "mjpeg": "mjpeg",
    "obu": "libsvtav1",
}


@dataclass(frozen=True)
class Odd:
    """A file that is hard in one way.

    Attributes:
        written: Arguments of `write`, where they differ from PLAIN.
        write: What writes the file.
        edit: What is done to the bytes of the file afterwards.
        first: The number of the first frame that is shown.
        last: The number of the last one.
        size: Height and width as shown.
    """

    written: dict
    edit: Callable[[bytes], bytes] = bytes
    write: Callable[..., NumberedVideo] = write_numbered_video
    first: int = 0
    last: int = NUM_FRAMES - 1
    size: tuple[int, int] = (HEIGHT, WIDTH)


def patch(data: bytes, position: int, layout: str, change: Callable) -> bytes:
    """Change the number at a position."""
    size = struct.calcsize(layout)
    (value,) = struct.unpack(layout, data[position : position + size])
    changed = struct.pack(layout, change(value))
    return data[:position] + changed + data[position + size :]


def mp4_duration(factor: float) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        for box, offset in (b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20):
            data = patch(data, data.index(box) + offset, ">I", lambda value: int(value * factor))
        return data

    return edit


def matroska_duration(factor: float) -> Callable[[bytes], bytes]:
    element = b"\x44\x89\x88"  # Duration, 8 bytes
    return lambda data: patch(
        data, data.index(element) + 3, ">d", lambda duration: duration * factor
    )


def flash_duration(factor: float) -> Callable[[bytes], bytes]:
    key = b"duration\x00"
    return lambda data: patch(data, data.index(key) + len(key), ">d", lambda value: value * factor)


def avi_frames(count: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        for chunk, offset in (b"avih", 24), (b"strh", 40):
            data = patch(data, data.index(chunk) + offset, "<I", lambda _: count)
        return data

    return edit


def mp4_edits(*segments: tuple[int, int]) -> Callable[[bytes], bytes]:
    """Replace the entries of an edit list: duration in ms, media time in 1/12800 s."""

    def edit(data: bytes) -> bytes:
        position = data.index(b"elst") + 12
        assert data[position - 1] == len(segments)
        entries = b"".join(struct.pack(">iiI", *segment, 1 << 16) for segment in segments)
        return data[:position] + entries + data[position + len(entries) :]

    return edit


def without_reorder_limit(data: bytes) -> bytes:
    """Take the last part out of the H.264 header of an MP4: how far the frames are reordered."""
    start = data.index(b"avcC") + 10
    (length,) = struct.unpack(">H", data[start : start + 2])
    header = data[start + 2 : start + 2 + length].replace(b"\0\0\3", b"\0\0")
    bits = "".join(f"{byte:08b}" for byte in header).rstrip("0")[:-1]
    # Flag; motion vectors may leave the picture; two zeros; two lengths; reordered; buffered.
    body = re.fullmatch(r"(.*)1111(?:0{3}1\d{3}){2}(?:010|011)(?:00100|00101|011)", bits)
    assert body, "not the header that x264 is known to write"
    bits = body[1] + "01"
    bits += "0" * (-len(bits) % 8)
    short = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    short = re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", short)
    assert len(short) <= length
    return data[: start + 2] + short.ljust(length, b"\0") + data[start + 2 + length :]


def write_animation(path: Path, ticks, time_base: Fraction, **_) -> NumberedVideo:
    """GIF, APNG or WebP, whose frames say how long each is shown."""
    pictures = [Image.fromarray(draw_number(number)) for number in range(len(ticks))]
    shown = [int(ticks * time_base * 1000) for ticks in [*np.diff(ticks), 4]]
    format = "PNG" if path.suffix == ".apng" else None
    pictures[0].save(
        path, format, save_all=True, append_images=pictures[1:], duration=shown, lossless=True
    )
    return NumberedVideo(path, (np.asarray(ticks) - ticks[0]) * float(time_base))


ODD = {
    # When frames are shown.
    **{
        f"variable_rate.{container}": Odd(
            dict(ticks=VARIABLE, time_base=MILLISECONDS, rate=FPS, codec=codec)
            | dict(max_b_frames=2 if codec == "libx264" else 0)
        )
        for container, codec in [
            ("mp4", "libx264"),
            ("mov", "libx264"),
            ("mkv", "libx264"),
            ("flv", "libx264"),
            ("ts", "libx264"),
            ("webm", "libvpx-vp9"),
        ]
    },
    "starts_negative.mkv": Odd(dict(ticks=range(-20, 100), max_b_frames=2)),
    "starts_negative.ts": Odd(dict(ticks=range(-20, 100), max_b_frames=2)),
    "starts_late.ts": Odd(dict(ticks=range(90_000, 90_000 + NUM_FRAMES), max_b_frames=2)),
    "starts_late.flv": Odd(dict(ticks=range(1000, 1000 + NUM_FRAMES), max_b_frames=2)),
    "negative_offsets.mp4": Odd(
        dict(max_b_frames=2, container_options={"movflags": "negative_cts_offsets"})
    ),
    "no_edit_list.mp4": Odd(dict(max_b_frames=2, container_options={"use_editlist": "0"})),
    "edit_list_trims_at_a_keyframe.mp4": Odd(dict(ticks=range(-12, 108)), first=12),
    "edit_list_trims_inside_a_group.mp4": Odd(
        dict(ticks=range(-17, 103), max_b_frames=2), first=17
    ),
    "edit_list_trims_both_ends.mp4": Odd(
        dict(max_b_frames=2), mp4_edits((2000, 1024 + 512 * 20)), first=20, last=69
    ),
    "edit_list_trims_the_end.mp4": Odd(dict(), mp4_edits((3000, 0)), last=74),
    "wraps.ts": Odd(
        dict(ticks=range(TS_WRAP - 180_000, TS_WRAP + 252_000, 3600), time_base=TICKS_90K)
        | dict(rate=FPS, max_b_frames=2)
    ),
    **{
        f"animation.{kind}": Odd(
            dict(ticks=VARIABLE_COARSE, time_base=Fraction(1, 100)),
            write=write_animation,
            last=59,
        )
        for kind in ("gif", "apng", "webp")
    },
    "wraps.mpg": Odd(
        dict(ticks=range(TS_WRAP // 3600 - 59, TS_WRAP // 3600 + 61), noise=True)
        | dict(codec="mpeg2video", max_b_frames=2)
    ),
    "empty_packets.avi": Odd(  # AVI has a constant rate, and packets without data for pauses
        dict(ticks=WITH_PAUSES, codec="mpeg4")
    ),
    # Which frames need which.
    "pyramid.mp4": Odd(
        dict(options={"x264-params": "b-pyramid=normal:bframes=7:b-adapt=0:ref=4:keyint=30"})
    ),
    "pyramid.mkv": Odd(
        dict(options={"x264-params": "b-pyramid=strict:bframes=5:b-adapt=0:keyint=30"})
    ),
    "open_gop_264.mkv": Odd(OPEN_GOP_264),
    "open_gop_264.flv": Odd(OPEN_GOP_264),
    "open_gop_265.mp4": Odd(OPEN_GOP_265),
    "open_gop_265.mkv": Odd(OPEN_GOP_265),
    "open_gop_265.ts": Odd(OPEN_GOP_265),
    "open_gop_mpeg2.ts": Odd(dict(codec="mpeg2video", max_b_frames=2)),
    "recovery_points.mp4": Odd(  # no keyframe after the first: a moving column of fresh blocks
        dict(options={"x264-params": "intra-refresh=1:keyint=12"}, gop_size=12)
    ),
    **{
        f"temporal_layers_{layers}.{container}": Odd(
            dict(
                codec="libx265",
                options={"x265-params": X265 + f"temporal-layers={layers}:{b_frames}"},
            )
        )
        for layers, b_frames in [(2, "bframes=3:b-pyramid=0"), (3, "bframes=7:b-adapt=0")]
        for container in ("mp4", "mkv", "ts")
    },
    "no_reorder_limit.mp4": Odd(dict(max_b_frames=2, gop_size=12), without_reorder_limit),
    **{  # alternate reference frames, which are decoded but never shown
        f"hidden_frames_{name}.{container}": Odd(
            dict(codec=codec, gop_size=30, noise=True)
            | dict(options={"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"})
        )
        for name, codec in (("vp8", "libvpx"), ("vp9", "libvpx-vp9"))
        for container in ("webm", "mkv", "ivf")
    },
    "many_references.mp4": Odd(dict(max_b_frames=3, options={"x264-params": "ref=8:weightp=2"})),
    "interlaced.mp4": Odd(dict(options={"x264-params": "tff=1"}, max_b_frames=2)),
    "interlaced.mkv": Odd(dict(options={"x264-params": "bff=1"}, max_b_frames=2)),
    "interlaced.ts": Odd(dict(options={"x264-params": "tff=1"}, max_b_frames=2)),
    "interlaced_mpeg2.mpg": Odd(
        dict(codec="mpeg2video", max_b_frames=2, noise=True, prepare=interlaced)
    ),
    "interlaced_mpeg2.ts": Odd(dict(codec="mpeg2video", max_b_frames=2, prepare=interlaced)),
    # Headers that are wrong, or say nothing.
    "says_too_long.mp4": Odd(dict(max_b_frames=2), mp4_duration(3.0)),
    "says_too_short.mp4": Odd(dict(max_b_frames=2), mp4_duration(0.3)),
    "says_zero.mp4": Odd(dict(max_b_frames=2), mp4_duration(0.0)),
    "says_too_long.mkv": Odd(dict(), matroska_duration(3.0)),
    "says_too_short.mkv": Odd(dict(), matroska_duration(0.3)),
    "says_too_long.flv": Odd(dict(), flash_duration(3.0)),
    "says_too_short.flv": Odd(dict(), flash_duration(0.3)),
    "says_too_many_frames.avi": Odd(dict(codec="mpeg4"), avi_frames(1000)),
    "says_too_few_frames.avi": Odd(dict(codec="mpeg4"), avi_frames(20)),
    "says_no_frames.avi": Odd(dict(codec="mpeg4"), avi_frames(0)),
    "live.webm": Odd(dict(codec="libvpx", container_options={"live": "1"})),
    "live.mkv": Odd(dict(max_b_frames=2, container_options={"live": "1"})),
    "fragmented.mp4": Odd(
        dict(max_b_frames=2, container_options={"movflags": "frag_keyframe+empty_moov"})
    ),
    "dash.mp4": Odd(dict(max_b_frames=2, container_options={"movflags": "dash+frag_keyframe"})),
    "tiny_frames_share_packets.mpg": Odd(dict()),
    # The shape and the colours of the frames.
    "wide_pixels.mp4": Odd(dict(prepare=display_aspect(Fraction(2))), size=(HEIGHT, 2 * WIDTH)),
    "wide_pixels.mkv": Odd(dict(prepare=display_aspect(Fraction(2))), size=(HEIGHT, 2 * WIDTH)),
    "narrow_pixels.mp4": Odd(
        dict(prepare=display_aspect(Fraction(1, 2))), size=(HEIGHT, WIDTH // 2)
    ),
    "dvd.mpg": Odd(
        dict(codec="mpeg2video", size=(576, 720), prepare=display_aspect(Fraction(64, 45)))
        | dict(ticks=range(15), noise=True),
        last=14,
        size=(576, 1024),
    ),
    "odd_size.mp4": Odd(dict(pixel_format="yuv444p", size=(33, 161)), size=(33, 161)),
    "odd_size.webm": Odd(dict(codec="libvpx-vp9", size=(33, 161)), size=(33, 161)),
    "odd_size.mkv": Odd(dict(codec="ffv1", size=(33, 161)), size=(33, 161)),
    "odd_size.avi": Odd(
        dict(codec="mjpeg", pixel_format="yuvj420p", size=(33, 161)), size=(33, 161)
    ),
    "not_of_whole_blocks.mp4": Odd(dict(size=(34, 166)), size=(34, 166)),
    "ten_bits_264.mp4": Odd(dict(pixel_format="yuv420p10le", max_b_frames=2)),
    "ten_bits_265.mkv": Odd(OPEN_GOP_265 | dict(pixel_format="yuv420p10le")),
    "ten_bits_av1.mp4": Odd(
        CODECS["libsvtav1"] | dict(codec="libsvtav1", pixel_format="yuv420p10le")
    ),
    "hdr.mp4": Odd(OPEN_GOP_265 | dict(pixel_format="yuv420p10le", prepare=hdr)),
    "full_range.mp4": Odd(dict(pixel_format="yuvj420p")),
    "gray.mkv": Odd(dict(codec="ffv1", pixel_format="gray")),
    "sixteen_bits_gray.mkv": Odd(dict(codec="ffv1", pixel_format="gray16le")),
    "rgb.mp4": Odd(dict(codec="libx264rgb", pixel_format="rgb24")),
    # What else is in the file.
    "sound_is_longer.mp4": Odd(dict(with_audio_s=9.0)),
    "sound_is_longer.ts": Odd(dict(with_audio_s=9.0)),
    "sound_starts_earlier.mkv": Odd(dict(ticks=range(50, 170), with_audio_s=3.0)),
    "sound_starts_earlier.mp4": Odd(dict(ticks=range(50, 170), with_audio_s=3.0)),
    "sound_starts_earlier.ts": Odd(dict(ticks=range(50, 170), with_audio_s=3.0)),
}


def grid_file(codec: str, container: str) -> Odd:
    written = PLAIN | CODECS.get(codec, {})
    if container in ("mpg", "vob"):
        # A packet has one timestamp, and FFmpeg may give it to the wrong one of the frames that
        # begin in it: let few begin in each.
        written |= dict(noise=True)
        if codec in ("libx264", "libx265"):
            written |= dict(container_options={"packetsize": "512"})
    size = SHOWN.get(codec, written.get("size", (HEIGHT, WIDTH)))
    return Odd(written | dict(codec=codec), size=size, last=len(written["ticks"]) - 1)


FILES = {
    f"{codec}.{container}": grid_file(codec, container)
    for container, codecs in GRID.items()
    for codec in codecs.split()
} | {name: replace(odd, written=PLAIN | odd.written) for name, odd in ODD.items()}


@dataclass(frozen=True)
class Case:
    """A file and what must come out: `times_s` of the frames that are shown, and their numbers."""

    video: NumberedVideo
    numbers: np.ndarray
    times_s: np.ndarray
    size: tuple[int, int]

    @property
    def path(self) -> Path:
        return self.video.path

    @property
    def rounding_s(self) -> float:
        """How exactly the container writes times, counted from the first frame."""
        coarse = self.path.suffix in (".mkv", ".webm", ".flv", ".wmv")  # milliseconds
        # Some frames have no time of their own (see `grid_file`). Which ones changes with the bytes
        # of x265, which are not always the same: once in many runs two were 0.33 ms off.
        coarse |= self.path.suffix in (".mpg", ".vob")
        return 1.01e-3 if coarse else 2.5e-5

    def check(self, asked_s, frames) -> None:
        """Frames asked for well inside their time on screen are the right ones."""
        indices = np.searchsorted(self.times_s, asked_s, side="right") - 1
        assert [read_number(frame) for frame in frames.pixels] == self.numbers[indices].tolist()
        np.testing.assert_allclose(frames.times_s, self.times_s[indices], atol=self.rounding_s)


def between(times_s: np.ndarray) -> np.ndarray:
    """A time for each frame while it is on the screen."""
    shown_s = np.diff(times_s, append=times_s[-1] + 0.04)
    return times_s + 0.3 * shown_s


@pytest.fixture(scope="module", params=FILES)
def case(request, tmp_path_factory) -> Case:
    odd = FILES[request.param]
    path = tmp_path_factory.mktemp("formats") / request.param
    video = odd.write(path, **odd.written)
    path.write_bytes(odd.edit(path.read_bytes()))
    numbers = np.arange(odd.first, odd.last + 1)
    return Case(video, numbers, video.times_s[numbers] - video.times_s[odd.first], odd.size)


# ---- checks of every file ------------------------------------------------------------------------


def test_every_frame_at_its_time(case):
    asked_s = between(case.times_s)
    with open_video(case.path) as reader:
        frames = reader.frames_at(asked_s)
        case.check(asked_s, frames)
        again = reader.frames_at(frames.times_s)  # a frame's own time leads to it
        late = reader.frames_at([case.times_s[-1] + 1000.0])
    np.testing.assert_array_equal(again.times_s, frames.times_s)
    np.testing.assert_array_equal(again.pixels, frames.pixels)
    assert read_number(late.pixels[0]) == case.numbers[-1]


def test_few_frames_are_the_same_bytes_as_among_all(case):
    """Whatever is skipped to reach a frame, it is decoded from what it needs."""
    asked_s = between(case.times_s)
    with open_video(case.path) as reader:
        whole = reader.frames_at(asked_s)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        with open_video(case.path) as reader:
            for count in (4, 1, 1):
                chosen = rng.permutation(len(asked_s))[:count]
                few = reader.frames_at(asked_s[chosen])
                np.testing.assert_array_equal(few.times_s, whole.times_s[chosen])
                np.testing.assert_array_equal(few.pixels, whole.pixels[chosen])


def test_several_readers_find_the_same(case, monkeypatch):
    """Also in a video that is too small to share."""
    monkeypatch.setattr("apollo.video.decode._MIN_PIXELS_PER_READER", 0.0)
    asked_s = between(case.times_s)
    with open_video(case.path, num_threads=3) as reader:
        case.check(asked_s, reader.frames_at(asked_s))
        case.check(asked_s[::-7], reader.frames_at(asked_s[::-7]))


def test_info(case):
    with open_video(case.path) as reader:
        info = reader.info
        frame = reader.frames_at([0.0]).pixels[0]
    assert frame.shape[:2] == (info.height, info.width) == case.size
    last_s = case.times_s[-1]
    assert last_s < info.duration_s < last_s + 0.2
    assert info.has_audio == ("sound" in case.path.name)
    # The mean is not known without reading the whole file, but the rate is one of this file.
    shown_s = np.diff(case.times_s)
    assert 0.9 / shown_s.max() < info.source_fps < 1.1 / shown_s.min()


# ---- faults of other projects' readers -----------------------------------------------------------


@pytest.fixture(scope="module")
def containers(tmp_path_factory) -> dict[str, NumberedVideo]:
    """The same 120 frames in each container, with H.264 or VP8."""
    folder = tmp_path_factory.mktemp("containers")
    return {
        name: write_numbered_video(folder / f"a.{name}", **PLAIN, codec=codec, max_b_frames=2)
        for name, codec in [
            ("mp4", "libx264"),
            ("mkv", "libx264"),
            ("webm", "libvpx"),
            ("flv", "libx264"),
            ("ts", "libx264"),
        ]
    }


def test_every_container_gives_as_many_frames_as_asked_for(containers):
    """A widely used reader returns all frames of an MKV or WebM file, however few are wanted."""
    asked_s = np.linspace(0.01, 4.77, 8)
    expected = [containers["mp4"].number_at(time_s) for time_s in asked_s]
    for video in containers.values():
        with open_video(video.path) as reader:
            frames = reader.frames_at(asked_s)
        assert [read_number(frame) for frame in frames.pixels] == expected
        clips = load_clips(video.path, ClipSampling("uniform", frames_per_clip=4, max_clips=2))
        assert clips.frames.shape[:2] == (2, 4)


def test_a_rate_lower_than_asked_for(tmp_path):
    """A stride of source rate / wanted rate, rounded, is 0 here: a crash, or wrong times."""
    video = write_numbered_video(
        tmp_path / "slow.mp4", range(12), time_base=Fraction(5, 4), rate=Fraction(4, 5)
    )
    clips = load_clips(video.path)  # 2 frames per second, of a video that has 0.8
    asked_s = np.arange(0, 15, 0.5)
    expected = [video.number_at(time_s) for time_s in asked_s]
    assert [read_number(frame) for frame in np.concatenate(clips.frames)[:30]] == expected
    np.testing.assert_allclose(clips.times_s.ravel()[:30], video.times_s[expected])


def test_times_at_a_variable_rate_are_not_index_over_rate(tmp_path):
    ticks = [*range(0, 1000, 20), *range(1000, 11000, 500)]  # fast, then slow
    video = write_numbered_video(tmp_path / "v.mkv", ticks, MILLISECONDS, rate=FPS)
    clips = load_clips(video.path)
    numbers = [read_number(frame) for frame in np.concatenate(clips.frames)]
    np.testing.assert_allclose(clips.times_s.ravel(), video.times_s[numbers], atol=1e-3)
    np.testing.assert_array_equal(numbers[:4], [0, 25, 50, 51])


@pytest.mark.parametrize("name", ["none.webm", "none.ts", "too_few.avi", "too_many.avi"])
def test_the_number_of_frames_in_the_header_is_not_believed(tmp_path, name):
    """It is absent from many containers and wrong in others; one reader loops for ever on it."""
    codec = {"webm": "libvpx", "ts": "libx264", "avi": "mpeg4"}[name.split(".")[1]]
    video = write_numbered_video(tmp_path / name, **PLAIN, codec=codec)
    if name.endswith("avi"):
        data = video.path.read_bytes()
        video.path.write_bytes(avi_frames(5 if name == "too_few.avi" else 10**6)(data))
    clips = load_clips(video.path, ClipSampling("uniform", frames_per_clip=4, max_clips=2))
    numbers = [read_number(frame) for frame in np.concatenate(clips.frames)]
    np.testing.assert_array_equal(numbers, 7 + np.arange(8) * 15)  # the middles of eighths


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_no_stale_frame_after_going_back(tmp_path, name):
    """HEVC: after a seek backwards another reader shows a frame from before the seek."""
    video = write_numbered_video(tmp_path / name, **PLAIN | OPEN_GOP_265)
    with open_video(video.path) as reader:
        for number in [119, 0, 100, 13, 61, 60, 12, 11, 119, 24, 23, 1, 118, 36]:
            frames = reader.frames_at([video.times_s[number] + 0.01])
            assert read_number(frames.pixels[0]) == number
            assert frames.times_s[0] == pytest.approx(video.times_s[number], abs=1e-3)


def test_any_formula_for_indices_gets_its_frames(containers):
    """Projects choose frames by four formulas; each gets its frames by asking for their times."""
    count, wanted = NUM_FRAMES, 8
    formulas = {
        "inner steps": [count // (wanted + 1) * (step + 1) for step in range(wanted)],
        "both ends": np.linspace(0, count - 1, wanted).astype(int).tolist(),
        "rounded": np.linspace(0, count - 1, wanted).round().astype(int).tolist(),
        "middles": [int((step + 0.5) * count / wanted) for step in range(wanted)],
    }
    for video in containers.values():
        with open_video(video.path) as reader:
            for indices in formulas.values():
                frames = reader.frames_at(np.array(indices) / 25 + 0.001)
                assert [read_number(frame) for frame in frames.pixels] == indices


def test_a_limit_on_clips_thins_them_out_instead_of_cutting_the_end(tmp_path):
    video = write_numbered_video(
        tmp_path / "long.mp4", range(600), time_base=Fraction(1, 5), gop_size=50
    )
    clips = load_clips(video.path, ClipSampling(max_clips=6))
    numbers = [[read_number(frame) for frame in clip] for clip in clips.frames]
    assert numbers[0][0] == 0 and numbers[-1][-1] >= 597
    np.testing.assert_allclose(clips.times_s, np.array(numbers) / 5)
    starts = clips.times_s[:, 0]
    np.testing.assert_allclose(np.diff(starts), np.diff(starts).mean(), atol=0.4)


# ---- files that need a look of their own ---------------------------------------------------------

TRANSPARENT = {
    "a.mov": ("png", "rgba"),
    "b.mov": ("qtrle", "argb"),
    "c.mov": ("prores_ks", "yuva444p10le"),
    "a.mkv": ("ffv1", "bgra"),
    "a.webm": ("libvpx-vp9", "yuva420p"),
    "a.apng": ("apng", "rgba"),
    "a.gif": (None, None),
    "a.webp": (None, None),
    "a.png": (None, None),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_black(tmp_path, name):
    codec, pixel_format = TRANSPARENT[name]
    pictures = []
    for number in range(1, 11):
        picture = np.dstack([draw_number(number), np.full((HEIGHT, WIDTH), 255, np.uint8)])
        picture[HEIGHT // 2 :, :, 3] = 0  # the lower half, which is white otherwise
        pictures.append(picture)
    if codec is None:
        images = [Image.fromarray(picture, "RGBA") for picture in pictures]
        more = dict(save_all=True, append_images=images[1:], duration=100, lossless=True)
        images[0].save(tmp_path / name, **more if name != "a.png" else {})
    else:
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
            for tick, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgba")
                frame.pts, frame.time_base = tick, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    count = 1 if name == "a.png" else 10
    with open_video(tmp_path / name) as reader:
        frames = reader.frames_at(np.arange(count) / 10 + 0.05).pixels
        small = reader.frames_at([0.05], size=(HEIGHT // 2, WIDTH // 2)).pixels[0]
    assert [read_number(frame) for frame in [*frames, small]] == [*range(1, count + 1), 1]
    assert frames[:, HEIGHT // 2 + 2 :].max() < 12
    assert small[HEIGHT // 4 + 2 :].max() < 12


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_still_image_is_a_video_of_one_frame(tmp_path, name, mode):
    Image.fromarray(draw_number(341)).convert(mode).save(tmp_path / name)
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        with open_video(source) as reader:
            frames = reader.frames_at([0.0, 0.01, 5.0])
            info = reader.info
        assert [read_number(frame) for frame in frames.pixels] == [341] * 3
        assert frames.times_s.tolist() == [0.0] * 3
        assert (info.height, info.width) == frames.pixels.shape[1:3] == (HEIGHT, WIDTH)
        assert 0 <= info.duration_s <= 1
        assert load_clips(source).frames.shape == (1, 4, HEIGHT, WIDTH, 3)


def write_with_cover(path: Path, with_video: bool, cover_first: bool = False) -> None:
    with av.open(str(path), "w") as container:

        def add_cover() -> av.VideoStream:
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 320, 320, "yuvj420p"
            stream.disposition = Disposition.attached_pic
            return stream

        cover = add_cover() if cover_first else None
        if with_video:
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        else:
            sound = container.add_stream(
                "libmp3lame" if path.suffix == ".mp3" else "aac", rate=8000
            )
        cover = cover or add_cover()
        white = av.VideoFrame.from_ndarray(np.full((320, 320, 3), 255, np.uint8), format="rgb24")
        white.pts, white.time_base = 0, Fraction(1)
        container.mux([*cover.encode(white), *cover.encode(None)])
        if with_video:
            for number in range(30):
                frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
                frame.pts, frame.time_base = number, 1 / FPS
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        else:
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate = 8000
            container.mux([*sound.encode(frame), *sound.encode(None)])


@pytest.mark.parametrize("cover_first", [False, True])
def test_an_attached_picture_is_not_the_video(tmp_path, cover_first):
    write_with_cover(tmp_path / "a.mp4", with_video=True, cover_first=cover_first)
    with open_video(tmp_path / "a.mp4") as reader:
        frames = reader.frames_at(np.arange(30) / 25 + 0.01)
    assert [read_number(frame) for frame in frames.pixels] == list(range(30))


@pytest.mark.parametrize("name", ["a.mp3", "a.mp4"])
def test_a_song_with_a_cover_is_no_video(tmp_path, name):
    write_with_cover(tmp_path / name, with_video=False)
    with pytest.raises(NoVideoStreamError, match="only audio and picture"):
        open_video(tmp_path / name)


@pytest.mark.parametrize("name", ["two.mp4", "two.mkv", "two.ts", "two.avi"])
def test_of_several_videos_one_is_read(tmp_path, name):
    """The streams' packets lie between each other; one has odd numbers and other times."""
    with av.open(str(tmp_path / name), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.codec_context.gop_size = 12
        for tick in range(NUM_FRAMES):
            for offset, stream in enumerate(streams):
                number = 2 * tick + offset
                frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
                frame.pts, frame.time_base = tick, 1 / FPS
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    rng = np.random.default_rng(0)
    kinds = set()
    with open_video(tmp_path / name) as reader:
        assert reader.info.duration_s == pytest.approx(NUM_FRAMES / 25, abs=0.05)
        for _ in range(5):
            chosen = rng.integers(NUM_FRAMES, size=4)
            numbers = [read_number(f) for f in reader.frames_at(chosen / 25 + 0.02).pixels]
            np.testing.assert_array_equal(np.array(numbers) // 2, chosen)
            kinds.update(number % 2 for number in numbers)
    assert len(kinds) == 1


def test_turned_and_wide_pixels_together(tmp_path):
    """A phone's rotation applies to the picture after its pixels are made square."""
    video = write_numbered_video(
        tmp_path / "a.mp4", **PLAIN | dict(ticks=range(30), prepare=display_aspect(Fraction(2)))
    )
    data = video.path.read_bytes()
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    clockwise = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
    head, _, tail = data.rpartition(upright)  # the last is the track's, not the movie's
    video.path.write_bytes(head + clockwise + tail)
    with open_video(video.path) as reader:
        frames = reader.frames_at(video.times_s + 0.01).pixels
        assert (reader.info.height, reader.info.width) == (2 * WIDTH, HEIGHT)
    assert frames.shape[1:3] == (2 * WIDTH, HEIGHT)
    assert [read_number(np.rot90(frame)) for frame in frames] == list(range(30))


def test_colours_of_a_ten_bit_hdr_file_are_converted_plainly(tmp_path):
    """No tone mapping: the curve of the file is kept, so that grey levels stay in their order."""
    grays = np.repeat(np.linspace(0, 255, NUM_BITS).astype(np.uint8), BLOCK)
    picture = np.broadcast_to(grays[None, :, None], (HEIGHT, WIDTH, 3)).copy()
    with av.open(str(tmp_path / "hdr.mp4"), "w") as container:
        stream = container.add_stream(
            "libx265", rate=25, options={"x265-params": X265 + "crf=5:bframes=0"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p10le"
        hdr(stream)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = 0, 1 / FPS
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with open_video(tmp_path / "hdr.mp4") as reader:
        seen = reader.frames_at([0.0]).pixels[0]
    np.testing.assert_allclose(
        seen[:, BLOCK // 2 :: BLOCK], picture[:, BLOCK // 2 :: BLOCK], atol=6
    )


def test_an_edit_list_that_cuts_out_the_middle(tmp_path):
    """The video starts late, for which the file has two entries: they become two pieces."""
    video = write_numbered_video(tmp_path / "cut.mp4", **PLAIN | dict(ticks=range(100, 220)))
    video.path.write_bytes(mp4_edits((1000, 0), (1000, 512 * 77))(video.path.read_bytes()))
    with open_video(video.path) as reader:
        frames = reader.frames_at(np.arange(50) / 25 + 0.01)
        assert reader.info.duration_s == pytest.approx(2.0, abs=0.05)
        assert read_number(reader.frames_at([1.01]).pixels[0]) == 77
    assert [read_number(frame) for frame in frames.pixels] == [*range(25), *range(77, 102)]
    np.testing.assert_allclose(frames.times_s, np.arange(50) / 25, atol=1e-6)
