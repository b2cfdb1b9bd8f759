"""`apollo demo`: the whole of Apollo in a few minutes on two cores, with a report at the end.

Here because a stranger should see it work before reading a line of it. In order: make videos that
no model has seen, ask the shipped model about some, evaluate it with and without the pictures,
train the three stages from the shipped parts, evaluate what came out. Nothing is picked by its
outcome: the questions shown are the first of each class. Next: `eval/runner.py`, `train/run.py`.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from apollo.chat import DEFAULT_MODEL, VideoChat
from apollo.eval import report
from apollo.eval.answerers import make_answerer
from apollo.eval.questions import Question, read_questions
from apollo.eval.runner import evaluate, format_score, print_table
from apollo.eval.scoring import Score, Tables
from apollo.messages import question_prompt
from apollo.train.curves import read_log
from apollo.train.recipes import RECIPES, TrainConfig
from apollo.train.run import train
from apollo.video import VideoClips
from apollo.world.make import make_world

WORLD_SEED = 20241213
NUM_TEST_VIDEOS = 64
NUM_TRAIN_VIDEOS = 200
BATCH_SIZE = 8  # a quarter to a half of the recipe's, so that a few minutes hold enough steps
STEPS_PER_MINUTE = {"align": 40, "vision": 15, "sft": 38}
"""Steps of each stage for every minute of training: together they take about a minute on 2 cores.

Fewer steps of vision pre-training leave its loss where it was.
"""

Curves = dict[str, tuple[list[float], list[float]]]  # stage -> (steps, losses)


@dataclass(frozen=True)
class Shown:
    """A question that was put to the shipped model, with what it saw and wrote."""

    question: Question
    clips: VideoClips
    said: str

    @property
    def truth(self) -> str:
        """The right option's text."""
        return self.question.options[self.question.answer]

    @property
    def correct(self) -> bool:
        """Whether the model wrote the right option's text, and nothing else."""
        return self.said == self.truth


def main(args: argparse.Namespace) -> int:
    """Run `apollo demo`.

    Args:
        args: out (folder for all that is made), minutes (about how long to train).
    """
    if args.minutes <= 0:
        raise ValueError(f"--minutes must be more than 0, not {args.minutes:g}")
    logging.disable_progress_bar()
    out_dir, console, started = free_dir(Path(args.out)), Console(), time.monotonic()

    def say(text: str) -> None:
        console.print(f"\n[dim]{time.monotonic() - started:4.0f} s[/dim]  [bold]{text}[/bold]")

    say(f"Making {NUM_TEST_VIDEOS} videos that no model has seen")
    make_world(out_dir / "test_world", NUM_TEST_VIDEOS, seed=WORLD_SEED, split="test")
    questions = read_questions(out_dir / "test_world")  # five for each video

    say("Asking the shipped model, one question of each class")
    chat = VideoChat.load(DEFAULT_MODEL)
    shown = [ask(chat, question) for question in first_of_each_class(questions)]
    for item in shown:
        print_shown(item, console)

    say(f"Evaluating it on {len(questions)} questions: whole video, centre frame, text alone")
    answerer = make_answerer(DEFAULT_MODEL, scoring="option")
    shipped = evaluate(answerer, questions, ["video", "frame", "text"], out_dir / "eval_shipped")
    print_table("class", shipped["class"] | shipped["overall"], console)

    say(f"Training all three stages from the shipped parts for about {args.minutes:g} minutes")
    make_world(out_dir / "train_world", NUM_TRAIN_VIDEOS, seed=WORLD_SEED, split="train")
    model_dir = train(short_recipe(out_dir, args.minutes))
    losses = read_losses(out_dir / "train")
    for stage, (_, values) in losses.items():
        console.print(f"  {stage:<8} loss {start_and_end(values)}")

    say("Evaluating the model that was just trained")
    answerer = make_answerer(str(model_dir), scoring="option")
    trained = evaluate(answerer, questions, ["video", "text"], out_dir / "eval_trained")
    print_table("class", trained["class"] | trained["overall"], console)
    console.print(f"  {verdict(trained['overall']['all']['video'])}")

    path = out_dir / "report.html"
    path.write_text(demo_page(shown, shipped, trained, losses), encoding="utf-8")
    say(f"Report with pictures: {path.resolve()}")
    return 0


def free_dir(path: Path) -> Path:
    """Give the path itself, or with -2, -3... where earlier demos have left something."""
    candidate, number = path, 1
    while candidate.exists() and (candidate.is_file() or any(candidate.iterdir())):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


