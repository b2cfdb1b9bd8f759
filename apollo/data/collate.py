"""From positions of a mixture to batches: load the media, let the processor make tensors.

`BatchMaker` is what the training loop calls: batch number in, batch out, nothing remembered between
calls, so that the loop can start anywhere and workers can load ahead. The processor is passed in;
this module knows neither the model nor, until it is called, torch. Read next: `features.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from apollo.data.features import FeatureCache
from apollo.data.formats import Record
from apollo.data.mixture import Mixture
from apollo.media import load_image
from apollo.messages import map_media
from apollo.video import ClipSampling, VideoClips, VideoError, load_clips, open_video, sample

if TYPE_CHECKING:
    import torch


GROUP = 8
"""Videos and images that are encoded together when a cache is filled."""


class MediaError(ValueError):
    """A video or image of a record cannot be used; the message names record and file."""


class BatchMaker:
    """Makes batch number i of a stage.

    Args:
        sources: The records of each source of the mixture.
        mixture: Who comes at which position.
        processor: `processor(conversations, with_labels=True)` makes the tensors; its `squares` say
            what its encoders see of a frame.
        batch_size: Records in a batch; batch i holds the positions from i * batch_size on.
        sampling: How clips are chosen from a video.
        max_tokens: Longest row that the LLM can read.
        cache: Features of every video and image of the mixture (see `fill_cache`); the batches then
            hold `clip_features` instead of `pixel_values`.
        batches_per_step: Batches that make up one optimiser step. Its records are dealt to them by
            length: the step stays the same, but little of the batches is padding.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Record]],
        mixture: Mixture,
        processor: Any,
        batch_size: int,
        sampling: ClipSampling,
        max_tokens: int,
        cache: FeatureCache | None = None,
        batches_per_step: int = 1,
    ) -> None:
        self.sources = sources
        self.mixture = mixture
        self.processor = processor
        self.batch_size = batch_size
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.cache = cache
        self.batches_per_step = batches_per_step

    def records(self, number: int) -> list[Record]:
        """Give the records of a batch."""
        step, place = divmod(number, self.batches_per_step)
        size = self.batch_size * self.batches_per_step
        places = [self.mixture[i] for i in range(step * size, (step + 1) * size)]
        records = [self.sources[source][place] for source, place in places]
        if self.batches_per_step > 1:
            records.sort(key=self._likely_length)
        return records[place * self.batch_size : (place + 1) * self.batch_size]

    def _likely_length(self, record: Record) -> float:
        """Guess the tokens of a record: four letters make one, eight tell the time of a clip."""
        clips = sum(
            num_clips(path, self.sampling) if kind == "video" else 1 for kind, path in record.media
        )
        letters = sum(
            len(part["text"])
            for message in record.messages
            for part in message["content"]
            if part["type"] == "text"
        )
        return clips * (self.processor.tokens_per_clip + 8) + letters / 4

    def __call__(self, number: int) -> dict[str, Any]:
        """Make a batch: `input_ids`, `attention_mask`, `labels` (B, L) and its clips, if any.

        Raises:
            MediaError: A video or image cannot be read.
            ValueError: A row is longer than the LLM can read.
        """
        records = self.records(number)
        features: list[Any] = []
        conversations = [
            map_media(record.messages, self._loader_of(record, features)) for record in records
        ]
        try:
            batch = dict(
                self.processor(conversations, with_labels=True, with_pixels=self.cache is None)
            )
        except ValueError as error:
            names = ", ".join(record.where for record in records)
            raise ValueError(f"batch {number} of the records {names}: {error}") from error
        self._check_length(records, batch)
        if self.cache is not None:
            if features:
                import torch

                batch["clip_features"] = torch.cat([feature.float() for feature in features])
        return batch

    def _loader_of(self, record: Record, features: list[Any]) -> Callable[[str, Path], Any]:
        """Make the function that loads this record's media; cached features go into the list."""

        def load(kind: str, path: Path) -> VideoClips | Image.Image:
            if self.cache is None:
                return load_medium(kind, path, self.sampling, self.processor, record.where)
            cached = self.cache.load(path)
            features.append(cached.features)
            return Image.new("RGB", (1, 1)) if cached.clips is None else cached.clips

        return load

    def _check_length(self, records: Sequence[Record], batch: dict[str, Any]) -> None:
        lengths = batch["attention_mask"].sum(1).tolist()
        length, record = max(zip(lengths, records, strict=True), key=lambda pair: pair[0])
        if length > self.max_tokens:
            raise ValueError(
                f"{record.where}: record {record.id!r} has {length} tokens, the LLM reads "
                f"{self.max_tokens}; lower max_clips or tokens_per_clip, or shorten the record"
            )


