"""Who answers questions: an Apollo model, an oracle that knows, and a guesser that does not.

Here because the runner must not care who answers: the oracle proves that the scoring can reach 100
%, the guesser that it gives chance, and both need no weights. A model answers by likelihood: each
option is scored as the assistant's turn after the same prompt, which leaves nothing to parse. Next:
`runner.py`, which asks.
"""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apollo.chat import load_model
from apollo.data.features import fingerprint
from apollo.eval.benchmarks import Question
from apollo.media import load_video
from apollo.messages import Message, Part, question_prompt
from apollo.model.processing import ApolloProcessor
from apollo.video import ClipSampling, load_clips

IGNORED_LABEL = -100  # what the processor puts where nothing is supervised

CONDITIONS: dict[str, str] = {
    "video": "the clips that the model samples by itself",
    "frame": "the centre frame only",
    "text": "the question alone, nothing to see",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answerer says to one question.

    Attributes:
        option_scores: One per option, higher is likelier; empty if there is no answer.
        frame_times_s: Times of the frames it was shown, one list per clip.
    """

    option_scores: list[float]
    frame_times_s: list[list[float]]


class Answerer(Protocol):
    """Anything that answers the questions of one video.

    Attributes:
        identity: Names the answerer so that predictions of two are never mixed.
    """

    identity: str

    def answer(self, questions: Sequence[Question], condition: str) -> list[Answer]:
        """Answer questions that all share one video, shown as `condition` says.

        Raises:
            apollo.video.VideoError: The video cannot be read.
        """


class OracleAnswerer:
    """Always right; the ceiling that the scoring must reach."""

    identity = "oracle"

    def answer(self, questions: Sequence[Question], condition: str) -> list[Answer]:
        """Give the right option a score of one, the others zero."""
        return [
            Answer([float(i == q.answer) for i in range(len(q.options))], frame_times_s=[])
            for q in questions
        ]


class RandomAnswerer:
    """Guesses: the floor. A guess depends on the question_id alone, in every process the same."""

    identity = "random"

    def answer(self, questions: Sequence[Question], condition: str) -> list[Answer]:
        """Draw the scores from a generator seeded with the question's id."""
        answers = []
        for question in questions:
            draw = random.Random(
                question.question_id
            )  # a string seed is hashed by SHA-512, not by hash()
            answers.append(Answer([draw.random() for _ in question.options], frame_times_s=[]))
        return answers


class ModelAnswerer:
    """An Apollo model, in float32 so that its answers can be reproduced.

    The score of an option is the log-probability of its text and the end of the turn, summed over
    tokens, after the same prompt for all. A video is decoded and encoded once for all of its
    questions, and what their prompts share is read by the LLM once.

    Args:
        model_path: Folder or hub id of a saved model.
        batch_size: Options that go through the LLM at once; changes the speed, not the scores.

    Raises:
        ValueError: No Apollo model is there, or `batch_size` is less than one.
    """

    def __init__(self, model_path: str | Path, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        model, self.processor = load_model(model_path)
        self.model = model.float()
        self.tokenize = _without_pixels(self.processor)
        self.batch_size = batch_size
        self.identity = f"model {fingerprint(self.model)}"

    def answer(self, questions: Sequence[Question], condition: str) -> list[Answer]:
        """Score every option of every question."""
        medium, times_s = self._look(questions[0].video, condition)
        conversations: list[list[Message]] = [
            [
                {"role": "user", "content": [*medium, {"type": "text", "text": prompt}]},
                {"role": "assistant", "content": option},
            ]
            for question in questions
            for prompt in [question_prompt(question.question, question.options)]
            for option in question.options
        ]
        batch = self.tokenize(conversations, with_labels=True)
        scores = iter(self._score(batch, self._encode(medium)))
        return [Answer([next(scores) for _ in question.options], times_s) for question in questions]

    def _look(self, video: Path, condition: str) -> tuple[list[Part], list[list[float]]]:
        """Load what the condition shows: one media part or none, and the times of its frames."""
        if condition == "text":
            return [], []
        if condition == "frame":  # as an image, the form in which models learn single frames
            clips = load_clips(video, ClipSampling("center", frames_per_clip=1))
            return [{"type": "image", "image": clips.frames[0, 0]}], [[float(clips.times_s[0, 0])]]
        clips = load_video(video, self.processor)
        return [{"type": "video", "video": clips}], clips.times_s.round(3).tolist()

    @torch.inference_mode()
    def _encode(self, medium: list[Part]) -> Tensor | None:
        """Run the encoders on the medium, if there is one: (C, T, H, W, D)."""
        if not medium:
            return None
        batch = self.processor([[{"role": "user", "content": medium}]])
        return self.model.encode([pixels.to(self.model.device) for pixels in batch["pixel_values"]])

    @torch.inference_mode()
    def _score(self, batch: Mapping[str, Any], clip_features: Tensor | None) -> list[float]:
        """Sum the log-probabilities of each row's labels.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` (B, L), padded on the right.
            clip_features: Features of the medium that every row opens with.
        """
        names = ("input_ids", "attention_mask", "labels")
        ids, mask, labels = (batch[name].to(self.model.device) for name in names)
        shared = num_shared_tokens(ids, labels)
        prefix = self.model(
            input_ids=ids[:1, :shared],
            clip_features=clip_features,
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        scores: list[float] = []
        for rows in torch.arange(len(ids), device=ids.device).split(self.batch_size):
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(rows))
            logits = self.model(
                input_ids=ids[rows, shared:], attention_mask=mask[rows], past_key_values=cache
            ).logits  # (rows, L - shared, vocabulary)
            losses = cross_entropy(
                logits[:, :-1].float().transpose(1, 2),
                labels[rows, shared + 1 :],
                ignore_index=IGNORED_LABEL,
                reduction="none",
            )
            scores += (-losses.sum(1)).tolist()
        return scores


def num_shared_tokens(ids: Tensor, labels: Tensor) -> int:
    """Count the tokens that all rows begin with, stopping one short of the first supervised token.

    The token before it predicts it, so that one must be read row by row.

    Args:
        ids: (B, L), padded on the right.
        labels: (B, L), -100 where nothing is supervised.
    """
    is_supervised = (labels != IGNORED_LABEL).any(0)
    differs = (ids != ids[:1]).any(0)
    first_supervised = int(is_supervised.int().argmax())
    first_different = int((differs | is_supervised).int().argmax())
    shared = min(first_different, first_supervised - 1)
    assert shared > 0, "every prompt opens with the same start of the user's turn"
    return shared


def _without_pixels(processor: ApolloProcessor) -> ApolloProcessor:
    """Make a processor of the same prompts that prepares no frames: those are encoded apart."""
    return ApolloProcessor(
        processor.tokenizer,
        preprocessing=[],
        frames_per_clip=processor.frames_per_clip,
        tokens_per_clip=processor.tokens_per_clip,
        token_integration=processor.token_integration,
        prompt_format=processor.prompt_format,
        chat_template=str(processor.chat_template),
    )


ANSWERERS: dict[str, Callable[..., Answerer]] = {
    "model": ModelAnswerer,
    "oracle": OracleAnswerer,
    "random": RandomAnswerer,
}