# ---- asking


def first_of_each_class(questions: Sequence[Question]) -> list[Question]:
    """Take of each class the first question that needs several frames, each of another video."""
    chosen: dict[str, Question] = {}
    for question in questions:
        is_new_video = question.video not in {q.video for q in chosen.values()}
        if question.needs == "frames" and is_new_video:
            chosen.setdefault(question.question_class, question)
    return list(chosen.values())


def ask(chat: VideoChat, question: Question) -> Shown:
    """Let the model write its answer to a question, options included."""
    prompt = question_prompt(question.question, question.options)
    answer = chat.ask(question.video, prompt, max_new_tokens=32)
    assert answer.clips is not None
    return Shown(question, answer.clips, answer.text)


def print_shown(item: Shown, console: Console) -> None:
    """Print question, answer and truth."""
    colour = "green" if item.correct else "red"
    console.print(f"  {escape(item.question.question)}", highlight=False)
    console.print(
        f"    it says [{colour}]{escape(item.said)}[/{colour}], the truth is {escape(item.truth)}"
        f"  [dim]({item.question.question_class}, {len(item.clips.frames)} clips of "
        f"{item.clips.duration_s:.0f} s)[/dim]",
        highlight=False,
    )


# ---- training


def short_recipe(out_dir: Path, minutes: float) -> TrainConfig:
    """Make the micro recipe with smaller batches and as many steps as fit into the time."""
    config = RECIPES["micro"]()
    stages = [
        replace(
            stage,
            batch_size=BATCH_SIZE,
            steps=max(2, round(STEPS_PER_MINUTE[stage.name] * minutes)),
        )
        for stage in config.stages
    ]
    # So short a stage must not undo with a high rate what align has just learnt.
    vision = stages[1]
    vision.learning_rates = vision.learning_rates | {"connector": 1e-3}
    return replace(
        config,
        stages=stages,
        data_dir=out_dir / "train_world",
        out_dir=out_dir / "train",
        feature_cache_dir=out_dir / "features",
        loop=replace(config.loop, gradient_accumulation=2, log_every=2),
    )


def read_losses(run_dir: Path) -> Curves:
    """Read each stage's losses from a run's log."""
    losses: Curves = {}
    for line in read_log(run_dir):
        steps, values = losses.setdefault(line["stage"], ([], []))
        steps.append(line["step"])
        values.append(line["loss"])
    return losses


def start_and_end(losses: Sequence[float]) -> str:
    """The mean loss of the first and of the last tenth of a stage: single steps are noisy."""
    count = max(1, len(losses) // 10)
    return f"{np.mean(losses[:count]):.2f} -> {np.mean(losses[-count:]):.2f}"


def verdict(score: Score) -> str:
    """Say whether an accuracy is above chance, in so many words."""
    is_above = score.low > score.chance
    judgement = "above chance" if is_above else "not above chance yet, try more --minutes"
    return (
        f"{format_score(score)} per cent right with 95 % interval, chance is "
        f"{100 * score.chance:.0f}: {judgement}"
    )


# ---- the report


def demo_page(shown: Sequence[Shown], shipped: Tables, trained: Tables, losses: Curves) -> str:
    """Write the report as one HTML page."""
    num_questions = shipped["overall"]["all"]["video"].num_questions
    sections = [
        report.paragraph("Videos of the micro world that no model has seen, made for this page."),
        report.heading("What the shipped model saw, and what it said"),
        *[shown_section(item) for item in shown],
        report.heading(f"The shipped model on {num_questions} questions"),
        report.paragraph(report.LEGEND),
        report.score_table("class", shipped["class"] | shipped["overall"]),
        report.score_table("family", shipped["family"]),
        report.heading("A few minutes of training from the shipped parts"),
        report.curves(losses, unit="loss"),
        report.paragraph(verdict(trained["overall"]["all"]["video"]) + "."),
        report.score_table("class", trained["class"] | trained["overall"]),
    ]
    return report.page("Apollo demo", *sections)


def shown_section(item: Shown) -> Markup:
    """A question with its options, the answer, and the frames that the model was shown."""
    options = ", ".join(item.question.options)
    answer = report.mark(item.said, item.correct)
    said = Markup("<p>{}<br>The truth: {}</p>").format(answer, item.truth)
    return (
        report.paragraph(f"{item.question.question} ({options})")
        + said
        + report.frame_strip(item.clips.frames, item.clips.times_s)
    )
