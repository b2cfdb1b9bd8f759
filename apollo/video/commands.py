"""The commands `apollo video info`, `frames` and `strip`: see a file with the engine's eyes.

They answer the questions that come up when a model's answer is strange: what does the decoder take
this file for, which frame is at which second, and which frames does the model get to see. Options
are declared in apollo/cli.py; everything here goes through `open_video` and `sample`, so what is
printed or drawn is what models are fed.
"""

import argparse
import dataclasses
import importlib.resources
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apollo.video.decode import VideoInfo, VideoReader, open_video
from apollo.video.files import VideoError
from apollo.video.guard import GuardedLoader
from apollo.video.sampling import ClipSampling, sample

# ---- apollo video info ---------------------------------------------------------------------------


def info_main(args: argparse.Namespace) -> int:
    """Run `apollo video info`: say what each file is; a bad one costs a line and the exit code.

    Args:
        args: files, json.
    """
    code = 0
    with GuardedLoader() as loader:  # of many files, one that hangs must not cost the others
        for path in args.files:
            try:
                info = loader.run(read_info, path)
            except VideoError as error:
                sys.stdout.flush()  # the lines of both streams stay in order
                print(f"apollo: error: {' '.join(str(error).split())}", file=sys.stderr)
                code = 2
                continue
            if args.json:
                print(json.dumps({"path": path, **dataclasses.asdict(info)}, allow_nan=False))
            else:
                print(f"{path}\n{describe(info)}")
    return code


def read_info(path: str) -> VideoInfo:
    """Open a video only to see what it is."""
    with open_video(path) as video:
        return video.info


def describe(info: VideoInfo) -> str:
    """Two indented lines about a video: its time, and its pictures and sound."""
    counted = f" (the header counts {info.num_frames})" if info.num_frames else ""
    sound = "with sound" if info.has_audio else "no sound"
    return (
        f"  {info.duration_s:.3f} s from {info.start_s:.3f} s on, "
        f"{info.source_fps:.3f} frames per second{counted}\n"
        f"  {info.width} x {info.height} pixels, {info.codec} in {info.container}, {sound}"
    )


# ---- apollo video frames -------------------------------------------------------------------------

# An hour of video must not be held at once: this many frames are, or fewer if they are very large.
_CHUNK_FRAMES, _CHUNK_BYTES = 32, 128 * 2**20
_MAX_FPS = 1000.0


def frames_main(args: argparse.Namespace) -> int:
    """Run `apollo video frames`: write pictures named by their true times, and times.jsonl.

    A frame that several requests meet is written once. `times.jsonl` has a line per request, in
    order of time: requested_s, time_s (when the frame appears), file.

    Args:
        args: file, out, fps, times, start, end, size, format.

    Raises:
        ValueError: options that make no sense for this video, or `out` holds something already.
    """
    out = Path(args.out)
    with open_video(args.file) as video:
        times_s = wanted_times(args, video.info.duration_s)
        size = parse_size(args.size, video.info.width, video.info.height) if args.size else None
        _make_empty_dir(out)
        num_requests = num_pictures = 0
        with (out / "times.jsonl").open("w", encoding="utf-8") as log:
            for record, picture in _pictures(video, times_s, size, args.format):
                if picture is not None:
                    num_pictures += 1
                    Image.fromarray(picture).save(out / record["file"], quality=95)
                num_requests += 1
                log.write(json.dumps(record) + "\n")
    print(f"{num_pictures} pictures at {num_requests} times: {out}")
    return 0


