"""A cache of clip features on disk, for stages whose encoders are frozen.

Such a stage shows the same videos to the same encoders over and over. With the cache each video is
decoded and encoded once, and the stage trains on `clip_features` instead of `pixel_values`. A file
is found by what determines its contents: the bytes of the video, the sampling, the encoders'
weights and their precision; whatever changes, old files are simply not found. Read next:
`collate.py`, which uses this.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apollo.video import VideoClips

if TYPE_CHECKING:
    import torch

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class CachedClips:
    """The features of one video or image, and the clips without their pixels.

    Attributes:
        features: (C clips, T, H, W, D) fused features, float16 (bfloat16 if they are too large).
        clips: What the prompt says of a video's clips; its frames are one black pixel each. None
            for an image.
    """

    features: torch.Tensor
    clips: VideoClips | None


class FeatureCache:
    """A folder of features, one safetensors file per video or image.

    Args:
        folder: Where the files lie; several stages and runs may share it.
        settings: What the features depend on besides the file: sampling, encoders' fingerprint,
            precision. Plain JSON values.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = json.dumps(settings, sort_keys=True)

    def file_of(self, media_path: Path) -> Path:
        """Say where the features of a video or image lie, whether they exist or not."""
        stat = media_path.stat()
        content = _hash_content(media_path, stat.st_size, stat.st_mtime_ns)
        key = hashlib.sha256(f"{content} {self.settings}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, media_path: Path) -> bool:
        return self.file_of(media_path).exists()

    def save(self, media_path: Path, features: torch.Tensor, clips: VideoClips | None) -> None:
        """Write the features (C, T, H, W, D) of a video or image, whole or not at all."""
        import torch
        from safetensors.torch import save_file

        is_small = bool(features.abs().max() <= FLOAT16_MAX)
        tensors = {"features": features.to(torch.float16 if is_small else torch.bfloat16)}
        if clips is not None:
            numbers = [clips.duration_s, clips.source_fps, clips.sampled_fps]
            tensors |= {
                "times_s": torch.from_numpy(clips.times_s),
                "spans_s": torch.from_numpy(clips.spans_s),
                "numbers": torch.tensor(numbers, dtype=torch.float64),
            }
        path = self.file_of(media_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)
        temporary.rename(path)

    def load(self, media_path: Path) -> CachedClips:
        """Read the features of a video or image that is in the cache."""
        from safetensors.torch import load_file

        tensors = load_file(self.file_of(media_path))
        features = tensors["features"]
        if "times_s" not in tensors:
            return CachedClips(features, None)
        duration_s, source_fps, sampled_fps = tensors["numbers"].tolist()
        times_s = tensors["times_s"].numpy()
        clips = VideoClips(
            frames=np.zeros((*times_s.shape, 1, 1, 3), dtype=np.uint8),
            times_s=times_s,
            spans_s=tensors["spans_s"].numpy(),
            duration_s=duration_s,
            source_fps=source_fps,
            sampled_fps=sampled_fps,
        )
        return CachedClips(features, clips)


def fingerprint(module: torch.nn.Module) -> str:
    """Hash a module's weights: names, types, shapes and every byte."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@lru_cache(maxsize=100_000)
def _hash_content(path: Path, size: int, modified_ns: int) -> str:
    """Hash a file's bytes; size and time are arguments so that a changed file is hashed again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
