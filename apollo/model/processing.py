"""From messages to tensors: the prompt, the placeholders of each clip, the frames, and what is to
be learnt.

The processor is the one place that knows how a conversation becomes text. Its chat template writes
one marker for each medium; the marker is then replaced by the medium's clips, each as N
placeholders in the chosen one of four formats (paper Table 2). Media must be loaded already: this
module opens no files and imports nothing else of apollo. Read next: `image_processing.py` for the
frames, `modeling.py` for what happens at the placeholders, `video_processing.py` for engines, which
bring frames in place of clips.

Shapes: B conversations, L length of the text, C clips in the batch, T frames, S frame size of an
encoder.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .configuration import TOKEN_INTEGRATIONS, ApolloConfig
from .encoders import preprocessing as encoder_preprocessing
from .image_processing import Preprocessing, channels_first
from .video_processing import ApolloImageProcessor, ApolloVideoProcessor, FrameClips

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_token|>", "<|video_token|>"
IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
VIDEO_START, VIDEO_END = "<|video_start|>", "<|video_end|>"
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"

SPECIAL_TOKENS = (
    *(IMAGE_TOKEN, VIDEO_TOKEN, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END),
    *(START_OF_TURN, END_OF_TURN),
)
"""What the prompt is made of, by the names of the released `constants.py` and Qwen2.5's ChatML."""

CHAT_TEMPLATE = """\
{%- macro body(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == "text" -%}
        {{- part.text -}}
      {%- else -%}
        {{- "<|" + part.type + "_token|>" + ("" if loop.last else "\\n") -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- "<|im_start|>" + message.role + "\\n" -}}
  {%- if message.role == "assistant" -%}
    {%- generation -%}{{- body(message) + "<|im_end|>" -}}{%- endgeneration -%}
  {%- else -%}
    {{- body(message) + "<|im_end|>" -}}
  {%- endif -%}
  {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""ChatML as Qwen2.5 writes it, without a system message of its own. A line break follows a medium
that something follows. The generation block marks what the model is trained on: the assistant's
words and its end of turn.
"""

RELEASED_CHAT_TEMPLATE = """\
{%- if messages[0].role != "system" -%}
  {{- "<|im_start|>system\\n\\nYou are a helpful vision-language assistant.<|im_end|>\\n" -}}
{%- endif -%}
""" + CHAT_TEMPLATE.replace('else "\\n")', 'else "\\n\\n")').replace(
    'message.role + "\\n"', 'message.role + ("\\n\\n" if message.role == "system" else "\\n")'
)
"""As the released code writes it (facts, 2.6): a system message, which two line breaks open, and
two line breaks after a medium.
"""

CHAT_TEMPLATES = {"paper": CHAT_TEMPLATE, "released": RELEASED_CHAT_TEMPLATE}
"""Format of the prompt -> its chat template. The format also says how the clips of a video are
announced: one by one in one of four ways (paper, Table 2), or as the released code does (facts,
2.4)."""

Message = dict[str, Any]
Medium = tuple[str, Any]  # ("image" or "video", what the message holds)