def wanted_times(args: argparse.Namespace, duration_s: float) -> Iterator[float]:
    """The moments asked for, in order.

    Args:
        args: times (seconds, or None), else fps, start and end; end None is the video's.
        duration_s: Length of the video.

    Raises:
        ValueError: a moment outside the video, an empty range, or an impossible rate.
    """
    if args.times:
        for time_s in args.times:
            if not 0 <= time_s <= duration_s:  # also if not a number
                raise ValueError(f"--times {time_s:g} is not within 0 and {duration_s:.3f} s")
        return iter(sorted(args.times))
    start_s = args.start
    end_s = duration_s if args.end is None else min(args.end, duration_s)
    if not 0 < args.fps <= _MAX_FPS:
        raise ValueError(f"--fps must be over 0 and at most {_MAX_FPS:g}, not {args.fps:g}")
    # A single picture lasts 0 s and still has a frame at 0.
    if not (0 <= start_s < end_s or start_s == end_s == duration_s == 0):
        raise ValueError(
            f"--start {start_s:g} must come before the end, {end_s:.3f} s, and not before 0"
        )
    # The thousandth: an end that is a multiple of the spacing but for rounding asks for no frame.
    count = max(1, math.ceil((end_s - start_s) * args.fps - 1e-3))
    return (start_s + index / args.fps for index in range(count))


def parse_size(text: str, width: int, height: int) -> tuple[int, int]:
    """Height and width from "WxH", or from "N", the longer side in the video's proportions.

    Raises:
        ValueError: it is neither, or a side is not from 1 to 16384 pixels.
    """
    sides = text.lower().split("x")
    if not (len(sides) <= 2 and all(s.isdecimal() and 1 <= int(s) <= 16384 for s in sides)):
        raise ValueError(f"--size must be WIDTHxHEIGHT or the longer side, not {text!r}")
    if len(sides) == 2:
        return int(sides[1]), int(sides[0])
    return _fit(width, height, int(sides[0]))


