"""An Apollo model as answerer: each video is decoded, encoded and read by the LLM once.

Here because this is where evaluations spend their time, and where scores lose their repeatability.
All questions about a video go on from one key-value prefix (system prompt, video, subtitles), and
nothing that a question is computed with depends on the others: on a CPU in float32 its scores are
the same to the last bit for any batch size and in any company (`apollo/model/likelihood.py` says
how). On a GPU, in the precision that the model was saved in, they agree to rounding. Read next:
`prompts.py`, `runner.py`.
"""

import contextlib
import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from apollo.chat import load_model
from apollo.data.features import BrokenFeaturesError, CachedClips, FeatureCache, fingerprint
from apollo.eval import prompts
from apollo.eval.answerers import Answer, choose
from apollo.eval.parsing import parse_answer
from apollo.eval.questions import Question
from apollo.eval.watching import Watcher
from apollo.media import sampling_of
from apollo.messages import Message, Part
from apollo.model.likelihood import Row, log_probabilities, read_prefix, repeated
from apollo.model.modeling import CACHE
from apollo.model.processing import END_OF_TURN
from apollo.video import VideoClips

MAX_ANSWER_TOKENS = 32
MAX_CAPTION_TOKENS = 256
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class _Shown:
    """What stands before a question: a medium or none, encoded, and text.

    Attributes:
        medium: One media part of a message, or none.
        clip_features: Its clips, (C, T, H, W, V).
        text: Subtitles or a caption; empty or whole lines.
    """

    medium: list[Part] = field(default_factory=list)
    clip_features: Tensor | None = None
    text: str = ""


@dataclass(frozen=True)
class _Written:
    """What the model wrote, and the number of tokens it read and wrote for that."""

    text: str
    num_prompt_tokens: int
    num_tokens: int


