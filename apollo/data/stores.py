"""Where the media of records lie: in folders, tar shards, remote stores or the record itself.

A record names its videos and images; `locate` says once, when the record is read, what each name
means. The contract with the rest of the code is small: a medium is a `Path`, or one of the three
frozen classes here, all hashable and cheap to pickle; `fetch(medium)` gives what
`apollo.video.load_clips` and `apollo.media.load_image` take (a path or bytes) and `exists(medium)`
asks no network. Read next: `formats.py`.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass(frozen=True)
class TarMember:
    """A file in one of several tar shards; they are indexed when the first member is needed.

    Attributes:
        shards: Path of a tar file, or a pattern as `shards/*.tar`.
        name: The member's path in the shards.
    """

    shards: str
    name: str

    def __str__(self) -> str:
        return f"{self.shards}!{self.name}"

    def exists(self) -> bool:
        """Whether a shard holds the member."""
        return _normal(self.name) in index_shards(self.shards)

    def fetch(self) -> bytes:
        """Read the member.

        Raises:
            FileNotFoundError: No shard holds it.
        """
        place = index_shards(self.shards).get(_normal(self.name))
        if place is None:
            raise FileNotFoundError(f"{self.shards} holds no member {self.name}")
        shard, offset, size = place
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store that fsspec reaches; it is copied into the local cache when first needed.

    Attributes:
        url: As `s3://bucket/a.mp4`. What it names is taken not to change.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether it may be there: only opening it would tell."""
        return True

    def fetch(self) -> Path:
        """Give the path of the local copy.

        Raises:
            OSError: The store does not give it.
            ValueError: Something that the store needs is not installed.
        """
        return download(self.url)


@dataclass(frozen=True)
class EmbeddedFile:
    """A file whose bytes are in the record.

    Attributes:
        name: What to call it in messages.
        data: Its bytes.
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """It is here."""
        return True

    def fetch(self) -> bytes:
        """Give the bytes."""
        return self.data


Medium = Path | TarMember | RemoteFile | EmbeddedFile


def locate(source: Any, media_dir: str) -> Medium:
    """Say what a record means by the source of a medium.

    Args:
        source: A path, absolute or in the `media_dir`; a URL; bytes; or `{"bytes", "path"}`, as
            Hugging Face data sets hold images.
        media_dir: A folder, tar shards (`shards/*.tar`) or a URL.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(source, dict) and set(source) == {"bytes", "path"}:
        source = source["path"] if source["bytes"] is None else source["bytes"]
    if isinstance(source, bytes):
        return EmbeddedFile(f"<{len(source)} bytes>", source)
    if not isinstance(source, str) or not source or "\0" in source:
        raise ValueError(f"a medium must be the path of a file, a URL or bytes, not {source!r:.80}")
    if "://" in source:
        return RemoteFile(source)
    if os.path.isabs(source):
        return Path(source)
    if "://" in media_dir:
        return RemoteFile(f"{media_dir.rstrip('/')}/{source}")
    if media_dir.endswith(".tar"):
        return TarMember(media_dir, source)
    return Path(media_dir) / source


def fetch(medium: Medium) -> Path | bytes:
    """Give a medium as a local path or as bytes.

    Raises:
        OSError: It is not there, or its store cannot be reached.
        ValueError: Something that its store needs is not installed.
    """
    return medium if isinstance(medium, Path) else medium.fetch()


def exists(medium: Medium) -> bool:
    """Whether a medium is there; for a remote one True, as only a download would tell."""
    return medium.is_file() if isinstance(medium, Path) else medium.exists()


# ---- tar shards


@lru_cache(maxsize=64)
def index_shards(shards: str) -> dict[str, tuple[str, int, int]]:
    """Find the members of tar shards: name -> (shard, offset, size); reads only the headers.

    Raises:
        FileNotFoundError: No file fits the pattern.
        ValueError: A shard is damaged or compressed, or two hold a member of the same name.
    """
    paths = sorted(glob(shards)) or [path for path in [shards] if os.path.isfile(path)]
    if not paths:
        raise FileNotFoundError(f"no tar shards {shards}")
    members: dict[str, tuple[str, int, int]] = {}
    for path in paths:
        try:
            with tarfile.open(path, "r:") as shard:
                for member in shard:
                    if not member.isfile():
                        continue
                    name = _normal(member.name)
                    if name in members:
                        raise ValueError(f"{path} and {members[name][0]} both hold {name}")
                    members[name] = (path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} is no plain tar file ({error}); unpack it if it is compressed"
            ) from error
        ends = [offset + size for shard_, offset, size in members.values() if shard_ == path]
        if max(ends, default=0) > os.path.getsize(path):
            raise ValueError(f"{path} is cut off; download it again")
    return members


def _normal(name: str) -> str:
    """Write a member's name without `./`: some archives have it, records do not."""
    return str(PurePosixPath(name))


# ---- remote stores


def cache_dir() -> Path:
    """Where local copies lie: $APOLLO_CACHE, by default ~/.cache/apollo."""
    return Path(os.environ.get("APOLLO_CACHE") or Path.home() / ".cache" / "apollo")


def download(url: str) -> Path:
    """Copy a remote file into the cache, unless it is there, whole or not at all.

    Raises:
        OSError: The store does not give it.
        ValueError: fsspec, or what it needs for this scheme, is not installed.
    """
    suffix = PurePosixPath(url.split("?")[0]).suffix
    path = cache_dir() / "remote" / f"{hashlib.sha256(url.encode()).hexdigest()}{suffix}"
    if path.is_file():
        return path
    try:
        import fsspec

        store, name = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{url}: {error}; pip install 'apollo-lmm[data]', or the latter"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        store.get_file(name, str(part))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path
