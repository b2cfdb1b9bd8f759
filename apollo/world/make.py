"""`apollo world make`: a folder of videos with everything that training and evaluation need.

    videos/*.mp4  images/*.png           what is seen
    scenes.jsonl  world.json             what is true, and how it was made
    questions.jsonl                      balanced multiple-choice questions, for evaluation
    captions_image.jsonl captions_video.jsonl text.jsonl image.jsonl multi_image.jsonl video.jsonl
                                         conversations, for training: the paper's four data types

Every file depends on (seed, split, number of videos) alone, not on the number of processes.
Read first: `scene.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apollo.runtime import num_available_cores, progress
from apollo.world import corpus, drills, language
from apollo.world.listing import everything
from apollo.world.questions import FAMILIES, Question, ask_all
from apollo.world.render import frame, write_video
from apollo.world.scene import SPLITS, make_scene

VERSION = 6
"""Of the world's rules; a change of scenes, pixels or words raises it."""
IMAGES_PER_VIDEO = 2
QUESTIONS_PER_VIDEO = 5
CONVERSATIONS_PER_VIDEO = 2
ASIDE = 2**41
"""Added to a scene's number: its companion in multi-image records."""
CAPTION_CLIPS = 8
"""Videos of up to so many clips (16 s) are captioned; longer ones would make rows that are mostly
captions."""
NEEDS_SHARE = {"frames": 0.85, "frame": 0.10, "text": 0.05}
"""Share of the questions that need several frames; that one frame answers; that the text alone
answers (planted)."""
RECORD_FILES = ("captions_image", "captions_video", "text", "image", "multi_image", "video")


def make_world(
    out_dir: str | Path,
    num_videos: int,
    seed: int,
    split: str = "train",
    workers: int | None = None,
) -> Counter[str]:
    """Write a world.

    Args:
        out_dir: Folder, new or empty.
        num_videos: Scenes 0 to num_videos - 1 of the split.
        seed: Seed of the world.
        split: "train" or "test"; no scene is in both.
        workers: Processes; one per core by default.

    Returns:
        How many questions each family has.

    Raises:
        ValueError: The folder holds something, or the split is unknown.
    """
    out_dir = Path(out_dir)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} is not empty; name a new folder or remove it")
    for name in ("videos", "images"):
        (out_dir / name).mkdir(parents=True)
    work = functools.partial(_make_one, out_dir, seed, split)
    chooser = _Chooser(np.random.default_rng([seed, SPLITS[split], 21]))
    files = {
        name: (out_dir / f"{name}.jsonl").open("w")
        for name in (*RECORD_FILES, "scenes", "questions")
    }
    # The processes are forked, and a video decoder's threads do not live on in a fork: a process
    # that collects a decoder among its garbage would wait for those threads for ever.
    gc.collect()
    try:
        with ProcessPoolExecutor(workers or num_available_cores()) as pool:
            made = pool.map(work, range(num_videos), chunksize=8)
            for number, (lines, questions) in enumerate(
                progress(made, "making videos", num_videos)
            ):
                for name, records in lines.items():
                    _write(files[name], records)
                _write(files["questions"], chooser.choose(number, lines["scenes"][0], questions))
    finally:
        for file in files.values():
            file.close()
    counts = chooser.counts
    about = {
        "version": VERSION,
        "seed": seed,
        "split": split,
        "num_videos": num_videos,
        "questions": dict(counts),
    }
    (out_dir / "world.json").write_text(json.dumps(about, indent=1) + "\n")
    return counts


def _write(file: Any, records: Iterable[dict]) -> None:
    file.writelines(json.dumps(record) + "\n" for record in records)


