"""The engines of benchmarks/video.py, and what they are asked for.

Each function here imports what its engine needs and returns the work to be measured, from opening
the file on. Every library is used as well as its interface allows: whoever addresses frames by
index gets the true indices for free, whoever must seek gets the places of the keyframes.
"""

import importlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from video_files import FPS

from apollo.runtime import num_available_cores
from apollo.video import ClipSampling, load_clips, open_video, sample

SEEK_SAVES = 64  # frames; OpenCV and plain PyAV read on if a seek would skip fewer


@dataclass(frozen=True)
class Request:
    """The frames wanted of a file, in every way that an engine may ask for them.

    Attributes:
        path: The file.
        sampling: `ClipSampling` as a dictionary.
        times_s: When to look, from the first frame on, never later than the last.
        start_s: The first frame's time on the container's clock.
        indices: Which frames are on the screen then.
        keyframes: For each, the index of the keyframe before it.
        groups: First and last timestamp of what must be decoded, for each group of pictures.
    """

    path: str
    sampling: dict[str, Any]
    times_s: list[float]
    start_s: float
    indices: list[int]
    keyframes: list[int]
    groups: list[tuple[int, int]]

    @classmethod
    def of(cls, path: Path, sampling: ClipSampling) -> "Request":
        """Sample the file, by the timestamps of its packets."""
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size]
            tick_s = float(stream.time_base or 0)
        ticks = np.sort([p.pts for p in packets])
        key_ticks = np.sort([p.pts for p in packets if p.is_keyframe])
        frames_s = (ticks - ticks[0]) * tick_s
        times_s = sample(frames_s[-1] + frames_s[-1] - frames_s[-2], sampling, FPS)[0].ravel()
        times_s = np.minimum(times_s, frames_s[-1])
        indices = np.searchsorted(frames_s, times_s + 1e-6, side="right") - 1
        wanted = ticks[indices]
        keys = key_ticks[np.searchsorted(key_ticks, wanted, side="right") - 1]
        return cls(
            path=str(path),
            sampling=asdict(sampling),
            times_s=times_s.tolist(),
            start_s=float(ticks[0] * tick_s),
            indices=indices.tolist(),
            keyframes=np.searchsorted(ticks, keys).tolist(),
            groups=[(int(key), int(wanted[keys == key].max())) for key in np.unique(keys)],
        )


Work = Callable[[Request], Any]


def apollo_frames() -> Work:
    """Our engine."""

    def work(request: Request) -> np.ndarray:
        with open_video(request.path) as video:
            return video.frames_at(request.times_s).pixels

    return work


def decord_frames() -> Work:
    """decord; through its bridge to torch, which spares a copy of the frames."""
    import decord

    importlib.import_module("torch")  # now, not by the bridge while the clock runs
    decord.bridge.set_bridge("torch")
    return lambda request: decord.VideoReader(
        request.path, ctx=decord.cpu(), num_threads=0
    ).get_batch(request.indices)


def torchcodec_frames(seek_mode: str, num_threads: int) -> Work:
    """torchcodec, by time."""
    from torchcodec.decoders import VideoDecoder

    def work(request: Request) -> Any:
        decoder = VideoDecoder(
            request.path,
            seek_mode=seek_mode,
            num_ffmpeg_threads=num_threads,
            dimension_order="NHWC",
        )
        times_s = [request.start_s + time_s for time_s in request.times_s]
        return decoder.get_frames_played_at(times_s).data

    return work


def opencv_frames() -> Work:
    """OpenCV: seeks by index where that saves decoding, otherwise reads on."""
    import cv2

    def work(request: Request) -> list[np.ndarray]:
        capture = cv2.VideoCapture(request.path, cv2.CAP_FFMPEG)
        frames, position = [], 0  # the frame that the next grab gives
        for index, keyframe in zip(request.indices, request.keyframes, strict=True):
            if keyframe - position > SEEK_SAVES:
                capture.set(cv2.CAP_PROP_POS_FRAMES, index)
                position = index
            for _ in range(index + 1 - position):
                capture.grab()
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
            position = index + 1
        return frames

    return work


