"""Who answers questions: what all answerers have in common, their table, and the two baselines.

Here because the runner must not care who answers: an Apollo model, a model of transformers, a
server, an oracle that proves that the scoring can reach 100 %, or a guesser that shows what chance
gives. Free of torch; a model is loaded when its answerer is made. Read next: `local.py` (an Apollo
model), `huggingface.py`, `api.py`, `prompts.py` (what they are asked).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from apollo.eval.questions import Question

CONDITIONS: dict[str, str] = {
    "video": "the video as the model samples it",
    "frame": "its centre frame only, as an image",
    "text": "nothing: the question alone (blind)",
    "shuffled": "its frames in an order drawn by its id, while the times stay as they were",
}

SCORINGS: dict[str, str] = {
    "letter": "log-probability of each option's letter, asked for the letter",
    "option": "log-probability of each option's whole text and the end of the turn",
    "generate": "a free answer, from which the option is read",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answerer says to one question.

    Attributes:
        prediction: Index of the option chosen, or None.
        status: "ok", or why there is no prediction: "unparsable", "error: ..."
        option_scores: One per option, higher is likelier, rounded to 4 decimals; empty when the
            answer was generated.
        text: What was written, when it was generated; or the caption answered from.
        frame_times_s: Times of the frames it was shown, one list per clip, rounded to 3 decimals.
        num_prompt_tokens: Tokens read, those of the video included; None if unknown.
        num_answer_tokens: Tokens written; None where none are.
    """

    prediction: int | None
    status: str
    option_scores: list[float] = field(default_factory=list)
    text: str = ""
    frame_times_s: list[list[float]] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_answer_tokens: int | None = None


class Answerer(Protocol):
    """Anything that answers questions.

    Attributes:
        identity: All that its answers depend on, as JSON values; not the batch size, nor where a
            file lies. Predictions of two identities are never mixed.
    """

    identity: dict[str, Any]

    def watch(self, question: Question, condition: str) -> Any:
        """Decode what the condition shows of the question's video; None for "text".

        Called in a thread, while the answerer answers about another video.

        Raises:
            VideoError: The video cannot be read. A ValueError.
            OSError: It cannot be opened.
        """

    def answer(self, questions: Sequence[Question], condition: str, seen: Any) -> list[Answer]:
        """Answer questions about one video; under "text" they may be of several.

        Args:
            questions: What is asked.
            condition: A key of `CONDITIONS`.
            seen: What `watch` returned for the video.
        """


def choose(option_scores: Sequence[float]) -> int:
    """Return the index of the highest score, the first of equal ones."""
    return max(range(len(option_scores)), key=lambda i: (option_scores[i], -i))


class OracleAnswerer:
    """Always right: the ceiling that the scoring must reach."""

    identity: dict[str, Any] = {"kind": "oracle"}

    def watch(self, question: Question, condition: str) -> None:
        """Look at nothing."""

    def answer(self, questions: Sequence[Question], condition: str, seen: Any) -> list[Answer]:
        """Give the right option a score of one, the others zero."""
        return [
            Answer(q.answer, "ok", [float(i == q.answer) for i in range(len(q.options))])
            for q in questions
        ]


class RandomAnswerer:
    """Guesses: the floor. A guess depends on question and condition alone, in every process."""

    identity: dict[str, Any] = {"kind": "random"}

    def watch(self, question: Question, condition: str) -> None:
        """Look at nothing."""

    def answer(self, questions: Sequence[Question], condition: str, seen: Any) -> list[Answer]:
        """Draw the scores from a generator seeded with the question's id and the condition."""
        answers = []
        for question in questions:
            # A string seed is hashed by SHA-512, not by hash(), which differs between processes.
            draw = random.Random(f"{question.benchmark} {question.question_id} {condition}")
            scores = [round(draw.random(), 4) for _ in question.options]
            answers.append(Answer(choose(scores), "ok", scores))
        return answers


def _oracle(model: str, **options: Any) -> Answerer:
    """Always right: the ceiling that the scoring must reach."""
    return OracleAnswerer()


def _random(model: str, **options: Any) -> Answerer:
    """Guesses, the same in every run: the floor."""
    return RandomAnswerer()


def _apollo(model: str, **options: Any) -> Answerer:
    """An Apollo model: MODEL is its folder or hub id."""
    from apollo.eval.local import ApolloAnswerer

    return ApolloAnswerer(model, **options)


def _huggingface(model: str, **options: Any) -> Answerer:
    """Any AutoModelForImageTextToText of transformers: huggingface:FOLDER_OR_HUB_ID."""
    from apollo.eval.huggingface import HuggingFaceAnswerer

    return HuggingFaceAnswerer(model, **options)


def _api(model: str, **options: Any) -> Answerer:
    """A model behind an OpenAI-compatible server: api:MODEL_NAME with --server URL."""
    from apollo.eval.api import ApiAnswerer

    return ApiAnswerer(model, **options)


ANSWERERS: dict[str, Callable[..., Answerer]] = {
    "apollo": _apollo,
    "huggingface": _huggingface,
    "api": _api,
    "oracle": _oracle,
    "random": _random,
}
"""Kind of answerer -> what makes it of a model's name and options."""

SCORINGS_OF: dict[str, tuple[str, ...]] = {
    "apollo": ("letter", "option", "generate"),
    "huggingface": ("letter", "generate"),
    "api": ("generate",),
    "oracle": tuple(SCORINGS),
    "random": tuple(SCORINGS),
}
"""Kind of answerer -> the scorings it knows; servers tell no likelihoods that can be compared."""


def kind_and_model(name: str) -> tuple[str, str]:
    """Split what `apollo eval` is given: "api:some/model" is kind "api", model "some/model".

    "oracle" and "random" are kinds without a model; anything else is an Apollo model's folder or
    hub id.

    Raises:
        ValueError: "huggingface:" or "api:" without a model behind it.
    """
    if name in ("oracle", "random"):
        return name, ""
    kind, colon, model = name.partition(":")
    if colon and kind in ANSWERERS:
        if not model:
            raise ValueError(f"{name!r} names no model; write {kind}:MODEL")
        return kind, model
    return "apollo", name


def pick_scoring(name: str, asked: str | None, preferred: str) -> str:
    """Choose how answers are scored: as asked, else as the benchmark prefers where possible.

    Args:
        name: The answerer, as `make_answerer` takes it.
        asked: What the user asked for, if anything.
        preferred: The benchmark's own.

    Raises:
        ValueError: The answerer does not know the scoring asked for.
    """
    kind, _ = kind_and_model(name)
    known = SCORINGS_OF[kind]
    if asked is None:
        return preferred if preferred in known else known[0]
    if asked not in known:
        raise ValueError(
            f"--scoring {asked}: answerers of kind {kind!r} know {', '.join(known)}"
            + ("; a server tells no likelihoods that can be compared" if kind == "api" else "")
        )
    return asked


def make_answerer(name: str, *, scoring: str, batch_size: int = 16, **options: Any) -> Answerer:
    """Make the answerer that a name stands for.

    Args:
        name: "oracle", "random", "huggingface:MODEL", "api:MODEL", or an Apollo model.
        scoring: A key of `SCORINGS`.
        batch_size: Rows, or requests, at once: changes the speed, not the answers.
        options: Further settings of that kind of answerer, such as `server` or `num_frames`.

    Raises:
        ValueError: There is no such model, or it does not know the scoring.
    """
    kind, model = kind_and_model(name)
    scoring = pick_scoring(name, scoring, scoring)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    return ANSWERERS[kind](model, scoring=scoring, batch_size=batch_size, **options)
