"""One model, one video, several turns: `apollo ask`, `apollo chat`, and the loading of models.

A `VideoChat` holds a model and a conversation. It samples the video as the model's processor says,
encodes it once for all turns, and answers freely or by the likelihood of given options. The prompt
is made in apollo/model/processing.py, the clips in apollo/video.
"""

import argparse
import importlib.resources
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apollo.media import load_image, load_video
from apollo.messages import Message, map_media, media_parts, normalize, question_prompt
from apollo.remote import RemoteChat
from apollo.runtime import pick_device
from apollo.video import VideoClips, open_video

if TYPE_CHECKING:
    import torch

    from apollo.model import ApolloForConditionalGeneration, ApolloProcessor

DEFAULT_MODEL = "micro"
MODELS = {
    "micro": "knows only its micro world of moving shapes, signs and maps; 128 x 128 pixels",
}
"""Models that ship with the package, in apollo/assets, and what to expect of them."""


@dataclass(frozen=True)
class Answer:
    """What the model says.

    Attributes:
        text: The answer, or the likeliest option.
        clips: What the model saw of the video; None in a conversation without one.
        option_scores: With options, the log-probability of each.
    """

    text: str
    clips: VideoClips | None
    option_scores: list[float] | None = None


def load_model(
    model: str | Path | None = None,
) -> "tuple[ApolloForConditionalGeneration, ApolloProcessor]":
    """Load a model and its processor onto the fastest device, ready to answer.

    Args:
        model: A key of `MODELS`, a folder, or a hub id; None is the shipped micro model. On a CPU
            the weights are float32, elsewhere as they were saved.

    Raises:
        ValueError: there is no such model, it cannot be loaded, or it is not an Apollo model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from apollo.model import converted

    name = str(model or DEFAULT_MODEL)
    path, device = find_model(name), pick_device()
    try:
        path = converted(path)
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "apollo_vlm":
            raise ValueError(f"its type is {config.model_type}, and only Apollo models can be used")
        processor = AutoProcessor.from_pretrained(path)
        dtype = "float32" if device.type == "cpu" else "auto"
        loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    except (ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"cannot load the model {name!r}: {reason}") from error
    return loaded.to(device).eval(), processor  # type: ignore[arg-type]


def find_model(name: str) -> str:
    """Find the folder of a shipped or local model, or give a hub id as it is.

    Raises:
        ValueError: There is no such model.
    """
    path = Path(name).expanduser()
    if name in MODELS and not path.exists():
        path = Path(str(importlib.resources.files("apollo") / "assets" / name))
        if not path.is_dir():
            raise ValueError(f"the {name} model is missing from this installation; give --model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no model folder: it has no config.json")
        return str(path)
    if path.exists():
        raise ValueError(f"{path} is a file; give the folder of a model")
    # A hub id is owner/name, and so may a mistyped path be: then its parent exists.
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or path.parent.is_dir():
        raise ValueError(
            f"there is no model {name!r}: no such folder, and not one of the shipped models "
            f"({', '.join(MODELS)}) or a hub id (owner/name)"
        )
    return name


@dataclass
class VideoChat:
    """A conversation with a model.

    Attributes:
        model: An Apollo model.
        processor: The processor saved with it.
        messages: The conversation so far, normalized and with its media loaded.
    """

    model: "ApolloForConditionalGeneration"
    processor: "ApolloProcessor"
    messages: list[Message] = field(default_factory=list)
    _encoded: "tuple[list[Any], torch.Tensor] | None" = field(default=None, repr=False)

    @classmethod
    def load(cls, model: str | Path | None = None) -> "VideoChat":
        """Start with the model in a folder or on the hub; see `load_model`."""
        return cls(*load_model(model))

    def ask(
        self,
        video: str | Path | bytes | VideoClips | None,
        question: str,
        options: Sequence[str] = (),
        *,
        sampling: str | None = None,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Ask about a video, which begins a new conversation, or go on with the last one.

        Args:
            video: Path, bytes or loaded clips; None to go on.
            question: What to ask.
            options: Answers to choose from by their likelihood; without them the model writes.
            sampling: How to sample the video, a key of `apollo.video.SAMPLERS`; by default as the
                model was trained.
            max_new_tokens: Most tokens of a written answer.
            on_text: Gets the pieces of a written answer as they come.

        Raises:
            MessageError: an empty question, or options that make no sense.
            VideoError: the video cannot be used.
        """
        content: list[dict[str, Any]] = [
            {"type": "text", "text": question_prompt(question, options)}
        ]
        history = self.messages
        if video is not None:
            clips = self._load_media("video", video, sampling)
            content, history = [{"type": "video", "video": clips}, *content], []
        asked = [*history, {"role": "user", "content": content}]
        scores = self.score_options(asked, options) if options else None
        if scores is None:
            text = self.generate(asked, max_new_tokens, on_text)
        else:
            text = options[max(range(len(options)), key=scores.__getitem__)]
        self.messages = [*asked, _assistant(text)]
        seen = [source for kind, source in media_parts(asked) if kind == "video"]
        return Answer(text, seen[-1] if seen else None, scores)

    def generate(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Write the assistant's next turn, always taking the likeliest token.

        Args:
            messages: A conversation that ends with the user; paths in it are loaded.
            max_new_tokens: Most tokens to write.
            on_text: Gets the pieces of the text as they come.
        """
        import torch

        messages = map_media(normalize(messages), self._load_media)
        batch = self._batch(messages)
        with torch.inference_mode():
            tokens = self.model.generate(  # type: ignore[misc]
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=_streamer(self.processor.tokenizer, on_text) if on_text else None,
            )
        new = tokens[0, batch["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    def score_options(self, messages: Sequence[Message], options: Sequence[str]) -> list[float]:
        """Log-probability of each option as the assistant's next turn, its end included.

        The prompt is read once; each option continues from its cache.

        Args:
            messages: A conversation that ends with the user; paths in it are loaded.
            options: Possible answers.
        """
        from apollo.model.likelihood import Row, log_probabilities, read_prefix
        from apollo.model.processing import END_OF_TURN

        batch = self._batch(map_media(normalize(messages), self._load_media))
        *shared, last = batch["input_ids"][0].tolist()
        prefix = read_prefix(self.model, shared, batch.get("clip_features"))
        texts = [option + END_OF_TURN for option in options]
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return log_probabilities(self.model, prefix, [Row([last], ids)], batch_size=1)[0]

    def _batch(self, messages: list[Message]) -> dict[str, Any]:
        """Inputs for the answer to `messages`; their media are encoded once, not each turn."""
        import torch

        batch = dict(self.processor(messages, add_generation_prompt=True))
        pixels = batch.pop("pixel_values")
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        media = [source for _, source in media_parts(messages)]
        if media:
            if self._encoded is None or list(map(id, media)) != list(map(id, self._encoded[0])):
                with torch.inference_mode():
                    features = self.model.encode([x.to(self.model.device) for x in pixels])
                self._encoded = (media, features)
            batch["clip_features"] = self._encoded[1]
        return batch

    def _load_media(self, kind: str, source: Any, sampling: str | None = None) -> Any:
        """Load what is still a path or bytes: clips of a video, or an image."""
        if not isinstance(source, (str, Path, bytes)):
            return source
        if kind == "video":
            return load_video(source, self.processor, sampling)
        return load_image(source)


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """What `generate` hands its tokens to: decodes them and passes whole words on."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


# ---- the commands --------------------------------------------------------------------------------


def ask_main(args: argparse.Namespace) -> int:
    """Run `apollo ask`.

    Args:
        args: video, question, model, server, options, max_new_tokens, sampling.
    """
    question_prompt(args.question, args.options)  # before the slow parts: it may be refused
    if args.server:
        with closing(RemoteChat(args.server, args.model)) as remote:
            print(remote.ask(args.video, args.question, args.options, **_options(args)))
        return 0
    chat, clips = _start(args)
    answer = chat.ask(clips, args.question, args.options, max_new_tokens=args.max_new_tokens)
    if answer.option_scores:
        for option, share in zip(args.options, _shares(answer.option_scores), strict=True):
            print(f"  {share:6.1%}  {option}")
    print(answer.text)
    return 0


def chat_main(args: argparse.Namespace) -> int:
    """Run `apollo chat`: a question a line, until the input ends.

    Args:
        args: video, model, server, max_new_tokens, sampling.
    """
    if args.server:
        open_video(args.video).close()
        with closing(RemoteChat(args.server, args.model)) as remote:
            _talk(partial(remote.ask, **_options(args)), args.video)
        return 0
    chat, clips = _start(args)
    _talk(partial(chat.ask, max_new_tokens=args.max_new_tokens), clips)
    return 0


def _talk(ask: Callable[..., Any], video: Any) -> None:
    """Ask what is typed, a question a line, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the video; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = input("> " if interactive else "")
        except EOFError:
            return
        if not question.strip():
            print("the question is empty; ask something about the video", file=sys.stderr)
            continue
        ask(video, question, on_text=_print_piece)
        print()
        video = None


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {"sampling": args.sampling, "max_new_tokens": args.max_new_tokens}


def _start(args: argparse.Namespace) -> tuple[VideoChat, VideoClips]:
    """Load the model and the video, and tell which frames were looked at."""
    from transformers.utils import logging

    open_video(args.video).close()  # a bad path should not wait for the model
    logging.disable_progress_bar()
    chat = VideoChat.load(args.model)
    clips = chat._load_media("video", args.video, args.sampling)
    is_default = args.model in (None, DEFAULT_MODEL)
    note = chat.model.config.note or (MODELS[DEFAULT_MODEL] if is_default else "")
    if note:
        print(f"note: the model {args.model or DEFAULT_MODEL} {note}", file=sys.stderr)
    print(describe_clips(clips))
    return chat, clips


def describe_clips(clips: VideoClips) -> str:
    """Lines that say which moments of a video were looked at: each clip's span and its frames."""
    from apollo.model.processing import mmss  # so that the spans read as they do in the prompt

    num_clips = len(clips.frames)
    lines = [
        f"{num_clips} clip{'s' * (num_clips > 1)} of a video of {clips.duration_s:.1f} s "
        f"({clips.source_fps:.2f} frames per second):"
    ]
    for (start_s, end_s), times_s in zip(clips.spans_s, clips.times_s, strict=True):
        times = " ".join(f"{time_s:.2f}" for time_s in times_s)
        lines.append(f"  {mmss(start_s)}-{mmss(end_s)}  frames at {times} s")
    return "\n".join(lines)


def _shares(scores: Sequence[float]) -> list[float]:
    """Probabilities of the options among themselves (softmax of their log-probabilities)."""
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
