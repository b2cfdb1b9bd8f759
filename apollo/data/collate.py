"""From positions of a mixture to batches: load the media, let the processor make tensors.

`BatchMaker` is what the training loop calls: batch number in, batch out, nothing remembered between
calls that could change a batch, so that the loop can start anywhere and workers can load ahead. The
processor is passed in; this module knows neither the model nor, until it is called, torch. Read
next: `packing.py`, then `features.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from apollo.data.features import BrokenFeaturesError, FeatureCache
from apollo.data.formats import Record
from apollo.data.mixture import Mixture
from apollo.data.packing import deal, pack
from apollo.data.stores import Medium, exists, fetch
from apollo.media import load_image
from apollo.messages import map_media
from apollo.video import ClipSampling, VideoClips, VideoError, load_clips, open_video, sample

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LoadVideo = Callable[..., VideoClips]
GROUP = 8
"""Videos and images that are encoded together when a cache is filled."""


class MediaError(ValueError):
    """A video or image of a record cannot be used; the message names record and file."""


class BatchMaker:
    """Makes batch number i of a stage.

    The records of a step are what the mixture says, however many batches it is made of. They are
    dealt to these by length: padded batches get records of like length, packed ones get equally
    many tokens.

    Args:
        sources: The records of each source of the mixture.
        mixture: Who comes at which position.
        processor: `processor(conversations, with_labels=True)` makes the tensors; its `squares` say
            what its encoders see of a frame.
        batch_size: Records in a batch (packed: on average); step i holds the positions from i *
            batch_size * batches_per_step on.
        sampling: How clips are chosen from a video.
        max_tokens: Longest conversation that the LLM can read.
        cache: Features of every video and image of the mixture (see `fill_cache`); the batches then
            hold `clip_features` instead of `pixel_values`.
        batches_per_step: Batches that make up one optimiser step, over accumulation and processes.
        packed: Put the records of a batch into one row with `segment_ids`, without padding (see
            `packing.py`), instead of one padded row for each.
        load_video: What opens a video: `load_clips`, or `GuardedLoader.load`, which takes the same
            arguments and cannot hang.
        tokens_per_row: Most tokens of a packed row. A batch is then a list of rows, as many as the
            longest batch of its step needs, so that all processes take equally many.
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
        packed: bool = False,
        load_video: LoadVideo = load_clips,
        tokens_per_row: int | None = None,
    ) -> None:
        self.sources = sources
        self.mixture = mixture
        self.processor = processor
        self.batch_size = batch_size
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.cache = cache
        self.batches_per_step = batches_per_step
        self.packed = packed
        self.load_video = load_video
        self.tokens_per_row = tokens_per_row
        self._dealt: tuple[int, list[list[Record]]] = (-1, [])  # the last step: it has more batches

    def records(self, number: int) -> list[Record]:
        """Give the records of a batch."""
        return [record for row in self._rows(number) for record in row]

    def _rows(self, number: int) -> list[list[Record]]:
        """Give the records of each row of a packed batch; those of a padded one are together."""
        step, place = divmod(number, self.batches_per_step)
        if self._dealt[0] != step:
            self._dealt = (step, self._deal(step))
        return self._dealt[1][place :: self.batches_per_step]

    def _deal(self, step: int) -> list[list[Record]]:
        size = self.batch_size * self.batches_per_step
        places = [self.mixture[i] for i in range(step * size, (step + 1) * size)]
        records = [self.sources[source][place] for source, place in places]
        if self.batches_per_step == 1 and self.tokens_per_row is None:
            return [records]
        lengths = [self.num_tokens(record) for record in records]
        if self.tokens_per_row is not None:
            batches = self._deal_rows(records, lengths, self.tokens_per_row)
        elif self.packed:
            batches = deal(lengths, self.batches_per_step)
        else:
            order = sorted(range(size), key=lengths.__getitem__)
            batches = [order[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        return [[records[i] for i in batch] for batch in batches]

    def _deal_rows(
        self, records: Sequence[Record], lengths: Sequence[int], most: int
    ) -> list[list[int]]:
        """Deal the records of a step to as few rows as none is too long of, equally many a batch.

        Raises:
            ValueError: One record alone is too long.
        """
        for rows_per_batch in range(1, self.batch_size + 1):
            rows = deal(lengths, self.batches_per_step * rows_per_batch)
            if max(sum(lengths[i] for i in row) for row in rows) <= most:
                return rows
        length, record = max(zip(lengths, records, strict=True), key=lambda pair: pair[0])
        raise ValueError(
            f"{record.where}: record {record.id!r} has {length} tokens, tokens_per_row allows "
            f"{most}; raise it, lower max_clips, or shorten the record"
        )

    def num_tokens(self, record: Record) -> int:
        """Count the tokens of a record without decoding its media; headers tell how many clips."""
        sketch = map_media(
            record.messages, lambda kind, medium: sketch_medium(kind, medium, self.sampling)
        )
        return self.processor([sketch], with_pixels=False)["input_ids"].shape[1]

    def __call__(self, number: int) -> dict[str, Any] | list[dict[str, Any]]:
        """Make a batch: `input_ids`, `attention_mask`, `labels` (B, L) and its clips, if any.

        A packed batch is one row, B = 1, and has `segment_ids` too; with `tokens_per_row` it is a
        list of such rows.

        Raises:
            MediaError: A video or image cannot be read.
            ValueError: A conversation is longer than the LLM can read, or than a row may be.
        """
        rows = [self._batch(records, number) for records in self._rows(number)]
        return rows[0] if self.tokens_per_row is None else rows

    def _batch(self, records: Sequence[Record], number: int) -> dict[str, Any]:
        """Make the padded batch, or the packed row, of these records."""
        try:
            batch = self._make(records, number, self.cache)
        except BrokenFeaturesError as error:
            logger.warning("%s; this batch is made from its videos and images instead", error)
            batch = self._make(records, number, None)
        self._check_length(records, batch)
        if not self.packed:
            return batch
        clips = {name: batch.pop(name) for name in CLIP_INPUTS if name in batch}
        return pack(batch, self.processor.tokenizer.pad_token_id) | clips

    def _make(
        self, records: Sequence[Record], number: int, cache: FeatureCache | None
    ) -> dict[str, Any]:
        """Make the padded batch of these records, from the cache if there is one."""
        features: list[torch.Tensor] = []

        def load(kind: str, medium: Medium, where: str) -> VideoClips | Image.Image:
            if cache is None:
                return load_medium(
                    kind, medium, self.sampling, self.processor, where, self.load_video
                )
            cached = cache.load(medium)
            features.append(cached.features)
            return Image.new("RGB", (1, 1)) if cached.clips is None else cached.clips

        conversations = [
            map_media(
                record.messages,
                lambda kind, medium, where=record.where: load(kind, medium, where),  # type: ignore[misc]
            )
            for record in records
        ]
        try:
            batch = dict(self.processor(conversations, with_labels=True, with_pixels=cache is None))
        except ValueError as error:
            names = ", ".join(record.where for record in records)
            raise ValueError(f"batch {number} of the records {names}: {error}") from error
        if features:
            import torch

            batch["clip_features"] = torch.cat(features)
        return batch

    def _check_length(self, records: Sequence[Record], batch: dict[str, Any]) -> None:
        lengths = batch["attention_mask"].sum(1).tolist()
        length, record = max(zip(lengths, records, strict=True), key=lambda pair: pair[0])
        if length > self.max_tokens:
            raise ValueError(
                f"{record.where}: record {record.id!r} has {length} tokens, the LLM reads "
                f"{self.max_tokens}; lower max_clips or tokens_per_clip, or shorten the record"
            )


CLIP_INPUTS = ("pixel_values", "clip_features")


@lru_cache(maxsize=100_000)
def _probe(medium: Medium) -> tuple[float, float] | None:
    """Read a video's duration in seconds and frame rate; None if it cannot be read."""
    try:
        with open_video(fetch(medium), num_threads=1) as video:
            return video.info.duration_s, video.info.source_fps
    except (VideoError, ValueError, OSError):
        return None


def sketch_medium(kind: str, medium: Medium, sampling: ClipSampling) -> VideoClips | Image.Image:
    """Make a stand-in that the prompt describes as it does the medium; its frames are one pixel.

    A video that cannot be read counts as a short one: the error is for those who load it.
    """
    if kind == "image":
        return Image.new("RGB", (1, 1))
    duration_s, source_fps = _probe(medium) or (1.0, 1.0)
    times_s, spans_s = sample(duration_s, sampling, source_fps)
    frames = np.zeros((*times_s.shape, 1, 1, 3), dtype=np.uint8)
    return VideoClips(frames, times_s, spans_s, duration_s, source_fps, sampled_fps=0.0)


def load_medium(
    kind: str,
    medium: Medium,
    sampling: ClipSampling,
    processor: Any,
    where: str,
    load_video: LoadVideo = load_clips,
) -> VideoClips | Image.Image:
    """Load a video's clips or an image; a bad file is an error, never another file instead.

    Args:
        kind: "video" or "image".
        medium: Where it lies.
        sampling: How clips are chosen from a video.
        processor: Its `squares` say what the encoders see of a video's frames.
        where: Whose medium it is, for the message.
        load_video: See `BatchMaker`.

    Raises:
        MediaError: The file cannot be read.
    """
    try:
        source = fetch(medium)
        if kind == "video":
            return load_video(source, sampling, squares=processor.squares, num_threads=1)
        return load_image(source)
    except (ValueError, OSError) as error:
        raise MediaError(f"{where}: {kind} {medium} cannot be read: {error}") from error


def fill_cache(
    cache: FeatureCache,
    records: Iterable[Record],
    sampling: ClipSampling,
    processor: Any,
    encode: Callable[[list[Any]], torch.Tensor],
    track: Callable[[list[Any], str], Iterable[Any]] = lambda items, _: items,
    load_video: LoadVideo = load_clips,
) -> int:
    """Encode every video and image of the records that the cache does not hold yet.

    Another process may fill the same cache meanwhile: what it wrote is not encoded again.

    Args:
        cache: What to fill.
        records: Whose media.
        sampling: How clips are chosen from a video; the cache's settings must depend on it.
        processor: Makes `pixel_values`; its `squares` say what the encoders see of a frame.
        encode: The model's encoders: pixel values to features (C, T, H, W, D), without gradients.
        track: Shows progress: called with the groups of missing media and a description.
        load_video: See `BatchMaker`.

    Returns:
        How many files were encoded.

    Raises:
        MediaError: A video or image cannot be read.
        CacheError: The cache cannot be written; what was encoded stays.
    """
    missing = list(_missing_media(cache, records))
    groups = [missing[i : i + GROUP] for i in range(0, len(missing), GROUP)]
    num_encoded = 0

    def load(group: list[_Use]) -> tuple[list[Medium], list[Any], list[Any]]:
        group = [use for use in group if use[1] not in cache]
        media = [
            load_medium(kind, m, sampling, processor, where, load_video) for kind, m, where in group
        ]
        turns = [
            [{"role": "user", "content": [{"type": kind, kind: medium}]}]
            for (kind, _, _), medium in zip(group, media, strict=True)
        ]
        pixels = processor(turns)["pixel_values"] if turns else []
        return [medium for _, medium, _ in group], media, pixels

    with ThreadPoolExecutor(1) as pool:  # loads the next group while this one is encoded
        ahead = pool.submit(load, groups[0]) if groups else None
        for number, _ in enumerate(track(groups, "encoding videos and images"), start=1):
            assert ahead is not None
            sources, media, pixel_values = ahead.result()
            ahead = pool.submit(load, groups[number]) if number < len(groups) else None
            if not sources:
                continue
            videos = [m if isinstance(m, VideoClips) else None for m in media]
            features = encode(pixel_values).split([len(v.times_s) if v else 1 for v in videos])
            for source, clips, of_one in zip(sources, videos, features, strict=True):
                cache.save(source, of_one, clips)
            num_encoded += len(sources)
    return num_encoded


_Use = tuple[str, Medium, str]  # kind, medium, whose


def _missing_media(cache: FeatureCache, records: Iterable[Record]) -> Iterator[_Use]:
    seen = set()
    for record in records:
        for kind, medium in record.media:
            if medium in seen:
                continue
            seen.add(medium)
            try:
                if not exists(medium):
                    raise FileNotFoundError("no such file")
                is_there = medium in cache
            except (ValueError, OSError) as error:
                raise MediaError(
                    f"{record.where}: {kind} {medium} cannot be read: {error}"
                ) from error
            if not is_there:
                yield kind, medium, record.where