class ApolloAnswerer:
    """Answers by the likelihood of letters or of whole options, or by writing.

    Args:
        model: Folder or hub id of an Apollo model, or "micro".
        scoring: A key of `answerers.SCORINGS`.
        batch_size: Rows that go through the LLM at once; changes the speed, not the answers.
        dtype: One of `PRECISIONS`; by default float32 on a CPU and as saved elsewhere.
        feature_cache: Folder that keeps what the encoders made of each video, in float16, for all
            models with the same encoders: these then neither decode nor encode it again.

    Raises:
        ValueError: There is no such model, or its letters are no single tokens.
    """

    def __init__(
        self,
        model: str | Path,
        scoring: str = "letter",
        batch_size: int = 16,
        dtype: str | None = None,
        feature_cache: str | Path | None = None,
    ) -> None:
        self.model, self.processor = load_model(model)
        if dtype is not None:
            if dtype not in PRECISIONS:
                raise ValueError(f"dtype {dtype!r}: choose from {', '.join(PRECISIONS)}")
            self.model.to(getattr(torch, dtype))
        self.scoring, self.batch_size = scoring, batch_size
        self.letter_ids = self._letter_ids() if scoring == "letter" else []
        self._watcher = Watcher(sampling_of(self.processor), self.processor.squares)
        self.identity: dict[str, Any] = {
            "kind": "apollo",
            "weights": fingerprint(self.model),
            "prompt": prompts.prompt_hash(),
            "processor": self._processor_hash(),
            "sampling": asdict(sampling_of(self.processor)),
            "scoring": scoring,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        self._caches: dict[str, FeatureCache] = {}
        if feature_cache is not None:
            self._caches = self._open_caches(Path(feature_cache))
            self.identity["features"] = "float16"

    def watch(self, question: Question, condition: str) -> VideoClips | CachedClips | None:
        """Find the features of what is shown, or decode it; see `answerers.Answerer`."""
        if condition in self._caches:
            with contextlib.suppress(BrokenFeaturesError, OSError):
                return self._caches[condition].load(question.video)
        return self._watcher(question, condition)

    def answer(
        self,
        questions: Sequence[Question],
        condition: str,
        seen: VideoClips | CachedClips | None,
    ) -> list[Answer]:
        """Answer questions about one video; see `answerers.Answerer`.

        Raises:
            ValueError: A prompt is longer than the LLM's context, or subtitles cannot be read.
        """
        if isinstance(seen, VideoClips) and condition in self._caches:
            cache, video = self._caches[condition], questions[0].video
            cache.save(video, self._encode(_medium(seen, condition)), seen)
            seen = cache.load(video)  # to answer the same whether it was there or not
        clip_features: Tensor | None = None
        if isinstance(seen, CachedClips):
            clip_features, seen = seen.features, seen.clips
        medium = _medium(seen, condition)
        if medium and clip_features is None:
            clip_features = self._encode(medium)
        spans_s = prompts.shown_spans(seen)
        shown = [
            _Shown(medium, clip_features, prompts.subtitles_text(question, spans_s))
            for question in questions
        ]
        answers: dict[int, Answer] = {}
        kinds = [(s.text, q.caption_prompt) for s, q in zip(shown, questions, strict=True)]
        for indices in _alike(kinds):
            group = [questions[index] for index in indices]
            answers.update(zip(indices, self._answer_alike(group, shown[indices[0]]), strict=True))
        times_s = [] if seen is None else seen.times_s.round(3).tolist()
        return [replace(answers[i], frame_times_s=times_s) for i in range(len(questions))]

    # ---- questions that are shown the same -------------------------------------------------------

    def _answer_alike(self, questions: list[Question], shown: _Shown) -> list[Answer]:
        """Answer questions with the same medium, text before them, and caption prompt."""
        if not questions[0].caption_prompt:
            return self._ask(questions, shown)
        prefix_ids, prefix = self._read(shown)
        prompt_ids = self._prompts(shown, [questions[0].caption_prompt])[0]
        self._check_length(questions[0], len(prompt_ids) + MAX_CAPTION_TOKENS)
        caption = self._write(prefix_ids, prefix, prompt_ids, MAX_CAPTION_TOKENS)
        answers = self._ask(questions, _Shown(text=prompts.caption_text(caption.text)))
        return [
            replace(
                answer,
                text="\n".join(filter(None, (caption.text, answer.text))),
                num_prompt_tokens=caption.num_prompt_tokens + (answer.num_prompt_tokens or 0),
                num_answer_tokens=caption.num_tokens + (answer.num_answer_tokens or 0),
            )
            for answer in answers
        ]

    def _ask(self, questions: list[Question], shown: _Shown) -> list[Answer]:
        """Read what is shown once and go on from there with every question."""
        prefix_ids, prefix = self._read(shown)
        texts = [prompts.question_text(question, self.scoring) for question in questions]
        prompt_ids = self._prompts(shown, texts)
        if self.scoring == "generate":
            answers = []
            for question, ids in zip(questions, prompt_ids, strict=True):
                self._check_length(question, len(ids) + MAX_ANSWER_TOKENS)
                written = self._write(prefix_ids, prefix, ids, MAX_ANSWER_TOKENS)
                answers.append(_read_off(written, question))
            return answers
        scores = self._scores(prefix_ids, prefix, questions, prompt_ids)
        return [
            Answer(choose(row), "ok", row, num_prompt_tokens=len(ids))
            for row, ids in zip(scores, prompt_ids, strict=True)
        ]

    def _scores(
        self,
        prefix_ids: list[int],
        prefix: Cache,
        questions: list[Question],
        prompt_ids: list[list[int]],
    ) -> list[list[float]]:
        """Score each question's options."""
        starts = [num_shared(prefix_ids, ids) for ids in prompt_ids]
        scores: dict[int, list[float]] = {}
        for indices in _alike(starts):
            start = starts[indices[0]]  # of all that is shared, unless a tokenizer is odd
            rows = [self._row(questions[i], prompt_ids[i], start) for i in indices]
            from_here = repeated(prefix, 1, start)
            found = log_probabilities(self.model, from_here, rows, self.batch_size)
            scores.update(zip(indices, found, strict=True))
        return [[round(s, 4) for s in scores[index]] for index in range(len(questions))]

    def _row(self, question: Question, prompt_ids: list[int], start: int) -> Row:
        """Make the row that scores a question's letters, or its options and the end of the turn."""
        if self.scoring == "letter":
            texts = [[token] for token in self.letter_ids[: len(question.options)]]
        else:
            written = [option + END_OF_TURN for option in question.options]
            texts = self.processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        self._check_length(question, len(prompt_ids) + max(map(len, texts)) - 1)
        return Row(prompt_ids[start:], texts)

    # ---- what the model does ---------------------------------------------------------------------

    @torch.inference_mode()
    def _encode(self, medium: list[Part]) -> Tensor:
        """Run the encoders on the medium."""
        batch = self.processor([[{"role": "user", "content": medium}]])
        return self.model.encode([pixels.to(self.model.device) for pixels in batch["pixel_values"]])

    def _read(self, shown: _Shown) -> tuple[list[int], Cache]:
        """Let the LLM read what is shown; return its tokens and the cache.

        They are what two prompts that differ from the question's first letter on have in common, so
        that they do not depend on the questions that are asked.
        """
        first, second = self._prompts(shown, ["A", "B"])
        ids = first[: num_shared(first, second)]
        self._check_length(None, len(ids))
        return ids, read_prefix(self.model, ids, shown.clip_features)

    def _prompts(self, shown: _Shown, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise prompts up to where the assistant's turn begins."""
        conversations: list[list[Message]] = [
            [{"role": "user", "content": [*shown.medium, {"type": "text", "text": shown.text + t}]}]
            for t in texts
        ]
        batch = self.processor(
            conversations, add_generation_prompt=True, with_pixels=False, padding_side="right"
        )
        lengths = batch["attention_mask"].sum(1).tolist()
        return [
            ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)
        ]

    @torch.inference_mode()
    def _write(
        self, prefix_ids: list[int], prefix: Cache, prompt_ids: list[int], max_new_tokens: int
    ) -> _Written:
        """Write an answer to the prompt, always taking the likeliest token."""
        ids = torch.tensor([prompt_ids], device=self.model.device)
        config = GenerationConfig(  # not the model's own, which may hold penalties
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        cache = repeated(prefix, 1, num_shared(prefix_ids, prompt_ids))
        tokens = self.model.generate(  # type: ignore[misc]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            **{CACHE: cache},
        )
        new = tokens[0, ids.shape[1] :]
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        return _Written(text, len(prompt_ids), len(new))

    # ---- checks ----------------------------------------------------------------------------------

    def _letter_ids(self) -> list[int]:
        """Find the tokens of the letters, as they begin the assistant's turn.

        Raises:
            ValueError: A letter is not the one token that stands there.
        """
        user: Message = {"role": "user", "content": "?"}
        letters = list(string.ascii_uppercase)
        turns = [[user, {"role": "assistant", "content": letter}] for letter in letters]
        batch = self.processor(turns, with_labels=True, with_pixels=False)
        prompt = self.processor([user], add_generation_prompt=True, with_pixels=False)["input_ids"]
        length = prompt.shape[1]
        after = batch["input_ids"][:, length : length + 1].flatten().tolist()
        decoded = self.processor.tokenizer.batch_decode([[token] for token in after])
        if not (batch["input_ids"][:, :length] == prompt).all() or decoded != letters:
            raise ValueError(
                "this model's chat template or tokenizer does not let the assistant's turn begin "
                "with one token for a letter; use --scoring option"
            )
        return after

    def _check_length(self, question: Question | None, num_tokens: int) -> None:
        """Refuse what the LLM cannot read."""
        most = self.model.config.text_config.max_position_embeddings
        if num_tokens > most:
            name = f"question {question.question_id!r}" if question else "what the questions share"
            raise ValueError(
                f"{name} needs {num_tokens} tokens, and the LLM's context has {most}; evaluate "
                "without subtitles, or save the model's processor with fewer max_clips"
            )

    def _open_caches(self, folder: Path) -> dict[str, FeatureCache]:
        """Open a cache for each condition that shows the same of a file whoever asks."""
        made_by = {
            "encoders": fingerprint(self.model.parts()["encoders"]),
            "sampling": asdict(sampling_of(self.processor)),
            "preprocessing": self.processor.preprocessing,
            "decoder_scaling": self.processor.decoder_scaling,
            "dtype": str(self.model.dtype),
        }
        return {
            name: FeatureCache(folder, {**made_by, "condition": name})
            for name in ("video", "frame")
        }

    def _processor_hash(self) -> str:
        """SHA-256 of what the processor makes of an example: tokens, and how frames are cut."""
        turns = [
            [{"role": "user", "content": "What? 12:34"}, {"role": "assistant", "content": "A"}]
        ]
        ids = self.processor(turns, with_pixels=False)["input_ids"].tolist()
        names = ("tokens_per_clip", "token_integration", "prompt_format", "decoder_scaling")
        settings = {name: getattr(self.processor, name) for name in names}
        state = [ids, settings, self.processor.preprocessing]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _medium(seen: VideoClips | None, condition: str) -> list[Part]:
    """Make one media part of what was seen, or none."""
    if seen is None:
        return []
    if condition == "frame":  # as an image, the form in which models learn single frames
        return [{"type": "image", "image": seen.frames[0, 0]}]
    return [{"type": "video", "video": seen}]


def _read_off(written: _Written, question: Question) -> Answer:
    """Find the option that a written answer names."""
    parsed = parse_answer(written.text, question.options)
    return Answer(
        parsed.prediction,
        parsed.status,
        text=written.text,
        num_prompt_tokens=written.num_prompt_tokens,
        num_answer_tokens=written.num_tokens,
    )


def _alike(values: Sequence[Any]) -> list[list[int]]:
    """Group the indices of equal values."""
    groups: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return list(groups.values())
