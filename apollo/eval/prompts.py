"""What an answerer is asked, word by word: the question, and what stands before it.

Here because a benchmark's score depends on the wording, so that every answerer must use the same,
and because its hash belongs to every result (`prompt_hash`). Free of torch. Read next:
`subtitles.py` (where the text of a benchmark with subtitles comes from), `local.py` (who asks).
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from apollo.eval.questions import Question
from apollo.eval.subtitles import read_subtitles, subtitles_at
from apollo.messages import question_prompt
from apollo.video import VideoClips

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""Wording of lmms-eval's multiple-choice tasks (`post_prompt` of its configurations)."""

SUBTITLES_HEADER = "This video's subtitles are listed below:"
"""Wording of Video-MME's own evaluation, as lmms-eval's `videomme_w_subtitle` has it."""

CAPTION_HEADER = "Caption:"
"""What announces the model's own caption, when a question is answered from that alone."""


def question_text(question: Question, scoring: str) -> str:
    """Write question and options, and how to answer them.

        What moves left?
        A. the ball
        B. the cube
        Answer with the option's letter from the given choices directly.

    Args:
        question: What is asked.
        scoring: A key of `answerers.SCORINGS`; for "option" the last line is left out, as the
            option's text is the answer.
    """
    text = question_prompt(question.question, question.options)
    return text if scoring == "option" else f"{text}\n{LETTER_INSTRUCTION}"


def subtitles_text(question: Question, spans_s: Sequence[tuple[float, float]] | None) -> str:
    """Write the subtitles that go before the question; empty where there are none to be shown.

    Args:
        question: What is asked; it says where its subtitles are.
        spans_s: Which parts of the video are shown, as (start, end); None for all of it.

    Raises:
        ValueError: The subtitles cannot be read.
    """
    if question.subtitles is None:
        return ""
    subtitles = read_subtitles(question.subtitles, question.subtitles_from_s)
    text = subtitles_at(subtitles, [(-math.inf, math.inf)] if spans_s is None else spans_s)
    return f"{SUBTITLES_HEADER}\n{text}\n" if text else ""


def caption_text(caption: str) -> str:
    """Write the caption that a question is answered from."""
    return f"{CAPTION_HEADER} {caption}\n"


def shown_spans(clips: VideoClips | None) -> list[tuple[float, float]] | None:
    """Say which parts of a video are shown: the spans of clips, or the moments of single frames."""
    if clips is None:
        return None
    if clips.frames.shape[1] == 1:
        return [(float(time_s), float(time_s)) for time_s in clips.times_s[:, 0]]
    return [(float(start_s), float(end_s)) for start_s, end_s in clips.spans_s]


def prompt_hash() -> str:
    """SHA-256 of all that the prompts are made of: another wording is another result."""
    example = Question("example", Path("video"), "What?", ("this", "that"), answer=0)
    asked = [question_text(example, scoring) for scoring in ("letter", "option")]
    parts = [SUBTITLES_HEADER, caption_text("caption"), *asked]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()
