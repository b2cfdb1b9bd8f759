"""Make a small data set of "own videos": 20 to train on, 8 to test, with answers nobody can know.

Each video shows one moving shape of the micro world. Its colour says which team it plays for, and
the names of the teams are invented, so that a model must be trained to answer. The files are what
`apollo train finetune` and `apollo eval` read:

    OUT/videos/*.mp4    OUT/train.jsonl (messages)    OUT/questions.jsonl (held-out videos)

Usage: python scripts/make_my_videos.py OUT [--num-train 20] [--num-test 8] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from apollo.world.render import write_video
from apollo.world.scene import GROUNDS, SHAPES, Scene, Thing

TEAMS = {"red": "fox", "green": "owl", "blue": "bee", "yellow": "cat"}
QUESTION = "Which team is this?"
DURATION_S = 4.0


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-train", type=int, default=20)
    parser.add_argument("--num-test", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_videos(args.out, args.num_train, args.num_test, args.seed)
    print(f"{args.out}: {args.num_train} videos to train on, {args.num_test} to test")


def make_videos(out_dir: Path, num_train: int, num_test: int, seed: int) -> None:
    """Write videos, training records and questions about the held-out videos."""
    (out_dir / "videos").mkdir(parents=True)
    colours = list(TEAMS)
    records, questions = [], []
    for index in range(num_train + num_test):
        colour = colours[index % len(colours)]
        video = f"videos/{index:03d}.mp4"
        write_video(make_scene(colour, seed, index), out_dir / video)
        if index < num_train:
            records.append(record(index, video, TEAMS[colour]))
        else:
            questions.append(question(index, video, TEAMS[colour]))
    for name, rows in (("train", records), ("questions", questions)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out_dir / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def make_scene(colour: str, seed: int, index: int) -> Scene:
    """One shape that goes from one place to another."""
    rng = np.random.default_rng([seed, index])
    start, end = rng.uniform(0.2, 0.8, (2, 2))
    shape = Thing(
        id=0,
        kind="shape",
        name=str(rng.choice(SHAPES)),
        colour=colour,
        size=str(rng.choice(["small", "big"])),
        visible=[[0.0, DURATION_S]],
        position=[[0.0, *map(float, start)], [DURATION_S, *map(float, end)]],
    )
    return Scene(
        index=index,
        seed=seed,
        genre="stage",
        duration_s=DURATION_S,
        source_fps=12.0,
        variable_rate=False,
        beat_s=2.0,
        phase_s=0.0,
        ground=str(rng.choice(list(GROUNDS))),
        specks=0,
        things=[shape],
        events=[],
        camera=[[0.0, 0.0, 0.0]],
    )


def record(index: int, video: str, team: str) -> dict:
    """A training record: one question and its answer, the video's path relative to the file."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": team}]
    return {"id": f"team-{index:03d}", "type": "video", "messages": messages}


def question(index: int, video: str, team: str) -> dict:
    """The same as a question with options, for `apollo eval`."""
    options = sorted(TEAMS.values())
    return {
        "question_id": f"team-{index:03d}",
        "video": video,
        "question": QUESTION,
        "options": options,
        "answer": options.index(team),
        "class": "perception",
        "family": "team",
        "needs": "frame",
        "duration_s": DURATION_S,
    }


if __name__ == "__main__":
    main()
