"""The same frames through torchcodec, on the CPU or on a GPU's decoder, for whoever has it.

torchcodec needs torch and FFmpeg's libraries on the system, so it is no requirement. What a video
is, when its frames are shown and what is wrong with it is read as always (decode.py); only the
wanted frames are decoded another way. It is taken at its word for MP4, MOV, Matroska and WebM only:
of MPEG streams, AVI and bare streams it gives wrong times or no frames (0.13). On a CPU full-size
frames have the same pixels, but for the rounding of colours in rare formats.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from apollo.video.decode import VideoReader, Visitor, check_times
from apollo.video.files import DamagedVideoError

_FRAMES_AT_ONCE = 16  # full-size frames in memory
_CONTAINERS = {"mov", "matroska"}  # FFmpeg's names


class TorchcodecReader(VideoReader):
    """An open video whose frames torchcodec decodes; made by `open_video`."""

    def __init__(self, source: str | Path | bytes, num_threads: int | None, device: str):
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as error:  # the last two: FFmpeg is missing
            raise ValueError(
                f"torchcodec cannot be used ({str(error).strip().splitlines()[0]}); install it for "
                "your version of torch, with FFmpeg's libraries, or take the backend pyav"
            ) from error
        super().__init__(source, num_threads)
        if self.info.container.partition(",")[0] not in _CONTAINERS:
            self.close()
            raise ValueError(
                f"{self._name} is {self.info.container}, whose times torchcodec gets wrong; "
                "take the backend pyav"
            )
        try:
            self._torchcodec: Any = VideoDecoder(
                self._source,
                stream_index=self._stream.index,
                dimension_order="NHWC",
                num_ffmpeg_threads=self._num_threads,
                device=device,
            )
        except (RuntimeError, ValueError) as error:
            self.close()
            raise DamagedVideoError(
                f"{self._name} cannot be read by torchcodec ({error}); take the backend pyav"
            ) from error

    def visit(self, times_s: Sequence[float] | np.ndarray, visitor: Visitor) -> np.ndarray:
        """As `VideoReader.visit`."""
        wanted_s = check_times(times_s)
        found_s = np.empty(len(wanted_s))
        order = np.argsort(wanted_s, kind="stable")
        begin_s = self._torchcodec.metadata.begin_stream_seconds
        end_s = self._torchcodec.metadata.end_stream_seconds
        for start in range(0, len(order), _FRAMES_AT_ONCE):
            places = order[start : start + _FRAMES_AT_ONCE]
            moments_s = np.minimum(wanted_s[places] + 1e-6 + begin_s, np.nextafter(end_s, 0))
            try:
                batch = self._torchcodec.get_frames_played_at(moments_s.tolist())
            except RuntimeError as error:
                raise DamagedVideoError(
                    f"{self._name} is damaged: torchcodec stops with: {error}; "
                    "copy or download it again"
                ) from error
            found_s[places] = batch.pts_seconds.numpy() - begin_s
            for place, pixels in zip(places, batch.data.cpu().numpy(), strict=True):
                visitor(np.array([place]), self._converter(pixels))
        if len(wanted_s):
            self._check_complete(end_s - begin_s - 1 / self.info.source_fps, wanted_s.max())
        return found_s

    def _converter(self, pixels: np.ndarray) -> Callable[..., np.ndarray]:
        def to_rgb(size: tuple[int, int] | None = None) -> np.ndarray:
            height, width = size or (self.info.height, self.info.width)
            if pixels.shape[:2] == (height, width):
                return pixels
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            return frame.to_ndarray(width=width, height=height, interpolation=Interpolation.BICUBIC)

        return to_rgb
