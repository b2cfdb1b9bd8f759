"""Exact frames and times from every kind of file, clear errors from broken ones, sampling."""

import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, NumberedVideo, read_number, write_numbered_video

from apollo.video import (
    SAMPLERS,
    ClipSampling,
    DamagedVideoError,
    NotAVideoError,
    NoVideoStreamError,
    VideoError,
    VideoNotFoundError,
    load_clips,
    max_clips_for_budget,
    open_video,
    sample,
)

MILLISECONDS = Fraction(1, 1000)
VARIABLE = np.cumsum(np.random.default_rng(7).integers(12, 180, size=200)).tolist()
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"}
NTSC = Fraction(1001, 30000)

# name -> how to write it; the keys say what is hard about the file
FILES = {
    "b_frames.mp4": dict(ticks=range(300), max_b_frames=3),
    "open_gop.mp4": dict(ticks=range(300), max_b_frames=3, options=OPEN_GOP),
    "long_gop.mp4": dict(ticks=range(400), gop_size=400),
    "variable_rate.mp4": dict(
        ticks=VARIABLE, time_base=MILLISECONDS, max_b_frames=2, rate=Fraction(30)
    ),
    "variable_rate.mkv": dict(ticks=VARIABLE, time_base=MILLISECONDS, rate=Fraction(30)),
    "starts_at_5_s.mkv": dict(
        ticks=range(5000, 15000, 40), time_base=MILLISECONDS, rate=Fraction(25)
    ),
    "starts_at_5_s.mp4": dict(
        ticks=range(5000, 15000, 40), time_base=MILLISECONDS, rate=Fraction(25)
    ),
    "ntsc.mp4": dict(ticks=range(300), time_base=NTSC, max_b_frames=2),
    "slow.mp4": dict(ticks=range(40), time_base=Fraction(1, 2), max_b_frames=2, gop_size=8),
    "mpeg4.avi": dict(ticks=range(300), codec="mpeg4", gop_size=24),
    "mpeg4_b_frames.avi": dict(ticks=range(300), codec="mpeg4", max_b_frames=2, gop_size=24),
    # Noise, because timestamps in a program stream are ambiguous where several tiny frames share a
    # packet.
    "mpeg2.mpg": dict(
        ticks=range(300),
        time_base=Fraction(1, 25),
        codec="mpeg2video",
        max_b_frames=2,
        gop_size=12,
        noise=True,
    ),
    "mpeg2.ts": dict(
        ticks=range(500, 800), time_base=Fraction(1, 25), codec="mpeg2video", max_b_frames=2
    ),
    "h264.ts": dict(ticks=range(300), max_b_frames=3, gop_size=50),
    "open_gop.ts": dict(ticks=range(300), max_b_frames=3, options=OPEN_GOP),
    "motion_jpeg.avi": dict(ticks=range(100), codec="mjpeg", pixel_format="yuvj420p"),
    "bare_stream.h264": dict(ticks=range(100), time_base=Fraction(1, 25), rate=Fraction(25)),
}


@pytest.fixture(scope="module", params=FILES)
def video(request, tmp_path_factory) -> NumberedVideo:
    path = tmp_path_factory.mktemp("files") / request.param
    return write_numbered_video(path, **FILES[request.param])


def check_frames(video: NumberedVideo, reader, times_s) -> None:
    frames = reader.frames_at(times_s)
    expected = [video.number_at(time_s) for time_s in times_s]
    assert [read_number(frame) for frame in frames.pixels] == expected
    np.testing.assert_allclose(
        frames.times_s, video.times_s[expected], atol=2e-3
    )  # Matroska counts in ms


# ---- exact frames --------------------------------------------------------------------------------


def test_every_frame_at_its_time(video):
    with open_video(video.path) as reader:
        check_frames(video, reader, video.times_s + 0.004)


def test_frame_stays_until_the_next_one(video):
    between_s = (video.times_s[:-1] + video.times_s[1:]) / 2
    with open_video(video.path) as reader:
        check_frames(video, reader, between_s)