def _make_one(
    out_dir: Path, seed: int, split: str, index: int
) -> tuple[dict[str, list[dict]], list[Question]]:
    """Write one scene's video and pictures; return its records by file and its questions."""
    scene = make_scene(seed, index, split)
    rng = np.random.default_rng([seed, SPLITS[split], index, 1])
    video = f"videos/{index:06d}.mp4"
    write_video(scene, out_dir / video)
    spans = language.clip_spans(scene.duration_s)
    questions = ask_all(scene, rng)
    header = [{"type": "video", "video": video}]
    pictures, shown = [], []
    # The last picture is of a scene that no video shows, beside the others.
    for number in range(IMAGES_PER_VIDEO + 1):
        pictured = scene if number < IMAGES_PER_VIDEO else make_scene(seed, index + ASIDE, split)
        t = corpus.telling_time(pictured, rng)
        path = f"images/{index:06d}_{number}.png"
        Image.fromarray(frame(pictured, t)).save(out_dir / path)
        pictures.append((pictured, t))
        shown.append({"type": "image", "image": path})
    order = [int(i) for i in rng.permutation(len(pictures))[: int(rng.integers(2, 4))]]
    conversations: dict[str, list[list]] = {
        "video": [
            corpus.about_video(
                scene,
                ask_all(scene, rng),
                rng,
                header,
                spans,
                max_turns=10,
                requests=everything(scene, spans, rng),
                request_share=0.35,
            )
            for _ in range(CONVERSATIONS_PER_VIDEO)
        ],
        "captions_video": [],
        "image": [
            corpus.about_image(s, t, rng, [part])
            for (s, t), part in zip(pictures, shown, strict=True)
        ],
        "captions_image": [
            corpus.caption_of_image(s, t, [part])
            for (s, t), part in zip(pictures, shown, strict=True)
        ],
        "multi_image": [
            corpus.about_images([pictures[i] for i in order], rng, [shown[i] for i in order])
        ],
        "text": [(corpus.text_sample, drills.scene_drill)[index % 2](seed, index, split)],
    }
    if len(spans) <= CAPTION_CLIPS:
        requests = everything(scene, spans, rng)
        conversations["captions_video"] = [
            corpus.captions_of_video(scene, rng, header, spans, requests)
        ]
    lines: dict[str, list[dict]] = {
        name: [
            {
                "id": f"{name}-{index:06d}-{n}",
                "type": name.removeprefix("captions_"),
                "messages": messages,
            }
            for n, messages in enumerate(conversations[name])
        ]
        for name in RECORD_FILES
    }
    lines["scenes"] = [{"video": video, "split": split, **dataclasses.asdict(scene)}]
    return lines, questions


class _Chooser:
    """Chooses questions so that families, and the place of the right option, stay balanced."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.counts = rng, Counter({family: 0 for family in FAMILIES})
        self.right: Counter[tuple[str, ...]] = Counter()
        self.offered: Counter[tuple[str, ...]] = Counter()
        self.places: dict[str, np.ndarray] = {}
        sizes = Counter(info.needs for info in FAMILIES.values())
        self.weights = {
            f: NEEDS_SHARE[info.needs] / sizes[info.needs] for f, info in FAMILIES.items()
        }

    def is_common(self, question: Question) -> bool:
        """Whether options like the answer are so often right that they are a good guess."""
        mine = question.kind(question.answer)
        kinds = [kind for kind in self.right if kind[0] == question.family]
        asked = sum(self.right[kind] for kind in kinds)
        offered = sum(self.offered[kind] for kind in kinds)
        return self.right[mine] > 2 + 1.2 * asked * self.offered[mine] / max(offered, 1)

    def choose(self, number: int, scene: dict, questions: list[Question]) -> list[dict]:
        """The rows of questions.jsonl for one video: those whose families are furthest behind."""
        questions = [q for q in questions if not self.is_common(q)]
        behind = sorted(questions, key=lambda q: self.counts[q.family] / self.weights[q.family])
        rows = []
        for question in behind[:QUESTIONS_PER_VIDEO]:
            count = self.counts[question.family]
            # The right option stands once at each place in four questions of a family.
            if count % 4 == 0:
                self.places[question.family] = self.rng.permutation(4)
            position = int(self.places[question.family][count % 4])
            self.counts[question.family] += 1
            self.right[question.kind(question.answer)] += 1
            self.offered.update(question.kind(option) for option in question.options(position))
            info = FAMILIES[question.family]
            rows.append(
                {
                    "question_id": f"{scene['split']}-{number:06d}-{question.family}",
                    "video": scene["video"],
                    "question": question.question,
                    "options": question.options(position),
                    "answer": position,
                    "class": info.question_class,
                    "family": question.family,
                    "needs": info.needs,
                    "duration_s": scene["duration_s"],
                    "scene": number,
                    "query": question.query,
                }
            )
        return rows


def main(args: argparse.Namespace) -> int:
    """Run `apollo world make`.

    Args:
        args: out, num_videos, seed, workers, split.
    """
    counts = make_world(args.out, args.num_videos, args.seed, args.split, args.workers)
    questions = f"{sum(counts.values())} questions of {len(+counts)} families"
    print(f"{args.out}: {args.num_videos} videos, {questions}")
    return 0