def _fit(width: int, height: int, longest: int) -> tuple[int, int]:
    """Height and width with the longer side `longest` and the same proportions."""
    scale = longest / max(width, height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _make_empty_dir(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} already holds files; choose another --out")
    path.mkdir(parents=True, exist_ok=True)  # an error, if there is a file


def _pictures(
    video: VideoReader,
    times_s: Iterator[float],
    size: tuple[int, int] | None,
    extension: str,
) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """Each request's record, with the picture uint8 (H, W, 3 RGB) unless the last one had it."""
    file, shown_s, same_name = "", -1.0, 0
    for requested_s, time_s, picture in _decode_in_chunks(video, times_s, size):
        is_new = time_s != shown_s
        if is_new:
            stem = f"frame_{time_s:010.3f}s"
            same_name = same_name + 1 if file.startswith(stem) else 0  # above 1000 per second
            file = f"{stem}_{same_name}.{extension}" if same_name else f"{stem}.{extension}"
            shown_s = time_s
        record = {"requested_s": requested_s, "time_s": time_s, "file": file}
        yield record, picture if is_new else None


def _decode_in_chunks(
    video: VideoReader, times_s: Iterator[float], size: tuple[int, int] | None
) -> Iterator[tuple[float, float, np.ndarray]]:
    """Requested time, true time and picture of each moment; `times_s` must increase."""
    height, width = size or (video.info.height, video.info.width)
    length = max(1, min(_CHUNK_FRAMES, _CHUNK_BYTES // (height * width * 3)))
    while chunk := list(itertools.islice(times_s, length)):
        frames = video.frames_at(chunk, size)
        yield from zip(chunk, frames.times_s.tolist(), frames.pixels, strict=True)


# ---- apollo video strip --------------------------------------------------------------------------

# 65 % of the released models' window of 16,384 tokens, at 128 tokens a clip.
_DEFAULT_MAX_CLIPS = 84
_MAX_STRIP_FRAMES = 10_000  # 200 MB of thumbnails; more is no picture that anyone can look at
_SHEET_SIZE = 2000  # pixels: never wider, and no higher where smaller thumbnails help
_THUMBNAIL_SIZES = (320, 240, 160, 120)  # longer side; the first that fits
_MARGIN, _GAP, _TITLE_HEIGHT, _SPAN_HEIGHT, _TIME_HEIGHT = 20, 4, 44, 24, 20
_MIN_CELL_WIDTH, _MIN_SHEET_WIDTH = 60, 700  # for a time below a frame, and for the title
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)


def strip_main(args: argparse.Namespace) -> int:
    """Run `apollo video strip`: draw a contact sheet of the clips that a model would see.

    Args:
        args: file, out, model, sampling, max_clips, clip_duration, frames_per_clip.

    Raises:
        ValueError: options that make no sense, or a sheet that would be absurdly large.
    """
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must be the name of a .png file, not {args.out}")
    sampling = strip_sampling(args)
    _check_frames((sampling.max_clips or 1) * sampling.frames_per_clip)
    with open_video(args.file) as video:
        info = video.info
        times_s, spans_s = sample(info.duration_s, sampling, info.source_fps)
        _check_frames(times_s.size)
        num_clips, num_frames = times_s.shape
        layout = choose_layout(num_clips, num_frames, info.width, info.height)
        frames = video.frames_at(times_s.ravel(), layout.thumbnail)
    pixels = frames.pixels.reshape(num_clips, num_frames, *layout.thumbnail, 3)
    title = f"{Path(args.file).name}   {info.duration_s:.1f} s   {_plan(num_clips, sampling)}"
    sheet = draw_sheet(title, pixels, frames.times_s.reshape(times_s.shape), spans_s, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    print(f"{_plan(num_clips, sampling)}; {sheet.width} x {sheet.height} pixels: {out}")
    return 0


def strip_sampling(args: argparse.Namespace) -> ClipSampling:
    """The model's way of sampling, or the paper's; options that were given come first."""
    sampling = (
        model_sampling(args.model) if args.model else ClipSampling(max_clips=_DEFAULT_MAX_CLIPS)
    )
    given = {
        "mode": args.sampling,
        "frames_per_clip": args.frames_per_clip,
        "clip_duration_s": args.clip_duration,
        "max_clips": args.max_clips,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(sampling, **given)


def model_sampling(name: str) -> ClipSampling:
    """How a model wants videos sampled, read from the processor_config.json beside its weights.

    The file, not the processor class, because video knows nothing of models and needs no torch.

    Args:
        name: A model's folder, or the name of a model that ships with the package.

    Raises:
        ValueError: there is no such folder, or it does not say how to sample.
    """
    shipped = Path(str(importlib.resources.files("apollo") / "assets" / name))
    folders = (Path(name).expanduser(), shipped)
    found = [folder / "processor_config.json" for folder in folders]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"--model {name}: no such folder with a processor_config.json, and no shipped model; "
            "download or convert the model first"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return ClipSampling(
            mode=saved["sampling"],
            frames_per_clip=saved["frames_per_clip"],
            clip_duration_s=saved["clip_duration_s"],
            max_clips=saved["max_clips"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say how to sample videos: {error}") from error


def _plan(num_clips: int, sampling: ClipSampling) -> str:
    """What was chosen and how, as "16 clips of 4 frames in 2 s, sampling fps, at most 84"."""
    limit = f", at most {sampling.max_clips}" if sampling.max_clips and num_clips > 1 else ""
    length = f" in {sampling.clip_duration_s:g} s" if sampling.mode in ("fps", "released") else ""
    return (
        f"{num_clips} clip{'s' * (num_clips > 1)} of {sampling.frames_per_clip} "
        f"frame{'s' * (sampling.frames_per_clip > 1)}{length}, sampling {sampling.mode}{limit}"
    )


def _check_frames(num_frames: int) -> None:
    if num_frames > _MAX_STRIP_FRAMES:
        raise ValueError(
            f"a strip of {num_frames} frames is too large, {_MAX_STRIP_FRAMES} are the most; "
            "lower --max-clips or --frames-per-clip"
        )


class Layout(NamedTuple):
    """Where things are on a sheet; each size is height and width in pixels.

    Attributes:
        thumbnail: A frame.
        cell: A frame with its time below and the gap to the next one.
        line_length: Cells in a line; a clip has as many lines as it needs.
        block: A clip: its span, then its lines.
        row_length: Blocks in a row.
        sheet: All of it.
    """

    thumbnail: tuple[int, int]
    cell: tuple[int, int]
    line_length: int
    block: tuple[int, int]
    row_length: int
    sheet: tuple[int, int]


def choose_layout(num_clips: int, frames_per_clip: int, width: int, height: int) -> Layout:
    """The layout with the largest thumbnails that keeps the sheet small, or with the smallest.

    Args:
        num_clips: Clips C to show.
        frames_per_clip: Frames T of each.
        width: Of the video, in pixels.
        height: Of the video, in pixels.
    """
    for longest in _THUMBNAIL_SIZES:
        layout = _layout(num_clips, frames_per_clip, _fit(width, height, longest))
        if layout.sheet[0] <= _SHEET_SIZE:
            break
    return layout


def _layout(num_clips: int, frames_per_clip: int, thumbnail: tuple[int, int]) -> Layout:
    cell = thumbnail[0] + _TIME_HEIGHT, max(thumbnail[1], _MIN_CELL_WIDTH) + _GAP
    room = _SHEET_SIZE - _MARGIN  # each block brings the margin to its right
    line_length = min(frames_per_clip, (room - _MARGIN) // cell[1])
    num_lines = math.ceil(frames_per_clip / line_length)
    block = _SPAN_HEIGHT + num_lines * cell[0] + _GAP, line_length * cell[1] + _MARGIN
    row_length = min(num_clips, room // block[1])
    sheet = (
        _TITLE_HEIGHT + math.ceil(num_clips / row_length) * block[0] + _MARGIN,
        max(_MARGIN + row_length * block[1], _MIN_SHEET_WIDTH),
    )
    return Layout(thumbnail, cell, line_length, block, row_length, sheet)


def draw_sheet(
    title: str, frames: np.ndarray, times_s: np.ndarray, spans_s: np.ndarray, layout: Layout
) -> Image.Image:
    """Draw clips with their spans and the true times of their frames.

    Args:
        title: The first line.
        frames: uint8 (C clips, T frames, H, W, 3 RGB) of the size of the layout's thumbnails.
        times_s: (C, T) when each frame appears.
        spans_s: (C, 2) start and end of each clip.
        layout: From `choose_layout`.
    """
    sheet = Image.new("RGB", layout.sheet[::-1], _PAPER)
    draw = ImageDraw.Draw(sheet)
    large, middle, small = (ImageFont.load_default(size) for size in (18, 15, 12))
    draw.text((_MARGIN, 14), _shorten(title, large, sheet.width - 2 * _MARGIN), _INK, large)
    for clip, (start_s, end_s) in enumerate(spans_s):
        row, column = divmod(clip, layout.row_length)
        left = _MARGIN + column * layout.block[1]
        top = _TITLE_HEIGHT + row * layout.block[0]
        draw.text((left, top), f"{_mmss(start_s)}-{_mmss(end_s)}", _INK, middle)
        for index, (pixels, time_s) in enumerate(zip(frames[clip], times_s[clip], strict=True)):
            line, place = divmod(index, layout.line_length)
            x, y = left + place * layout.cell[1], top + _SPAN_HEIGHT + line * layout.cell[0]
            sheet.paste(Image.fromarray(pixels), (x, y))
            draw.text((x, y + layout.thumbnail[0] + 2), f"{time_s:.2f} s", _FAINT, small)
    return sheet


def _shorten(text: str, font: Any, width: float) -> str:
    """The text, with its beginning cut off where it is too long: it ends in what matters."""
    kept = text
    while kept and font.getlength(f"...{kept}" if kept != text else kept) > width:
        kept = kept[1:]
    return kept if kept == text else f"...{kept}"


def _mmss(seconds: float) -> str:
    """A time as the prompt of a clip states it (apollo/model/processing.py, `mmss`)."""
    whole = int(seconds + 0.5)
    return f"{whole // 60:02d}:{whole % 60:02d}"
