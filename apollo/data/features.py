"""A cache of clip features on disk, for stages whose encoders are frozen.

Such a stage shows the same videos to the same encoders over and over. With the cache each video is
decoded and encoded once, and the stage trains on `clip_features` instead of `pixel_values`. A file
is found by what determines its contents: the bytes of the video, the sampling, the encoders'
weights and their precision; whatever changes, old files are simply not found. Files are written
whole or not at all and any number of processes may write at once; one that is damaged all the same
counts as absent and is made anew. Read next: `collate.py`, which uses this.
"""

from __future__ import annotations

import errno
import hashlib
import json
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apollo.data.stores import Medium, fetch
from apollo.video import VideoClips

if TYPE_CHECKING:
    import torch

FLOAT16_MAX = 65504.0
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class CacheError(ValueError):
    """The cache cannot be written; one line says why and what to do."""


class BrokenFeaturesError(ValueError):
    """A file of the cache is damaged or gone."""


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

    def file_of(self, medium: Medium) -> Path:
        """Say where the features of a video or image lie, whether they exist or not.

        Raises:
            OSError: The video or image itself cannot be read.
        """
        key = hashlib.sha256(f"{_hash_medium(medium)} {self.settings}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, medium: Medium) -> bool:
        """Whether the features are there and whole, as far as the file's header and size tell."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file_of(medium), framework="pt") as file:
                return "features" in list(file.keys())
        except (SafetensorError, FileNotFoundError):
            return False

    def save(self, medium: Medium, features: torch.Tensor, clips: VideoClips | None) -> None:
        """Write the features (C, T, H, W, D) of a video or image, whole or not at all.

        Raises:
            CacheError: The disk is full, or the folder cannot be written.
        """
        import torch
        from safetensors.torch import save

        is_small = bool(features.abs().max() <= FLOAT16_MAX)
        tensors = {"features": features.to(torch.float16 if is_small else torch.bfloat16)}
        if clips is not None:
            numbers = [clips.duration_s, clips.source_fps, clips.sampled_fps]
            tensors |= {
                "times_s": torch.from_numpy(clips.times_s),
                "spans_s": torch.from_numpy(clips.spans_s),
                "numbers": torch.tensor(numbers, dtype=torch.float64),
            }
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        path = self.file_of(medium)
        # A name that no other process has, not even one on another machine.
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            why = "the disk is full" if error.errno in FULL_DISK else error.strerror
            raise CacheError(
                f"feature cache {self.folder}: {why}; {self.size()} are kept. Make room or set "
                "feature_cache_dir to another disk, then resume"
            ) from error

    def load(self, medium: Medium) -> CachedClips:
        """Read the features of a video or image that is in the cache.

        Raises:
            BrokenFeaturesError: They are not there, or the file is damaged; it is removed then, so
                that the next filling makes it anew.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.file_of(medium)
        try:
            tensors = load_file(path)
            features = tensors["features"]
        except (SafetensorError, OSError, KeyError) as error:
            if not isinstance(error, OSError):
                path.unlink(missing_ok=True)
            raise BrokenFeaturesError(
                f"features of {medium} in {path} cannot be read ({error})"
            ) from error
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

    def size(self) -> CacheSize:
        """Count what lies in the folder, of all settings."""
        sizes = [path.stat().st_size for path in self.folder.glob("*/*.safetensors")]
        return CacheSize(len(sizes), sum(sizes))


@dataclass(frozen=True)
class CacheSize:
    """How much a cache holds.

    Attributes:
        num_files: Videos and images.
        num_bytes: Their size on disk.
    """

    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.num_files} files ({self.num_bytes / 1e9:.2f} GB)"


def fingerprint(module: torch.nn.Module) -> str:
    """Hash a module's weights: names, types, shapes and every byte."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_medium(medium: Medium) -> str:
    if isinstance(medium, Path):
        stat = medium.stat()
        return _hash_file(medium, stat.st_size, stat.st_mtime_ns)
    source = fetch(medium)
    if isinstance(source, Path):
        return _hash_medium(source)
    return hashlib.sha256(source).hexdigest()


@lru_cache(maxsize=100_000)
def _hash_file(path: Path, size: int, modified_ns: int) -> str:
    """Hash a file's bytes; size and time are arguments so that a changed file is hashed again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