def test_jumping_around_equals_reading_through(video):
    rng = np.random.default_rng(0)
    with open_video(video.path) as reader:
        for _ in range(6):
            last_s = video.times_s[-1]
            check_frames(video, reader, rng.uniform(0, last_s, size=3) + 0.0021)
        check_frames(video, reader, [last_s * 0.95, 0.0021, last_s * 0.9, last_s * 0.1])


def test_info(video):
    with open_video(video.path) as reader:
        info = reader.info
    assert (info.width, info.height, info.has_audio) == (WIDTH, HEIGHT, False)
    last_frame_s = video.times_s[-1]
    assert last_frame_s < info.duration_s <= last_frame_s + 0.6
    mean_fps = (len(video.times_s) - 1) / last_frame_s
    assert info.source_fps == pytest.approx(mean_fps, rel=0.05) or "variable" in video.path.name


def test_bytes_equal_path(video):
    times_s = np.linspace(0, video.times_s[-1], 7)
    with open_video(video.path) as from_path, open_video(video.path.read_bytes()) as from_bytes:
        assert from_path.info == from_bytes.info
        a, b = from_path.frames_at(times_s), from_bytes.frames_at(times_s)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(a.times_s, b.times_s)


def test_beyond_the_end_is_the_last_frame(plain_video):
    with open_video(plain_video.path) as reader:
        frames = reader.frames_at([11.999, 12.0, 1000.0])
    assert [read_number(frame) for frame in frames.pixels] == [359] * 3
    np.testing.assert_allclose(frames.times_s, 359 / 30)


def test_exact_multiples_of_the_frame_time_hit_the_frame(plain_video):
    numbers = np.arange(0, 360, 15)  # 0.5 s steps, computed in three ways that round differently
    with open_video(plain_video.path) as reader:
        for times_s in (numbers / 30, numbers * (1 / 30), np.cumsum(np.r_[0, np.full(23, 0.5)])):
            assert [
                read_number(frame) for frame in reader.frames_at(times_s).pixels
            ] == numbers.tolist()


def test_repeated_unsorted_and_no_times(plain_video):
    with open_video(plain_video.path) as reader:
        frames = reader.frames_at([3.0, 1.0, 3.0, 0.0])
        assert [read_number(frame) for frame in frames.pixels] == [90, 30, 90, 0]
        assert reader.frames_at([]).pixels.shape == (0, HEIGHT, WIDTH, 3)
        for times_s in ([-0.1], [float("nan")], [[1.0]]):
            with pytest.raises(ValueError, match="seconds from 0"):
                reader.frames_at(times_s)


def test_size(plain_video):
    with open_video(plain_video.path) as reader:
        frames = reader.frames_at([2.0, 4.0], size=(40, 100))
    assert frames.pixels.shape == (2, 40, 100, 3)
    assert [read_number(frame) for frame in frames.pixels] == [60, 120]