class ApolloProcessor(ProcessorMixin):
    """Makes the batches of an Apollo model.

    The call takes conversations: `processor(messages, ...)`. `apply_chat_template(messages,
        tokenize=True,
    return_dict=True)` is the same call under transformers' name, and `processor(text=...,
    images=..., videos=...)` the same for text that a chat template has rendered already, one marker
    for each medium. Engines (docs/engines.md) make that last call with frames for videos, and read
    what begins with `image_`, `video_` and `replace_`.

    Args:
        tokenizer: The LLM's tokenizer with the `SPECIAL_TOKENS`, see `new_special_tokens`.
        preprocessing: For each encoder the fields of its `Preprocessing`.
        frames_per_clip: Frames T of a clip.
        clip_duration_s: Seconds that a clip covers; for whoever samples the video.
        tokens_per_clip: Placeholders N for each clip.
        max_clips: The most clips a video should be sampled to; for whoever samples it. 84 is the
            released setting: 65 % of a window of 16,384 tokens at 128 tokens a clip.
        token_integration: One of `TOKEN_INTEGRATIONS`; of no effect in the released format.
        prompt_format: A key of `CHAT_TEMPLATES`: "paper", or "released" for the released weights.
        sampling: How a video should be sampled, "fps" or "released"; for whoever samples it.
        decoder_scaling: Let the decoder of a video scale its frames where an encoder's own filter
            is slow (`Preprocessing.faster`): quicker, and a little different from its training.
        chat_template: Jinja template; that of the prompt's format by default.

    Raises:
        ValueError: If the tokenizer lacks a token or a format is unknown.
    """

    model_input_names = ["input_ids", "attention_mask", "pixel_values"]
    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        preprocessing: list[dict[str, Any]],
        frames_per_clip: int = 4,
        clip_duration_s: float = 2.0,
        tokens_per_clip: int = 128,
        max_clips: int = 84,
        token_integration: str = "timestamps",
        prompt_format: str = "paper",
        sampling: str = "fps",
        decoder_scaling: bool = False,
        chat_template: str | None = None,
    ) -> None:
        if prompt_format not in CHAT_TEMPLATES:
            raise ValueError(
                f"unknown prompt_format {prompt_format!r}; choose from {', '.join(CHAT_TEMPLATES)}"
            )
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATES[prompt_format])
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing)}; call new_special_tokens(tokenizer)"
            )
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token")
        if token_integration not in TOKEN_INTEGRATIONS:
            raise ValueError(
                f"unknown token_integration {token_integration!r}; "
                f"choose from {', '.join(TOKEN_INTEGRATIONS)}"
            )
        self.image_token_id, self.video_token_id = vocabulary[IMAGE_TOKEN], vocabulary[VIDEO_TOKEN]
        self.preprocessing = preprocessing
        self.frames_per_clip = frames_per_clip
        self.clip_duration_s = clip_duration_s
        self.tokens_per_clip = tokens_per_clip
        self.max_clips = max_clips
        self.token_integration = token_integration
        self.prompt_format = prompt_format
        self.sampling = sampling
        self.decoder_scaling = decoder_scaling
        self._preprocessing = [Preprocessing(**fields) for fields in preprocessing]
        if decoder_scaling:
            self._preprocessing = [square.faster() for square in self._preprocessing]

    @property
    def squares(self) -> list[Preprocessing]:
        """For each encoder its `Preprocessing`; whoever loads a video makes these of its frames."""
        return self._preprocessing

    @property
    def image_processor(self) -> ApolloImageProcessor:
        """The image half, as engines ask for it."""
        return ApolloImageProcessor(self)

    @property
    def video_processor(self) -> ApolloVideoProcessor:
        """The video half, as engines ask for it."""
        return ApolloVideoProcessor(self)

    @classmethod
    def from_config(
        cls,
        config: ApolloConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_clips: int = 84,
        prompt_format: str = "paper",
        sampling: str = "fps",
        chat_template: str | None = None,
    ) -> "ApolloProcessor":
        """Make the processor that belongs to a model of this configuration."""
        return cls(
            tokenizer,
            preprocessing=[asdict(encoder_preprocessing(encoder)) for encoder in config.encoders],
            frames_per_clip=config.frames_per_clip,
            clip_duration_s=config.clip_duration_s,
            tokens_per_clip=config.tokens_per_clip,
            max_clips=max_clips,
            token_integration=config.token_integration,
            prompt_format=prompt_format,
            sampling=sampling,
            chat_template=chat_template,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved processor; a released checkpoint is converted first, see `converted`."""
        from .conversion import converted  # which builds on this module

        path = converted(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(path, *args, **kwargs)

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        with_labels: bool = False,
        add_generation_prompt: bool = False,
        with_pixels: bool = True,
        *,
        text: str | list[str] | None = None,
        images: Any = None,
        videos: Any = None,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        return_text_replacement_offsets: bool = False,
        padding_side: str | None = None,
        padding: bool = True,
        truncation: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make a batch.

        Args:
            messages: Conversations, or one of them. A video part holds loaded clips (`frames` uint8
                (C, T, H, W, 3), `spans_s` (C, 2)), an image part a PIL image or a uint8 array (H,
                W, 3).
            with_labels: Add `labels`: the assistant's words and end of turn, -100 elsewhere.
            add_generation_prompt: End with the start of an assistant's turn.
            with_pixels: Add `pixel_values`; without them for a model that is given `clip_features`.
            text: Instead of messages: text rendered by the chat template.
            images: The images of `text`, in the order of their markers.
            videos: The videos of `text`, in the order of their markers: loaded clips or, as engines
                have them, frames, uint8 (F, H, W, 3), or addresses (`ApolloVideoProcessor`).
            video_metadata: Of videos given as frames, what `cut_clips` needs.
            do_sample_frames: Whether the frames are all of the file's, as engines say it; of no
                effect, for `frames_indices` say it too.
            return_text_replacement_offsets: Add `text_replacement_offsets`: for each row what
                replaced its markers, see transformers' `get_text_with_replacements`.
            padding_side: "left" or "right"; by default left with `add_generation_prompt` and for
                `text`, because what is generated must follow the text directly, and right
                otherwise.
            padding: Always true: a batch is padded to its longest conversation.
            truncation: Always false: to cut a prompt would cut its clips.
            return_tensors: Always "pt".

        Returns:
            `input_ids` and `attention_mask` (B, L), `labels` (B, L) if asked for, and
            `pixel_values`, for each encoder the clips of the batch, uint8 (C, T, 3, S, S), in the
            order of their placeholders; C may be 0. The model normalises them. Of `text` without
            loaded clips the pixels come as engines move them: `pixel_values` for images,
            `pixel_values_videos` and `video_grid_thw` for videos (`video_processing.pack`).

        Raises:
            ValueError: If a message, a medium or the combination of options makes no sense.
        """
        if return_tensors != "pt" or not padding or truncation:
            raise ValueError(
                "only uncut, padded batches of torch tensors are made: leave padding=True, "
                "truncation=False, 'pt'"
            )
        if (messages is None) == (text is None):
            raise ValueError("give either messages or text")
        if with_labels and (add_generation_prompt or text is not None):
            raise ValueError("with_labels needs messages without add_generation_prompt")
        if messages is not None:
            if images is not None or videos is not None:
                raise ValueError("with messages, put images and videos into the messages")
            prompts, spans, media = self._render(messages, add_generation_prompt)
        else:
            prompts = [text] if isinstance(text, str) else list(text or [])
            images, videos = _flatten(images), _flatten(videos)
            if not any(hasattr(video, "spans_s") for video in videos):
                batch, pixels = self._for_engine(
                    prompts,
                    images,
                    videos,
                    video_metadata,
                    return_text_replacement_offsets,
                    padding_side or "left",
                )
                return BatchFeature(batch | pixels if with_pixels else batch)
            spans = [[] for _ in prompts]
            media = _media_of_text(prompts, images, videos)
        if video_metadata is not None or return_text_replacement_offsets:
            raise ValueError(
                "video_metadata and return_text_replacement_offsets go with text whose videos are "
                "frames, not with loaded clips"
            )
        for_generation = add_generation_prompt or text is not None
        batch = self._tokenize(
            prompts, spans, media, padding_side or ("right", "left")[for_generation]
        )
        labels = batch.pop("labels")
        if with_labels:
            if (empty := (labels != -100).sum(1) == 0).any():
                row = int(empty.nonzero()[0])
                raise ValueError(f"conversation {row} has no assistant message to learn from")
            batch["labels"] = labels
        if with_pixels:
            batch["pixel_values"] = self.pixels([medium for row in media for medium in row])
        return BatchFeature(batch)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render messages, and with `tokenize` make the batch of them.

        Args:
            conversation: One conversation or several.
            chat_template: Another template than the processor's; only without `tokenize`.
            tokenize: Return a batch rather than text.
            return_dict: With `tokenize`, return the whole batch rather than its `input_ids`.
            add_generation_prompt: End with the start of an assistant's turn.
            continue_final_message: Leave the last message open; only without `tokenize`.
            processor_kwargs: With `tokenize`, other options of `__call__`.
            kwargs: The same (with `tokenize`), or other options of transformers'
                `apply_chat_template`.

        Returns:
            Text with one marker for each medium, or a batch.
        """
        if not tokenize:
            single, conversations = _conversations(conversation)
            stripped = [_read_conversation(messages)[0] for messages in conversations]
            return super().apply_chat_template(
                stripped[0] if single else stripped,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        if chat_template is not None or continue_final_message:
            raise ValueError(
                "chat_template and continue_final_message work without tokenize; "
                "hand the text to the processor as text="
            )
        kwargs |= {"add_generation_prompt": add_generation_prompt, **(processor_kwargs or {})}
        batch = self(conversation, **kwargs)
        return batch if return_dict else batch["input_ids"]

    def _render(
        self, messages: Any, add_generation_prompt: bool
    ) -> tuple[list[str], list[list[tuple[int, int]]], list[list[Medium]]]:
        """Return for each conversation its text, the character spans to learn, and its media."""
        _, conversations = _conversations(messages)
        read = [_read_conversation(conversation) for conversation in conversations]
        for kind, source in (medium for _, media in read for medium in media):
            _check_medium(kind, source)
        rendered: Any = render_jinja_template(
            conversations=[stripped for stripped, _ in read],
            chat_template=self.chat_template,  # type: ignore[arg-type]
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
        )
        return *rendered, [media for _, media in read]

    def _tokenize(
        self,
        prompts: list[str],
        spans: list[list[tuple[int, int]]],
        media: list[list[Medium]],
        padding_side: str,
    ) -> dict[str, Any]:
        """Expand the markers, tokenise and pad."""
        pieces = [self._pieces(*row) for row in zip(prompts, spans, media, strict=True)]
        texts = [text for row in pieces for text, _ in row]
        ids_of_texts = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for row in pieces:
            rows.append([])
            labels.append([])
            for (_, is_learnt), ids in zip(row, ids_of_texts, strict=False):
                rows[-1] += ids
                labels[-1] += ids if is_learnt else [-100] * len(ids)
        return {
            "input_ids": _pad(rows, self.tokenizer.pad_token_id, padding_side),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, padding_side),
            "labels": _pad(labels, -100, padding_side),
        }

    def _pieces(
        self, prompt: str, spans: list[tuple[int, int]], media: list[Medium]
    ) -> list[tuple[str, bool]]:
        """Expand a prompt's markers and cut it at its spans: texts, and whether each is learnt.

        Pieces are tokenised apart, so that a prompt has the same ids whether its answer follows in
        training or is still to be generated.
        """
        expansions = iter([self._placeholders(medium) for medium in media])
        pieces, end = [], 0
        for start, stop in [*spans, (len(prompt), len(prompt))]:
            outside = MARKER.sub(lambda _: next(expansions), prompt[end:start])
            pieces += [(outside, False), (prompt[start:stop], True)]
            end = stop
        return pieces

    def _for_engine(
        self,
        prompts: list[str],
        images: list[Any],
        videos: list[Any],
        video_metadata: Any,
        with_offsets: bool,
        padding_side: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make the batch of rendered text whose videos are not loaded yet, and its pixels."""
        features = self.video_processor(videos, video_metadata) if videos else {}
        media = _media_of_text(prompts, images, features.get("clips", []))
        if images:
            features |= self.image_processor(images)
        batch = self._tokenize(prompts, [[] for _ in prompts], media, padding_side)
        del batch["labels"]
        if with_offsets:
            batch["text_replacement_offsets"] = self.get_text_with_replacements(
                list(prompts),
                [self.replace_image_token(features, index) for index in range(len(images))],
                [self.replace_video_token(features, index) for index in range(len(videos))],
            )[1]
        features.pop("clips", None)
        return batch, features

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for an image."""
        return self._placeholders(("image", None))

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for one of the videos that `video_processor` has cut."""
        return self._placeholders(("video", video_inputs["clips"][video_idx]))

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Tell an engine how many tokens media take, so that it can plan its memory.

        Args:
            image_sizes: Height and width of each image; they do not matter.
            video_sizes: Of each video the number of frames, at `video_processor.fps`, its height
                and width.
            kwargs: Options of an engine's processor, of which Apollo has none.

        Raises:
            ValueError: An engine could not tell the clips' tokens from the text around them.
        """
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.tokens_per_clip] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None:
            self._check_commonest_token()
            num_clips = [-(-num_frames // self.frames_per_clip) for num_frames, *_ in video_sizes]
            counts["num_video_tokens"] = [
                min(num, self.max_clips) * self.tokens_per_clip for num in num_clips
            ]
        return MultiModalData(**counts)

    def _check_commonest_token(self) -> None:
        """vLLM takes the commonest token of what replaces a video for the place of its features."""
        spans_s = np.array([[0.0, self.clip_duration_s]])
        clip = FrameClips((np.empty((1, 0)),), spans_s, self.clip_duration_s)
        text = self._placeholders(("video", clip))
        counts = Counter(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        del counts[self.video_token_id]
        for token, count in counts.most_common(1):
            if count >= self.tokens_per_clip:
                raise ValueError(
                    f"tokens_per_clip {self.tokens_per_clip} is too few for vLLM: it takes the "
                    "commonest token of a clip's text for the place of its features, and "
                    f"{self.tokenizer.decode([token])!r} is there {count} times; use `apollo serve`"
                )

    def _placeholders(self, medium: Medium) -> str:
        """Return the text that stands for a medium (paper Table 2). Images have no times."""
        kind, source = medium
        marked = self.token_integration in ("start_end", "timestamps_start_end")
        timed = self.token_integration in ("timestamps", "timestamps_start_end")
        if self.prompt_format == "released":
            clip = (IMAGE_TOKEN if kind == "image" else VIDEO_TOKEN) * self.tokens_per_clip
            return clip if kind == "image" else self._released_clips(source, clip)
        if kind == "image":
            clip = IMAGE_TOKEN * self.tokens_per_clip
            return f"{IMAGE_START}{clip}{IMAGE_END}" if marked else clip
        clip = VIDEO_TOKEN * self.tokens_per_clip
        clip = f"{VIDEO_START}{clip}{VIDEO_END}" if marked else clip
        if not timed:
            return clip * len(source.frames)
        # The paper gives the format of one clip and not what parts it from the next; a line break
        # is our choice.
        return "\n".join(f"clip from {mmss(s)}-{mmss(e)}:{clip}" for s, e in source.spans_s)

    def _released_clips(self, source: Any, clip: str) -> str:
        """Announce the clips of a video as the released code does, letter by letter."""
        from num2words import num2words

        clips = ",\n".join(f"{s:.1f}-{e:.1f} seconds: {clip}" for s, e in source.spans_s)
        number = num2words(len(source.spans_s))
        return (
            f"You are provided the following series of {number}, {self.clip_duration_s:g} second "
            f"clips from a {timedelta(seconds=source.duration_s)} [H:MM:SS] video.\n{clips}"
        )

    def pixels(self, media: Sequence[Medium]) -> list[torch.Tensor]:
        """Return for each encoder the clips of all media, (C, T, 3, S, S)."""
        return [self._encoder_pixels(index, media) for index in range(len(self.squares))]

    def _encoder_pixels(self, index: int, media: Sequence[Medium]) -> torch.Tensor:
        prepare = self.squares[index]
        shape = (self.frames_per_clip, 3, prepare.image_size, prepare.image_size)
        clips = [
            channels_first(self._squares(kind, source, index)).expand(-1, *shape)
            for kind, source in media
        ]
        if len(clips) == 1:  # a long video is not copied
            return clips[0]
        return torch.cat(clips or [torch.zeros(0, *shape, dtype=torch.uint8)])

    def _squares(self, kind: str, source: Any, index: int) -> np.ndarray:
        """Return an encoder's view of a medium, uint8 (C, T or 1, S, S, 3): one frame is repeated
        once it is small.
        """
        prepare = self.squares[index]
        if kind == "image":
            if isinstance(source, Image.Image):
                source = np.asarray(source.convert("RGB"))
            return prepare.square(source)[None, None]
        ready = getattr(source, "squares", ())
        frames = np.asarray(ready[index] if ready else source.frames)
        if frames.shape[1] not in (1, self.frames_per_clip):
            raise ValueError(
                f"a clip must have {self.frames_per_clip} frames, got {frames.shape[1]}; "
                "sample the video with the processor's frames_per_clip"
            )
        size = prepare.image_size
        if not ready:
            squares = [prepare.square(frame) for clip in frames for frame in clip]
            return np.stack(squares).reshape(*frames.shape[:2], size, size, 3)
        if len(ready) != len(self.squares) or frames.shape[2:] != (size, size, 3):
            raise ValueError(
                f"the video's squares {[array.shape for array in ready]} were made for another "
                "model; load it with squares=processor.squares"
            )
        return frames


MARKER = re.compile("|".join(re.escape(token) for token in (IMAGE_TOKEN, VIDEO_TOKEN)))


def new_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add to a tokenizer, in place, those `SPECIAL_TOKENS` it lacks.

    Returns:
        How many were added; the LLM's embeddings need as many more rows (`from_parts` sees to it).
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    return tokenizer.add_tokens(missing, special_tokens=True) if missing else 0


def mmss(seconds: float) -> str:
    """Return a time as MM:SS, rounded to the nearest second; minutes go on past 99."""
    whole = int(seconds + 0.5)
    return f"{whole // 60:02d}:{whole % 60:02d}"


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    length = max(len(row) for row in rows)
    out = torch.full((len(rows), length), value, dtype=torch.long)
    for padded, row in zip(out, rows, strict=True):
        start = length - len(row) if side == "left" else 0
        padded[start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return out


def _conversations(messages: Any) -> tuple[bool, list[list[Message]]]:
    """Return whether these are the messages of one conversation, and a list of conversations."""
    if not messages:
        raise ValueError("no messages were given")
    single = isinstance(messages[0], dict)
    return single, [messages] if single else list(messages)


def _read_conversation(conversation: Sequence[Message]) -> tuple[list[Message], list[Medium]]:
    """Check a conversation and part text from media, so that templates never copy frames."""
    if not conversation:
        raise ValueError("a conversation has no messages")
    stripped, media = [], []
    for message in conversation:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"role must be system, user or assistant, got {role!r}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list | tuple):
            raise ValueError(
                f"content must be text or a list of parts, got {type(content).__name__}"
            )
        parts = []
        for part in content:
            kind = part.get("type")
            if kind not in ("text", "image", "video"):
                raise ValueError(f"a part's type must be text, image or video, got {kind!r}")
            if kind == "text":
                parts.append({"type": "text", "text": _check_text(part.get("text"))})
            elif role != "user":
                raise ValueError(f"only the user's messages may hold media, found {kind} of {role}")
            else:
                parts.append({"type": kind})
                media.append((kind, part.get(kind)))
        stripped.append({"role": role, "content": parts})
    return stripped, media


def _check_text(text: Any) -> str:
    """Refuse text that would be read as structure: a forged turn, or a stray placeholder."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {type(text).__name__}")
    if found := [token for token in SPECIAL_TOKENS if token in text]:
        raise ValueError(f"the text holds the reserved token {found[0]}; remove it")
    return text