def pyav_frames() -> Work:
    """PyAV as its manual shows it, with FFmpeg's frame threads."""

    def work(request: Request) -> list[np.ndarray]:
        frames, position = [], 0
        with av.open(request.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            decoder = container.decode(stream)
            shown = next(decoder)
            following = next(decoder, None)
            wanted = zip(request.times_s, request.indices, request.keyframes, strict=True)
            for time_s, index, keyframe in wanted:
                target_s = request.start_s + time_s + 1e-6
                if keyframe - position > SEEK_SAVES:
                    container.seek(int(target_s / stream.time_base), stream=stream)
                    decoder = container.decode(stream)
                    shown, following = next(decoder), next(decoder, None)
                while following is not None and following.time <= target_s:
                    shown, following = following, next(decoder, None)
                frames.append(shown.to_ndarray(format="rgb24"))
                position = index
        return frames

    return work


def floor(skips_unused: bool) -> Work:
    """Decode the groups of pictures that hold the wanted frames, one reader per core, no more."""

    def throw_away(path: str, groups: list[tuple[int, int]]) -> None:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            if skips_unused:
                stream.codec_context.skip_frame = "NONREF"
            for first, last in groups:
                container.seek(first, stream=stream)
                next((None for frame in container.decode(stream) if frame.pts >= last), None)

    def work(request: Request) -> None:
        num_readers = num_available_cores()
        edges = np.linspace(0, len(request.groups), num_readers + 1).astype(int)
        shares = [request.groups[a:b] for a, b in itertools.pairwise(edges) if a < b]
        with ThreadPoolExecutor(num_readers) as pool:
            list(pool.map(throw_away, [request.path] * len(shares), shares))

    return work


def apollo_tensors(siglip_resize: str, both: bool = False, normalised: bool = False) -> Work:
    """Our way from a file to tensors (N, 3, S, S), one per encoder.

    They are uint8, as the processor hands them to the model, which normalises 25 clips at a time;
    or float32, all of them normalised.
    """
    importlib.import_module("torch")  # now, not at its first use, while the clock runs

    from apollo.model.image_processing import Preprocessing, channels_first

    encoders = [Preprocessing(384, (0.5,) * 3, (0.5,) * 3, siglip_resize)]
    if both:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        encoders.append(Preprocessing(224, mean, std, "bilinear"))

    def work(request: Request) -> tuple[Any, ...]:
        clips = load_clips(request.path, ClipSampling(**request.sampling), squares=encoders)
        tensors = [channels_first(squares).flatten(0, 1) for squares in clips.squares]
        if normalised:
            pairs = zip(encoders, tensors, strict=True)
            tensors = [encoder.normalise(pixels) for encoder, pixels in pairs]
        return tuple(tensors)

    return work


def common_tensors() -> Work:
    """What video models' code commonly does: decord, LLaVA's padding, the SigLIP processor."""
    import decord
    import torch
    from PIL import Image
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )

    def prepare(frame: np.ndarray) -> torch.Tensor:
        picture = Image.fromarray(frame)
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in processor.image_mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return processor(images=square, return_tensors="pt")["pixel_values"][0]

    def work(request: Request) -> tuple[Any, ...]:
        reader = decord.VideoReader(request.path, ctx=decord.cpu(), num_threads=0)
        frames = reader.get_batch(request.indices).asnumpy()
        return (torch.stack([prepare(frame) for frame in frames]),)

    return work


PARTS: dict[str, dict[str, Callable[[], Work]]] = {
    "decode": {
        "apollo": apollo_frames,  # the first of each part is what the others are compared with
        "decord": decord_frames,
        **{
            f"torchcodec ({mode}, {threads or 'auto'} threads)": partial(
                torchcodec_frames, mode, threads
            )
            for mode in ("exact", "approximate")
            for threads in (1, 0)
        },
        "opencv": opencv_frames,
        "pyav": pyav_frames,
        "floor": partial(floor, False),
        "floor without unused": partial(floor, True),
    },
    "tensors": {
        "apollo": partial(apollo_tensors, "pillow_bicubic"),
        "apollo fast": partial(apollo_tensors, "decoder"),
        "apollo both encoders": partial(apollo_tensors, "pillow_bicubic", both=True),
        "apollo float32": partial(apollo_tensors, "pillow_bicubic", normalised=True),
        "common": common_tensors,
    },
}