def test_colours_follow_the_files_matrix(tmp_path):
    """A BT.709 file read as BT.601 would turn pure green into another one."""
    green = np.zeros((64, 64, 3), np.uint8) + np.array([20, 200, 30], np.uint8)
    with av.open(str(tmp_path / "green.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = 1
        frame = av.VideoFrame.from_ndarray(green, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709"
        )
        frame.pts = 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with open_video(tmp_path / "green.mp4") as reader:
        pixel = reader.frames_at([0.0]).pixels[0, 32, 32]
    np.testing.assert_allclose(pixel, green[0, 0], atol=4)


@pytest.mark.parametrize(
    ("matrix", "corner"),  # where the white half of the picture, its lower one, is shown
    [
        ((0, 1, -1, 0), "left"),  # 90 degrees clockwise: the lower half goes left
        ((0, -1, 1, 0), "right"),
        ((-1, 0, 0, -1), "top"),
    ],
)
def test_rotation(plain_video, tmp_path, matrix, corner):
    data = plain_video.path.read_bytes()
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    assert data.count(upright) == 2  # movie header and track header; the last is the track's
    a, b, c, d = (65536 * value for value in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    position = data.rindex(upright)
    (tmp_path / "turned.mp4").write_bytes(data[:position] + turned + data[position + 36 :])
    with open_video(tmp_path / "turned.mp4") as reader:
        size = (reader.info.height, reader.info.width)
        frame = reader.frames_at([0.0]).pixels[0]  # frame 0: all bits dark
        small = reader.frames_at([0.0], size=(size[0] // 2, size[1] // 2)).pixels[0]
    assert size == ((HEIGHT, WIDTH) if corner == "top" else (WIDTH, HEIGHT)) == frame.shape[:2]
    for image in (frame, small):
        height, width = image.shape[:2]
        halves = {
            "left": image[:, : width // 2],
            "right": image[:, width // 2 :],
            "top": image[: height // 2],
            "bottom": image[height // 2 :],
        }
        assert max(halves, key=lambda side: halves[side].mean()) == corner


def test_timestamps_on_the_wrong_frames_are_sorted(plain_video, tmp_path):
    """Some writers lose the composition offsets of B-frames; the order of frames is still known."""
    source = write_numbered_video(tmp_path / "right.mp4", range(90), max_b_frames=3)
    with av.open(str(source.path)) as right, av.open(str(tmp_path / "wrong.mp4"), "w") as wrong:
        stream = wrong.add_stream_from_template(right.streams.video[0])
        for number, packet in enumerate(p for p in right.demux(video=0) if p.size):
            packet.stream, packet.time_base = stream, Fraction(1, 30)
            packet.pts = packet.dts = number
            wrong.mux(packet)
    with open_video(tmp_path / "wrong.mp4") as reader:
        frames = reader.frames_at(source.times_s)
    numbers = [read_number(frame) for frame in frames.pixels]
    assert numbers == sorted(numbers) and len(set(numbers)) > 80
    assert np.abs(np.array(numbers) - np.arange(90)).max() <= 2


def test_sound_longer_than_the_picture_is_not_the_duration(tmp_path):
    for name in ("sound.mkv", "sound.mp4"):
        video = write_numbered_video(tmp_path / name, range(60), with_audio_s=6.0)
        with open_video(video.path) as reader:
            assert reader.info.has_audio
            assert reader.info.duration_s == pytest.approx(2.0, abs=0.05)
            assert read_number(reader.frames_at([5.0]).pixels[0]) == 59


def test_last_frame_may_be_shown_for_long(tmp_path):
    video = write_numbered_video(tmp_path / "slides.mp4", [0, 10, 20], time_base=Fraction(1, 1))
    clips = load_clips(video.path)
    assert read_number(clips.frames[-1, -1]) == 2


# ---- broken files --------------------------------------------------------------------------------


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def test_not_there(tmp_path):
    for source in (tmp_path / "none.mp4", tmp_path, "https://example.org/a.mp4"):
        with pytest.raises(VideoNotFoundError, match=str(source)):
            open_video(source)


@pytest.mark.parametrize(
    "data", [b"", b"hello, this is text\n" * 50, bytes(5000), b"#EXTM3U\n#EXTINF:1,\na.ts\n"]
)
def test_not_a_video(tmp_path, data):
    for source in (write(tmp_path / "x.mp4", data), data):
        with pytest.raises(NotAVideoError):
            open_video(source)


def test_sound_only(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(NoVideoStreamError, match="only audio"):
        open_video(tmp_path / "sound.mp4")


def test_truncated_without_index(plain_video, tmp_path):
    data = plain_video.path.read_bytes()  # the index of a plain MP4 is at its end
    with pytest.raises(NotAVideoError):
        open_video(write(tmp_path / "half.mp4", data[: len(data) // 2]))


@pytest.mark.parametrize("name", ["index_first.mp4", "half.mkv", "half.avi"])
def test_truncated_in_the_middle(tmp_path, caplog, name):
    options = {"ticks": range(360), "codec": "mpeg4" if name.endswith("avi") else "libx264"}
    whole = write_numbered_video(tmp_path / f"whole_{name}", **options)
    if name.endswith("mp4"):
        with (
            av.open(str(whole.path)) as source,
            av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        data = (tmp_path / "fast.mp4").read_bytes()
    else:
        data = whole.path.read_bytes()
    path = write(tmp_path / name, data[: len(data) * 6 // 10])
    with open_video(path) as reader:
        assert reader.info.duration_s == pytest.approx(12.0, abs=0.1)
        assert read_number(reader.frames_at([2.0]).pixels[0]) == 60  # what is there can be had
        with pytest.raises(
            DamagedVideoError, match=r"should last 12\.0 s but can be decoded only up to \d"
        ):
            reader.frames_at([11.0])
    caplog.clear()
    with pytest.raises(DamagedVideoError):
        load_clips(path)
    assert not caplog.records  # the error says it all


def test_no_frame_decodes(plain_video, tmp_path):
    data = bytearray(plain_video.path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    with pytest.raises(DamagedVideoError, match="none of its frames"):
        open_video(write(tmp_path / "zeros.mp4", bytes(data)))


def test_noise_gives_frames_or_a_typed_error(plain_video, tmp_path):
    """Whatever happens to a file, there are frames or a VideoError, never another exception."""
    data = plain_video.path.read_bytes()
    rng = np.random.default_rng(3)
    for trial in range(30):
        broken = bytearray(data[: rng.integers(len(data) // 3, len(data) + 1)])
        for position in rng.integers(0, len(broken), size=rng.integers(1, 200)):
            broken[position] = rng.integers(256)
        try:
            clips = load_clips(bytes(broken), ClipSampling(max_clips=4))
            assert clips.frames.shape[1] == 4, trial
        except VideoError as error:
            assert "\n" not in str(error)


# ---- sampling ------------------------------------------------------------------------------------

DURATIONS_S = [0.0, 0.04, 0.6, 1.999, 2.0, 2.5, 4.004, 7.3, 30.03, 80.0, 3601.7]


@pytest.mark.parametrize("duration_s", DURATIONS_S)
@pytest.mark.parametrize("max_clips", [1, 3, 25, None])
@pytest.mark.parametrize(("frames_per_clip", "clip_duration_s"), [(4, 2.0), (1, 1.0), (8, 3.0)])
def test_fps_clips(duration_s, max_clips, frames_per_clip, clip_duration_s):
    times_s, spans_s = sample(
        duration_s, ClipSampling("fps", frames_per_clip, clip_duration_s, max_clips)
    )
    num_clips = len(times_s)
    assert times_s.shape == (num_clips, frames_per_clip) and spans_s.shape == (num_clips, 2)
    assert num_clips <= (max_clips or np.inf)
    # The spacing inside a clip never changes, and a clip's first frame is at its start.
    np.testing.assert_allclose(np.diff(times_s), clip_duration_s / frames_per_clip)
    np.testing.assert_array_equal(times_s[:, 0], spans_s[:, 0])
    # From the first moment to the last, in order, without overlap.
    assert (
        times_s[0, 0] == 0
        and (spans_s[:, 0] <= spans_s[:, 1]).all()
        and spans_s.max() <= duration_s
    )
    assert np.all(spans_s[1:, 0] >= spans_s[:-1, 1] - 1e-9)
    if max_clips != 1:
        assert duration_s - spans_s[-1, 1] <= 0.01 * clip_duration_s + 1e-9
    # Without a limit in the way there is no gap either.
    if max_clips is None:
        np.testing.assert_allclose(spans_s[1:, 0], spans_s[:-1, 1])
    # Long videos get all the clips they may have, evenly.
    elif duration_s > max_clips * clip_duration_s * 1.01:
        assert num_clips == max_clips
        gaps_s = np.diff(spans_s[:, 0])
        np.testing.assert_allclose(gaps_s, gaps_s[:1].repeat(len(gaps_s)))


@pytest.mark.parametrize("duration_s", DURATIONS_S)
def test_uniform_and_center(duration_s):
    times_s, spans_s = sample(duration_s, ClipSampling("uniform", max_clips=5))
    assert (
        times_s.shape == (5, 4)
        and spans_s[0, 0] == 0
        and spans_s[-1, 1] == pytest.approx(duration_s)
    )
    np.testing.assert_allclose(np.diff(times_s.ravel()), duration_s / 20)
    assert np.all((spans_s[:, :1] <= times_s) & (times_s <= spans_s[:, 1:]))
    times_s, spans_s = sample(duration_s, ClipSampling("center"))
    assert times_s.tolist() == [[duration_s / 2] * 4] and spans_s.tolist() == [[duration_s / 2] * 2]


def test_sampling_refuses():
    with pytest.raises(ValueError, match="fps, uniform, center"):
        ClipSampling("every")
    for wrong in (
        {"frames_per_clip": 0},
        {"clip_duration_s": 0.0},
        {"max_clips": 0},
        {"mode": "uniform"},
    ):
        with pytest.raises(ValueError):
            ClipSampling(**wrong)
    for duration_s in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="duration"):
            sample(duration_s, ClipSampling())


def test_budget():
    assert max_clips_for_budget(10752, 128) == 84  # 65 % of 16384 tokens, as released
    with pytest.raises(ValueError, match="no clip"):
        max_clips_for_budget(100, 128)


@pytest.mark.parametrize("mode", SAMPLERS)
def test_load_clips(plain_video, mode):
    clips = load_clips(plain_video.path, ClipSampling(mode, max_clips=3))
    times_s, spans_s = sample(12.0, ClipSampling(mode, max_clips=3), 30.0)
    assert clips.frames.shape == (*times_s.shape, HEIGHT, WIDTH, 3)
    expected = [[plain_video.number_at(time_s) for time_s in clip] for clip in times_s]
    assert [[read_number(frame) for frame in clip] for clip in clips.frames] == expected
    np.testing.assert_allclose(clips.times_s, plain_video.times_s[expected])
    np.testing.assert_allclose(clips.spans_s, spans_s)
    assert clips.duration_s == pytest.approx(12.0) and clips.source_fps == pytest.approx(30.0)
    rates = {"fps": 2.0, "uniform": 1.0, "center": 0.0, "released": 2.0}
    assert clips.sampled_fps == pytest.approx(rates[mode])


def test_a_short_video_repeats_its_last_frame(tmp_path):
    video = write_numbered_video(tmp_path / "short.mp4", range(18))  # 0.6 s
    clips = load_clips(video.path)
    assert [read_number(frame) for frame in clips.frames[0]] == [0, 15, 17, 17]
    assert clips.spans_s.tolist() == [[0.0, pytest.approx(0.6)]]


# ---- other backends ------------------------------------------------------------------------------


def has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


@pytest.mark.skipif(not has_torchcodec(), reason="torchcodec or FFmpeg's libraries are missing")
def test_torchcodec_gives_the_same_frames(video):
    times_s = np.random.default_rng(0).permutation(video.times_s)[:40] + 0.004
    if video.path.suffix not in (".mp4", ".mkv"):
        with pytest.raises(ValueError, match="whose times torchcodec gets wrong"):
            open_video(video.path, backend="torchcodec")
        return
    with open_video(video.path) as ours, open_video(video.path, backend="torchcodec") as theirs:
        a, b = ours.frames_at(times_s), theirs.frames_at(times_s)
        small = [reader.frames_at(times_s[:4], size=(16, 80)) for reader in (ours, theirs)]
    np.testing.assert_allclose(a.times_s, b.times_s, atol=1e-6)
    assert np.abs(a.pixels.astype(int) - b.pixels).max() <= 2
    assert np.abs(small[0].pixels.astype(int) - small[1].pixels).mean() < 6


def test_unknown_and_missing_backends_are_named(plain_video, monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'decord'; choose from pyav, torchcodec"):
        open_video(plain_video.path, backend="decord")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match="torchcodec cannot be used"):
        open_video(plain_video.path, backend="torchcodec")