def _check_medium(kind: str, source: Any) -> None:
    if kind == "video":
        frames, spans_s = getattr(source, "frames", None), getattr(source, "spans_s", None)
        if frames is None or spans_s is None:
            raise ValueError(
                "a video must be loaded clips with frames and spans_s, got "
                f"{type(source).__name__}; load it with apollo.video.load_clips"
            )
        shape = np.shape(frames)
        if len(shape) != 5 or 0 in shape or np.shape(spans_s) != (shape[0], 2):
            raise ValueError(
                "a video's frames must be (clips, frames, height, width, 3), with one span for "
                f"each clip; got {shape} and spans {np.shape(spans_s)}"
            )
    elif not isinstance(source, Image.Image) and np.ndim(source) != 3:
        raise ValueError(
            "an image must be a PIL image or a uint8 array (height, width, 3), got "
            f"{type(source).__name__} of shape {np.shape(source)}"
        )


def _media_of_text(prompts: list[str], images: Any, videos: Any) -> list[list[Medium]]:
    """Hand out the media of rendered text to its markers, in order."""
    waiting = {"image": _flatten(images), "video": _flatten(videos)}
    media: list[list[Medium]] = []
    for kind, token in (("image", IMAGE_TOKEN), ("video", VIDEO_TOKEN)):
        num_markers = sum(prompt.count(token) for prompt in prompts)
        if num_markers != len(waiting[kind]):
            raise ValueError(
                f"the text has {num_markers} {token}, but {len(waiting[kind])} {kind}s were given"
            )
        for source in waiting[kind]:
            _check_medium(kind, source)
    for prompt in prompts:
        kinds = ["image" if token == IMAGE_TOKEN else "video" for token in MARKER.findall(prompt)]
        media.append([(kind, waiting[kind].pop(0)) for kind in kinds])
    return media


def _flatten(media: Any) -> list[Any]:
    if media is None:
        return []
    if isinstance(media, list | tuple):
        return [source for item in media for source in _flatten(item)]
    return [media]
