"""From a source to what the LLM sees of it: decoded in another process, encoded once.

Videos and images of strangers are opened by processes that are limited in time and memory
(apollo/video/guard.py), and only after their length and size have been looked at. What the engine
made of them is kept as long as there is room, so that a conversation, or another one on the same
video, does not pay again. Two requests for one video at the same time share the work; when the last
of them leaves, it is stopped. Read next: `engine.py`.
"""

import asyncio
import base64
import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from apollo.media import load_image, sampling_of
from apollo.model.image_processing import channels_first
from apollo.serve.sources import RefusedError, Source, stopping
from apollo.video import (
    ClipSampling,
    GuardedLoader,
    Square,
    VideoClips,
    VideoError,
    VideoLimitError,
    load_clips,
    open_video,
)

if TYPE_CHECKING:
    from torch import Tensor

    from apollo.model import ApolloProcessor
    from apollo.serve.engine import Engine

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
THUMBNAIL_SIZE = 96  # pixels, on the page
MAX_THUMBNAILS = 512


@dataclass(frozen=True)
class MediaLimits:
    """What is refused.

    Attributes:
        max_duration_s: Longest video.
        max_pixels: Most pixels of a frame or image; 8K is 33 million.
        time_limit_s: Longest that decoding may take.
        memory_limit_bytes: Most memory of a process that decodes.
    """

    max_duration_s: float = 3600.0
    max_pixels: int = 7680 * 4320
    time_limit_s: float = 60.0
    memory_limit_bytes: int = 2 * 2**30


@dataclass(frozen=True)
class Medium:
    """A video or an image, ready for prompts.

    Attributes:
        key: Equal for equal contents, seen in the same way.
        shown: What the processor needs to write its placeholders: clips, or an image, without their
            pixels.
        tokens: What the LLM sees, (C, N, D).
        description: For the page: its length, the clips, their frames as small JPEGs.
    """

    key: str
    shown: Any
    tokens: "Tensor"
    description: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        frames = sum(len(f) for clip in self.description["clips"] for f in clip["frames"])
        return self.tokens.nbytes + frames


def open_guarded(
    source: bytes | Path,
    kind: str,
    limits: MediaLimits,
    sampling: ClipSampling,
    squares: Sequence[Square],
) -> VideoClips | list[np.ndarray]:
    """Open a video, or an image as what each encoder sees of it, uint8 (1, 1, S, S, 3).

    Runs in the process under limits: also a small image can be long enough to fill the memory once
    it is padded to a square.

    Raises:
        VideoError: It is none, or beyond the limits.
    """
    try:
        if kind == "video":
            return _open_video(source, limits, sampling, squares)
        pixels = _open_image(source, limits)
        return [square.square(pixels)[None, None] for square in squares]
    except Image.DecompressionBombError as error:  # a WebP may be a video, too
        raise VideoLimitError(f"it has more than {limits.max_pixels} pixels") from error


def _open_video(
    source: bytes | Path, limits: MediaLimits, sampling: ClipSampling, squares: Sequence[Square]
) -> VideoClips:
    with open_video(source, num_threads=1) as video:
        info = video.info
    if info.duration_s > limits.max_duration_s:
        raise VideoLimitError(
            f"the video lasts {info.duration_s:.0f} s, and at most {limits.max_duration_s:g} s are "
            "allowed here"
        )
    _check_pixels(info.width, info.height, limits)
    return load_clips(source, sampling, squares=squares, num_threads=1)