@lru_cache(maxsize=100_000)
def num_clips(path: Path, sampling: ClipSampling) -> int:
    """Count the clips of a video; 0 if it cannot be read, of which its loading will tell."""
    try:
        with open_video(path, num_threads=1) as video:
            return len(sample(video.info.duration_s, sampling, video.info.source_fps)[0])
    except VideoError:
        return 0


def load_medium(
    kind: str, path: Path, sampling: ClipSampling, processor: Any, where: str
) -> VideoClips | Image.Image:
    """Load a video's clips or an image; a bad file is an error, never another file instead.

    Args:
        kind: "video" or "image".
        path: The file.
        sampling: How clips are chosen from a video.
        processor: Its `squares` say what the encoders see of a video's frames.
        where: Whose medium it is, for the message.

    Raises:
        MediaError: The file cannot be read.
    """
    try:
        if kind == "video":
            return load_clips(path, sampling, squares=processor.squares, num_threads=1)
        return load_image(path)
    except (ValueError, OSError) as error:
        raise MediaError(f"{where}: {kind} {path} cannot be read: {error}") from error


def fill_cache(
    cache: FeatureCache,
    records: Iterable[Record],
    sampling: ClipSampling,
    processor: Any,
    encode: Callable[[list[Any]], torch.Tensor],
    track: Callable[[list[Any], str], Iterable[Any]] = lambda items, _: items,
) -> int:
    """Encode every video and image of the records that the cache does not hold yet.

    Args:
        cache: What to fill.
        records: Whose media.
        sampling: How clips are chosen from a video; the cache's settings must depend on it.
        processor: Makes `pixel_values`; its `squares` say what the encoders see of a frame.
        encode: The model's encoders: pixel values to features (C, T, H, W, D), without gradients.
        track: Shows progress: called with the groups of missing media and a description.

    Returns:
        How many files were encoded.

    Raises:
        MediaError: A video or image cannot be read.
    """
    missing = list(_missing_media(cache, records))
    groups = [missing[i : i + GROUP] for i in range(0, len(missing), GROUP)]

    def load(group: list[tuple[str, Path, str]]) -> tuple[list[Any], list[Any]]:
        media = [load_medium(kind, path, sampling, processor, where) for kind, path, where in group]
        turns = [
            [{"role": "user", "content": [{"type": kind, kind: medium}]}]
            for (kind, _, _), medium in zip(group, media, strict=True)
        ]
        return media, processor(turns)["pixel_values"]

    with ThreadPoolExecutor(1) as pool:  # loads the next group while this one is encoded
        ahead = pool.submit(load, groups[0]) if groups else None
        for number, group in enumerate(track(groups, "encoding videos and images"), start=1):
            assert ahead is not None
            media, pixel_values = ahead.result()
            ahead = pool.submit(load, groups[number]) if number < len(groups) else None
            videos = [m if isinstance(m, VideoClips) else None for m in media]
            features = encode(pixel_values).split([len(v.times_s) if v else 1 for v in videos])
            for (_, path, _), clips, of_one in zip(group, videos, features, strict=True):
                cache.save(path, of_one, clips)
    return len(missing)


def _missing_media(
    cache: FeatureCache, records: Iterable[Record]
) -> Iterator[tuple[str, Path, str]]:
    seen = set()
    for record in records:
        for kind, path in record.media:
            if path in seen:
                continue
            seen.add(path)
            if not path.is_file():
                raise MediaError(f"{record.where}: {kind} {path} cannot be read: no such file")
            if path not in cache:
                yield kind, path, record.where
