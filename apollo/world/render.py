"""Scenes to pixels: `frame` draws one moment, `write_video` an H.264 MP4 with honest timestamps.

Only the tracks of a scene are read here, never its events. Everything is numpy on small sprites
that are cached, so that one core draws and encodes several videos a second. Same scene, same bytes:
the encoder runs on one thread and the container carries no date. Read next: `language.py` (words).
"""

from __future__ import annotations

import functools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apollo.world.scene import COLOURS, GROUNDS, RADIUS, Scene, Thing, at, colour_at, is_visible

SIZE = 128
"""Width and height of a picture in pixels."""
SUPERSAMPLE = 3
TIME_BASE = Fraction(1, 90000)
"""The clock of MPEG systems: fine enough for 29.97 frames/s and for variable rates."""

Sprite = tuple[np.ndarray, np.ndarray]  # alpha (h, w, 1) and colour (h, w, 3), float32


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = np.pi * np.arange(2 * points) / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


_HEART_T = np.linspace(0, 2 * np.pi, 40)
_HEART = list(
    zip(
        np.sin(_HEART_T) ** 3 * 0.98,
        -(
            13 * np.cos(_HEART_T)
            - 5 * np.cos(2 * _HEART_T)
            - 2 * np.cos(3 * _HEART_T)
            - np.cos(4 * _HEART_T)
        )
        / 16.5,
        strict=True,
    )
)
POLYGONS: dict[str, list[list[tuple[float, float]]]] = {
    "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
    "triangle": [[(0, -1), (0.95, 0.8), (-0.95, 0.8)]],
    "diamond": [[(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]],
    "star": [_star(5, 0.42)],
    "cross": [
        [(-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)],
        [(-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)],
    ],
    "heart": [_HEART],
    "arch": [
        [(-1, -0.9), (1, -0.9), (1, -0.35), (-1, -0.35)],
        [(-1, -0.9), (-0.5, -0.9), (-0.5, 1), (-1, 1)],
        [(0.5, -0.9), (1, -0.9), (1, 1), (0.5, 1)],
    ],
    "tree": [
        [(0, -1), (0.9, 0.35), (-0.9, 0.35)],
        [(-0.18, 0.3), (0.18, 0.3), (0.18, 1), (-0.18, 1)],
    ],
    "house": [
        [(-0.75, -0.1), (0.75, -0.1), (0.75, 1), (-0.75, 1)],
        [(-1, -0.1), (0, -1), (1, -0.1)],
    ],
    "tower": [
        [(-0.35, -0.6), (0.35, -0.6), (0.35, 1), (-0.35, 1)],
        [(-0.6, -1), (-0.25, -1), (-0.25, -0.55), (-0.6, -0.55)],
        [(0.25, -1), (0.6, -1), (0.6, -0.55), (0.25, -0.55)],
        [(-0.6, -0.7), (0.6, -0.7), (0.6, -0.5), (-0.6, -0.5)],
    ],
    "lamp": [
        [(-0.1, -0.4), (0.1, -0.4), (0.1, 1), (-0.1, 1)],
        [(-0.5, -1), (0.5, -1), (0.3, -0.3), (-0.3, -0.3)],
        [(-0.45, 0.8), (0.45, 0.8), (0.45, 1), (-0.45, 1)],
    ],
    "well": [
        [(-0.9, 0.2), (0.9, 0.2), (0.7, 1), (-0.7, 1)],
        [(-0.9, -0.9), (-0.7, -0.9), (-0.7, 0.3), (-0.9, 0.3)],
        [(0.7, -0.9), (0.9, -0.9), (0.9, 0.3), (0.7, 0.3)],
        [(-0.9, -0.9), (0.9, -0.9), (0.9, -0.7), (-0.9, -0.7)],
    ],
    "flag": [[(-0.7, -1), (-0.5, -1), (-0.5, 1), (-0.7, 1)], [(-0.5, -1), (0.9, -0.5), (-0.5, 0)]],
    "bridge": [
        [(-1, -0.2), (1, -0.2), (1, 0.15), (-1, 0.15)],
        [(-0.8, 0.1), (-0.5, 0.1), (-0.5, 0.9), (-0.8, 0.9)],
        [(0.5, 0.1), (0.8, 0.1), (0.8, 0.9), (0.5, 0.9)],
    ],
}


@functools.lru_cache(maxsize=20_000)
def _shape_sprite(name: str, colour: str, texture: str, radius: float, angle: int) -> Sprite:
    """A shape of this radius in pixels, turned by `angle` degrees."""
    half = int(np.ceil(radius * 1.45)) + 1
    side = (2 * half + 1) * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    centre, scale = side / 2, radius * SUPERSAMPLE
    if name in ("circle", "ring"):
        draw.ellipse([centre - scale, centre - scale, centre + scale, centre + scale], fill=255)
        if name == "ring":
            hole = 0.55 * scale
            draw.ellipse([centre - hole, centre - hole, centre + hole, centre + hole], fill=0)
    else:
        turn = np.deg2rad(angle)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        for polygon in POLYGONS[name]:
            points = (np.array(polygon) @ rotation.T) * scale + centre
            draw.polygon([tuple(point) for point in points], fill=255)
    alpha = np.asarray(canvas, np.float32).reshape(
        2 * half + 1, SUPERSAMPLE, 2 * half + 1, SUPERSAMPLE
    )
    alpha = alpha.mean((1, 3))[..., None] / 255
    paint = np.broadcast_to(np.array(COLOURS[colour], np.float32), (*alpha.shape[:2], 3)).copy()
    y, x = np.mgrid[: 2 * half + 1, : 2 * half + 1] - half
    if texture == "striped":
        paint[(y + half) // 3 % 2 == 0] *= 0.35
    elif texture == "dotted":
        paint[(x % 6 < 3) & (y % 6 < 3)] *= 0.25
    return alpha, paint


@functools.lru_cache(maxsize=2000)
def _sign_sprite(text: str, colour: str) -> Sprite:
    """A dark plate with the word or digit on it."""
    font = ImageFont.load_default(size=34)
    left, top, right, bottom = font.getbbox(text.upper())
    width, height = int(right - left) + 14, 40
    canvas = Image.new("RGB", (width, height), (8, 8, 10))
    ImageDraw.Draw(canvas).text(
        (7 - left, (height - (bottom - top)) / 2 - top),
        text.upper(),
        font=font,
        fill=COLOURS[colour],
    )
    return np.ones((height, width, 1), np.float32), np.asarray(canvas, np.float32)


def _paste(picture: np.ndarray, sprite: Sprite, x: float, y: float) -> None:
    """Blend a sprite into a float32 picture, its centre at the pixel (x, y), cut at the edges."""
    alpha, paint = sprite
    height, width = alpha.shape[:2]
    left, top = round(x) - width // 2, round(y) - height // 2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, SIZE), min(top + height, SIZE)
    if x0 >= x1 or y0 >= y1:
        return
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    target = picture[y0:y1, x0:x1]
    target += alpha[part] * (paint[part] - target)


@functools.lru_cache(maxsize=64)
def _map(ground: str, seed: int) -> np.ndarray:
    """Ground that wraps, with blobs that show the camera's motion: (3 SIZE, 3 SIZE, 3)."""
    rng = np.random.default_rng(seed)
    base = np.array(GROUNDS[ground], np.float32)
    field = np.broadcast_to(base, (3 * SIZE, 3 * SIZE, 3)).copy()
    for _ in range(110):
        x, y = (int(v) for v in rng.integers(0, 3 * SIZE, 2))
        side = int(rng.integers(6, 14))
        rows, columns = np.arange(y, y + side) % (3 * SIZE), np.arange(x, x + side) % (3 * SIZE)
        field[np.ix_(rows, columns)] = base + rng.uniform(25, 60)
    return field


def _ground(scene: Scene, camera: np.ndarray) -> np.ndarray:
    if scene.genre != "tour":
        return np.broadcast_to(np.array(GROUNDS[scene.ground], np.float32), (SIZE, SIZE, 3)).copy()
    field = _map(scene.ground, scene.index % 16)
    left, top = (round(float(c) * SIZE) for c in camera)
    rows = np.arange(top, top + SIZE) % (3 * SIZE)
    columns = np.arange(left, left + SIZE) % (3 * SIZE)
    return field[rows[:, None], columns[None, :]]


def _speck(number: int, t: float) -> tuple[float, float]:
    """Pixel (x, y) of a distractor at `t` seconds: a grey square that drifts and means nothing."""
    rng = np.random.default_rng(number)
    x, y, vx, vy = rng.uniform([0, 0, -0.25, -0.25], [1, 1, 0.25, 0.25])
    return (x + vx * t) % 1 * SIZE, (y + vy * t) % 1 * SIZE


def _draw(picture: np.ndarray, thing: Thing, t: float, camera: np.ndarray) -> None:
    x, y = (at(thing.position, t) - camera) * SIZE
    colour = colour_at(thing, t)
    if thing.kind == "sign":
        _paste(picture, _sign_sprite(thing.name, colour), x, y)
        return
    radius = float(RADIUS[thing.size] * at(thing.scale, t)[0] * SIZE)
    angle = int(round(at(thing.angle, t)[0] / 15) * 15) % 360
    spread = float(at(thing.spread, t)[0]) * SIZE
    if spread > 0:
        radius *= 0.7
    sprite = _shape_sprite(thing.name, colour, thing.texture, round(radius * 2) / 2, angle)
    for offset in (-spread, spread) if spread > 0 else (0.0,):
        _paste(picture, sprite, x + offset, y)


def frame(scene: Scene, t: float) -> np.ndarray:
    """The picture at `t` seconds: uint8 (SIZE, SIZE, 3 RGB)."""
    camera = at(scene.camera, t)
    picture = _ground(scene, camera)
    for number in range(scene.specks):
        x, y = _speck(scene.index * 10 + number, t)
        picture[int(y) : int(y) + 4, int(x) : int(x) + 4] = 150
    for thing in sorted(scene.things, key=lambda thing: thing.kind == "sign"):
        if is_visible(thing, t):
            _draw(picture, thing, t, camera)
    return np.clip(picture, 0, 255).astype(np.uint8)


def frame_times(scene: Scene) -> np.ndarray:
    """Presentation times (T,) of the video's frames in seconds, from zero.

    At a variable rate each step is between half and one and a half times the nominal one.
    """
    step = 1 / scene.source_fps
    if not scene.variable_rate:
        return np.arange(int(scene.duration_s * scene.source_fps)) * step
    rng = np.random.default_rng([scene.seed, scene.index, 7])
    steps = step * rng.uniform(0.5, 1.5, int(2 * scene.duration_s * scene.source_fps))
    times = np.concatenate([[0.0], np.cumsum(steps)])
    return times[times < scene.duration_s]


def write_video(scene: Scene, path: str | Path) -> None:
    """Write the scene as an H.264 MP4 without audio.

    Args:
        scene: What to draw.
        path: File to write; an existing one is replaced.
    """
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        rate = Fraction(scene.source_fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = TIME_BASE
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"preset": "superfast", "crf": "20", "flags": "+bitexact"}
        for t in frame_times(scene):
            picture = av.VideoFrame.from_ndarray(frame(scene, float(t)), format="rgb24")
            picture.pts, picture.time_base = round(float(t) / TIME_BASE), TIME_BASE
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