def _open_image(source: bytes | Path, limits: MediaLimits) -> np.ndarray:
    """An image's pixels, uint8 (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format not in IMAGE_FORMATS:
                raise VideoError(f"images must be {', '.join(IMAGE_FORMATS)}")
            _check_pixels(image.width, image.height, limits)
        return np.asarray(load_image(source))
    except (VideoError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:  # Pillow's readers fail on damaged files in any way they like
        raise VideoError("it is not an image that can be read") from error


def _check_pixels(width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        raise VideoLimitError(
            f"it is {width} x {height} pixels large, and at most {limits.max_pixels} pixels are "
            "allowed here"
        )


class MediaStore:
    """Gets media ready, and keeps them; for one event loop.

    Attributes:
        num_loaded: Media that were decoded.
        num_found: Media that were there already.
    """

    def __init__(
        self,
        engine: "Engine",
        limits: MediaLimits,
        num_processes: int = 2,
        max_bytes: int = 2**30,
    ) -> None:
        """Prepare `num_processes` processes, which start when needed; keep up to `max_bytes`."""
        self.engine, self.limits, self.max_bytes = engine, limits, max_bytes
        self.processor: ApolloProcessor = engine.processor
        self.num_loaded = self.num_found = 0
        self._media: OrderedDict[str, Medium] = OrderedDict()
        self._loading: dict[str, _Shared] = {}
        self._idle: asyncio.LifoQueue[GuardedLoader] = asyncio.LifoQueue()
        self._loaders: set[GuardedLoader] = set()
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="media")
        self._is_closed = False
        for _ in range(num_processes):
            self._add_loader()

    async def get(self, kind: str, source: Source, sampling: str | None = None) -> Medium:
        """Get an image or a video ready.

        Args:
            kind: "image" or "video".
            source: Where it is.
            sampling: A key of `apollo.video.SAMPLERS`; None is as the model was trained.

        Raises:
            RefusedError: It cannot be used.
        """
        key = f"{kind}:{sampling}:{source.digest}"
        if key in self._media:
            self._media.move_to_end(key)
            self.num_found += 1
            return self._media[key]
        if self._is_closed:
            raise stopping()
        if key not in self._loading:
            task = asyncio.create_task(self._load(key, kind, source, sampling))
            self._loading[key] = _Shared(task)
        shared = self._loading[key]
        shared.num_waiting += 1
        try:
            return await asyncio.shield(shared.task)
        except asyncio.CancelledError:
            if self._is_closed and shared.task.cancelled():
                raise stopping() from None
            raise
        finally:
            shared.num_waiting -= 1
            if shared.num_waiting == 0:
                shared.task.cancel()
                if self._loading.get(key) is shared:
                    del self._loading[key]

    async def close(self) -> None:
        """End the processes, also those that are busy."""
        self._is_closed = True
        tasks = [shared.task for shared in self._loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for loader in self._loaders:
            await asyncio.to_thread(loader.close)
        await asyncio.to_thread(self._threads.shutdown)

    async def _load(self, key: str, kind: str, source: Source, sampling: str | None) -> Medium:
        loader = await self._idle.get()
        try:
            pixels, shown, description = await self._decode(loader, kind, source, sampling)
            # The process waits for the engine, or decoded videos would pile up before it.
            tokens = await asyncio.wrap_future(self.engine.encode(pixels, kind == "image"))
        except VideoError as error:
            status = 413 if isinstance(error, VideoLimitError) else 400
            message = str(error)
            if isinstance(source.data, Path):  # where it lies is nobody's business
                message = message.replace(str(source.data), source.name)
            raise RefusedError(status, "unusable_media", message) from None
        except RuntimeError as error:
            raise RefusedError(503, "encoding_failed", str(error)) from None
        finally:
            if loader in self._loaders:
                self._idle.put_nowait(loader)
        self.num_loaded += 1
        medium = self._media[key] = Medium(key, shown, tokens, description)
        while sum(m.num_bytes for m in self._media.values()) > self.max_bytes:
            self._media.popitem(last=False)
        return medium

    async def _decode(
        self, loader: GuardedLoader, kind: str, source: Source, sampling: str | None
    ) -> tuple[list["Tensor"], Any, dict[str, Any]]:
        """Decode; if nobody wants it any more, the process is ended and another takes its place."""

        def work() -> tuple[list["Tensor"], Any, dict[str, Any]]:
            wanted = sampling_of(self.processor, sampling)
            opened = loader.run(
                open_guarded, source.data, kind, self.limits, wanted, self.processor.squares
            )
            arrays = opened if isinstance(opened, list) else opened.squares
            shape = (-1, self.processor.frames_per_clip, -1, -1, -1)
            pixels = [channels_first(array).expand(shape) for array in arrays]
            return pixels, _without_pixels(opened), _describe(opened)

        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._loaders.discard(loader)
            self._add_loader()
            await asyncio.to_thread(loader.close)  # waits where its process is being started
            raise

    def _add_loader(self) -> None:
        loader = GuardedLoader(self.limits.time_limit_s, self.limits.memory_limit_bytes)
        self._loaders.add(loader)
        self._idle.put_nowait(loader)


@dataclass
class _Shared:
    """A medium that is being loaded, and how many requests wait for it."""

    task: "asyncio.Task[Medium]"
    num_waiting: int = 0


def _without_pixels(opened: VideoClips | list[np.ndarray]) -> Any:
    """The same with frames of one pixel, which take no memory."""
    pixel = np.zeros(1, np.uint8)
    if isinstance(opened, list):
        return np.broadcast_to(pixel, (1, 1, 3))
    frames = np.broadcast_to(pixel, (*opened.frames.shape[:2], 1, 1, 3))
    return replace(opened, frames=frames, squares=())


def _describe(opened: VideoClips | list[np.ndarray]) -> dict[str, Any]:
    """What the page shows of it."""
    if isinstance(opened, list):
        return {"kind": "image", "clips": []}
    is_shown = opened.times_s.size <= MAX_THUMBNAILS
    clips = [
        {
            "start_s": round(float(start_s), 3),
            "end_s": round(float(end_s), 3),
            "times_s": times_s.round(3).tolist(),
            "frames": [_thumbnail(frame) for frame in frames] if is_shown else [],
        }
        for frames, times_s, (start_s, end_s) in zip(
            opened.frames, opened.times_s, opened.spans_s, strict=True
        )
    ]
    return {
        "kind": "video",
        "duration_s": round(opened.duration_s, 3),
        "source_fps": round(opened.source_fps, 3),
        "clips": clips,
    }


def _thumbnail(frame: np.ndarray) -> str:
    """A frame (H, W, 3) as a small JPEG in a data URL."""
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
