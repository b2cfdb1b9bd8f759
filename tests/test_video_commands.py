"""`apollo video info`, `frames` and `strip`, through the command line as a user calls them."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, read_number, write_numbered_video
from PIL import Image

from apollo.cli import main
from apollo.video import commands, open_video
from apollo.video.commands import choose_layout, model_sampling, parse_size

ROOT = Path(__file__).parent.parent
MILLISECONDS = Fraction(1, 1000)
TICKS = np.cumsum(np.random.default_rng(3).integers(20, 200, size=60)).tolist()


@pytest.fixture(scope="module")
def variable_video(tmp_path_factory):
    """Gaps of 20 to 200 ms, about 6.5 s; starts late."""
    path = tmp_path_factory.mktemp("variable") / "variable.mkv"
    return write_numbered_video(path, TICKS, MILLISECONDS, max_b_frames=2, rate=Fraction(30))


@pytest.fixture(params=["missing", "text", "empty", "directory", "truncated"])
def bad_file(request, tmp_path, plain_video):
    path = tmp_path / "bad.mp4"
    if request.param == "text":
        path.write_text("Dear reader, this is no video.\n" * 50)
    elif request.param == "empty":
        path.touch()
    elif request.param == "directory":
        path.mkdir()
    elif request.param == "truncated":  # its index, at the end, is gone
        path.write_bytes(plain_video.path.read_bytes()[:5000])
    return path


def run(capsys, *line) -> str:
    """What a command prints; it must succeed."""
    assert main(["video", *map(str, line)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refuse(capsys, *line) -> str:
    """The one line that a refused command says."""
    assert main(["video", *map(str, line)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("apollo: error: ") and err.count("\n") == 1
    return err


def records_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]


def check_pictures(video, out, requested_s, extension="jpg") -> None:
    """Each request has its right frame; files are named by true times, and there are no others."""
    records = records_of(out)
    assert [record["requested_s"] for record in records] == pytest.approx(requested_s)
    for record in records:
        number = video.number_at(record["requested_s"])
        with Image.open(out / record["file"]) as picture:
            assert read_number(np.asarray(picture.convert("RGB"))) == number
        assert record["time_s"] == pytest.approx(video.times_s[number], abs=1.1e-3)
        assert record["file"] == f"frame_{record['time_s']:010.3f}s.{extension}"
    files = list(dict.fromkeys(record["file"] for record in records))
    assert files == sorted(path.name for path in out.glob("frame_*"))


# ---- info ----------------------------------------------------------------------------------------


def test_info_for_people(capsys, plain_video):
    out = run(capsys, "info", plain_video.path)
    for word in (
        str(plain_video.path),
        "12.000 s",
        "30.000 frames",
        "160 x 32",
        "h264",
        "no sound",
    ):
        assert word in out


def test_info_as_json(capsys, plain_video, variable_video):
    lines = run(capsys, "info", "--json", plain_video.path, variable_video.path).splitlines()
    plain, variable = map(json.loads, lines)
    expected = {
        "path": str(plain_video.path),
        "duration_s": pytest.approx(12.0),
        "start_s": pytest.approx(0.0),
        "source_fps": pytest.approx(30.0),
        "width": WIDTH,
        "height": HEIGHT,
        "codec": "h264",
        "has_audio": False,
        "num_frames": 360,
    }
    assert {name: plain[name] for name in expected} == expected
    assert "mp4" in plain["container"] and "matroska" in variable["container"]
    assert variable["start_s"] == pytest.approx(TICKS[0] / 1000, abs=1.1e-3)


def test_info_goes_on_after_a_bad_file(capsys, bad_file, plain_video):
    assert main(["video", "info", str(bad_file), str(plain_video.path)]) == 2
    out, err = capsys.readouterr()
    assert str(plain_video.path) in out and str(bad_file) not in out
    assert err.count("\n") == 1 and str(bad_file) in err


def test_info_outlives_a_crash(capsys, monkeypatch, plain_video):
    monkeypatch.setattr(commands, "read_info", crash_on_missing)
    assert main(["video", "info", "nothing.mp4", str(plain_video.path)]) == 2
    out, err = capsys.readouterr()
    assert str(plain_video.path) in out and err.count("\n") == 1 and "crashed" in err


def crash_on_missing(path):
    if path == "nothing.mp4":
        os.abort()
    return commands.read_info(path)  # in the worker process nothing is patched


# ---- frames --------------------------------------------------------------------------------------


def test_frames_at_a_rate(capsys, plain_video, tmp_path):
    out = tmp_path / "new" / "pictures"
    assert "24 pictures at 24 times" in run(
        capsys, "frames", plain_video.path, "--fps", 2, "--out", out
    )
    check_pictures(plain_video, out, np.arange(24) / 2)


def test_a_frame_is_written_once_however_often_it_is_asked_for(capsys, variable_video, tmp_path):
    run(capsys, "frames", variable_video.path, "--fps", 50, "--out", tmp_path / "out")
    with open_video(variable_video.path) as video:
        duration_s = video.info.duration_s
    count = len(records_of(tmp_path / "out"))
    assert abs(count - duration_s * 50) < 1
    check_pictures(variable_video, tmp_path / "out", np.arange(count) / 50)
    assert len(list((tmp_path / "out").glob("frame_*"))) == len(TICKS)  # each, and only once


def test_frames_of_a_part(capsys, plain_video, tmp_path):
    run(capsys, "frames", plain_video.path, "--start", 9.1, "--end", 99, "--out", tmp_path / "a")
    check_pictures(plain_video, tmp_path / "a", 9.1 + np.arange(6) / 2)
    run(capsys, "frames", plain_video.path, "--start", 3, "--end", 4, "--out", tmp_path / "b")
    check_pictures(plain_video, tmp_path / "b", [3.0, 3.5])


def test_frames_at_times(capsys, variable_video, tmp_path):
    times_s = [3.3, 0.0, 5.25, 0.7]
    line = ["frames", variable_video.path, "--format", "png", "--out", tmp_path / "out"]
    run(capsys, *line, "--times", *times_s)
    check_pictures(variable_video, tmp_path / "out", sorted(times_s), "png")


def test_frames_within_a_millisecond_keep_their_own_files(capsys, tmp_path):
    """2,500 frames per second, as high-speed cameras make; the names still sort by time."""
    video = write_numbered_video(tmp_path / "fast.mp4", range(20), Fraction(1, 2500))
    times_s = video.times_s + 1e-4
    run(capsys, "frames", video.path, "--times", *times_s, "--out", tmp_path / "out")
    files = [record["file"] for record in records_of(tmp_path / "out")]
    assert files == sorted(files) and len(set(files)) == len(files) == 20
    for number, file in enumerate(files):
        with Image.open(tmp_path / "out" / file) as picture:
            assert read_number(np.asarray(picture)) == number


@pytest.mark.parametrize("size, expected", [("80x48", (80, 48)), ("320", (320, 64))])
def test_size_of_frames(capsys, plain_video, tmp_path, size, expected):
    line = ["frames", plain_video.path, "--times", 2, "--size", size, "--out", tmp_path / "out"]
    run(capsys, *line)
    (path,) = (tmp_path / "out").glob("*.jpg")
    with Image.open(path) as picture:
        assert picture.size == expected and read_number(np.asarray(picture)) == 60


def test_parse_size():
    assert parse_size("640X360", 1, 1) == (360, 640)
    assert parse_size("100", 1080, 1920) == (100, 56)
    assert parse_size("2", 10_000, 1) == (1, 2)  # never without pixels


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--fps", "0"], "--fps"),
        (["--fps", "-1"], "--fps"),
        (["--fps", "nan"], "--fps"),
        (["--fps", "1e9"], "--fps"),
        (["--times", "12.5"], "12.5"),
        (["--times", "1", "-1"], "-1"),
        (["--times", "nan"], "nan"),
        (["--start", "12"], "--start"),
        (["--start", "-2"], "--start"),
        (["--start", "5", "--end", "5"], "--start"),
        (["--end", "nan"], "--start"),
        (["--size", "0x5"], "--size"),
        (["--size", "640x"], "--size"),
        (["--size", "-3"], "--size"),
        (["--size", "1x2x3"], "--size"),
        (["--size", "9999999999"], "--size"),
    ],
)
def test_frames_refuses(capsys, plain_video, tmp_path, options, reason):
    out = tmp_path / "out"
    assert reason in refuse(capsys, "frames", plain_video.path, "--out", out, *options)
    assert not out.exists()


def test_frames_leaves_a_full_folder_alone(capsys, plain_video, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "already holds files" in refuse(capsys, "frames", plain_video.path, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    refuse(capsys, "frames", plain_video.path, "--out", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_frames_of_a_bad_file(capsys, bad_file, tmp_path):
    assert str(bad_file) in refuse(capsys, "frames", bad_file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- strip ---------------------------------------------------------------------------------------


def frames_on(sheet, layout, num_clips, frames_per_clip) -> list[int]:
    """The numbers of the frames on a sheet, in the order of clips."""
    pixels, numbers = np.asarray(sheet.convert("RGB")), []
    height, width = layout.thumbnail
    for clip in range(num_clips):
        row, column = divmod(clip, layout.row_length)
        for index in range(frames_per_clip):
            line, place = divmod(index, layout.line_length)
            top = 44 + row * layout.block[0] + 24 + line * layout.cell[0]
            left = 20 + column * layout.block[1] + place * layout.cell[1]
            numbers.append(read_number(pixels[top : top + height, left : left + width]))
    return numbers


def test_strip_shows_the_frames_of_the_clips(capsys, plain_video, tmp_path):
    out = tmp_path / "new" / "sheet.png"
    assert "6 clips of 4 frames in 2 s" in run(capsys, "strip", plain_video.path, "--out", out)
    layout = choose_layout(6, 4, WIDTH, HEIGHT)
    with Image.open(out) as sheet:
        assert sheet.size == layout.sheet[::-1]
        assert frames_on(sheet, layout, 6, 4) == list(range(0, 360, 15))


def test_strip_by_a_model_and_by_options(capsys, plain_video, tmp_path):
    settings = {"sampling": "uniform", "frames_per_clip": 2, "clip_duration_s": 1.0, "max_clips": 3}
    (tmp_path / "processor_config.json").write_text(json.dumps({**settings, "image_size": 64}))
    line = ["strip", plain_video.path, "--out", tmp_path / "a.png", "--model", tmp_path]
    assert "3 clips of 2 frames, sampling uniform" in run(capsys, *line)
    with Image.open(tmp_path / "a.png") as sheet:
        shown = frames_on(sheet, choose_layout(3, 2, WIDTH, HEIGHT), 3, 2)
    assert shown == [30, 90, 150, 210, 270, 330]
    options = ["--sampling", "fps", "--max-clips", 9, "--frames-per-clip", 3]
    assert "9 clips of 3 frames in 1 s, sampling fps, at most 9" in run(capsys, *line, *options)
    assert "1 clip of 2 frames, sampling center" in run(capsys, *line, "--sampling", "center")


def test_strip_by_the_shipped_model(capsys, plain_video, tmp_path):
    assert model_sampling("micro").frames_per_clip == 4
    out = run(capsys, "strip", plain_video.path, "--model", "micro", "--out", tmp_path / "a.png")
    assert "sampling fps" in out


@pytest.mark.parametrize("sampling", ["fps", "uniform", "center", "released"])
def test_strip_of_every_sampling(capsys, variable_video, tmp_path, sampling):
    line = ["strip", variable_video.path, "--sampling", sampling, "--out", tmp_path / "a.png"]
    assert f"sampling {sampling}" in run(capsys, *line, "--max-clips", 5)


@pytest.mark.parametrize("size", [(1920, 1080), (1080, 1920), (3000, 10), (10, 3000), (64, 64)])
@pytest.mark.parametrize("num_clips, num_frames", [(1, 1), (1, 4), (7, 4), (84, 4), (3, 128)])
def test_layout(size, num_clips, num_frames):
    """Blocks hold their frames, rows hold their blocks, and the sheet is never too wide."""
    layout = choose_layout(num_clips, num_frames, *size)
    height, width = layout.thumbnail
    assert height >= 1 and width >= 1 and layout.cell[0] > height and layout.cell[1] > width
    lines = -(-num_frames // layout.line_length)
    assert layout.line_length * layout.cell[1] <= layout.block[1]
    assert lines * layout.cell[0] < layout.block[0]
    rows = -(-num_clips // layout.row_length)
    assert layout.row_length * layout.block[1] < layout.sheet[1] <= 2000
    assert rows * layout.block[0] < layout.sheet[0]


def test_more_clips_are_smaller():
    few, many = (choose_layout(count, 4, 1920, 1080) for count in (2, 84))
    assert few.row_length == 1 and many.row_length > 1
    assert few.thumbnail[1] > many.thumbnail[1]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--out", "video.mp4"], ".png"),
        (["--out", ""], ".png"),
        (["--max-clips", "1000000000"], "--max-clips"),
        (["--frames-per-clip", "1000000000"], "--frames-per-clip"),
        (["--clip-duration", "0"], "clip_duration_s"),
        (["--clip-duration", "nan"], "clip_duration_s"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_strip_refuses(capsys, monkeypatch, plain_video, tmp_path, options, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in refuse(capsys, "strip", plain_video.path, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", '{"sampling": "fps"}', '{"frames_per_clip": "x", "max_clips": -1}']
)
def test_strip_names_a_models_file_that_says_nothing(capsys, plain_video, tmp_path, text):
    (tmp_path / "processor_config.json").write_text(text)
    error = refuse(capsys, "strip", plain_video.path, "--model", tmp_path)
    assert str(tmp_path / "processor_config.json") in error


def test_strip_of_a_bad_file(capsys, bad_file, tmp_path):
    assert str(bad_file) in refuse(capsys, "strip", bad_file, "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_long_name_does_not_leave_the_sheet(capsys, plain_video, tmp_path):
    path = tmp_path / f"{'long ' * 40}.mp4"
    path.write_bytes(plain_video.path.read_bytes())
    run(capsys, "strip", path, "--sampling", "center", "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as sheet:
        title = np.asarray(sheet.convert("L"))[:44]
    assert title[:, 20:-20].min() < 100 < title[:, -18:].min()  # text, and none in the margin


def test_the_commands_need_no_torch():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers')))\n"
        "from apollo.cli import main; sys.exit(main(['video', 'info', 'nothing.mp4']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("apollo: error: nothing.mp4")
