"""What the language models answer from transcripts of held-out scenes, size by size.

    python benchmarks/ladder.py [--per-family 60]

A video model cannot reach more than its LLM does when everything seen is written down for it. The
questions need frames; each is asked of a full transcript, with four options, whose likeliest is the
answer. Intervals are bootstraps over the questions of each family. Writes
benchmarks/results/ladder.json and prints its table.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from apollo.runtime import environment
from apollo.train.joining import load_tokenizer
from apollo.train.llm_part import TranscriptQuestion, option_scores, transcript_questions
from apollo.train.recipes import PARTS_DIR

RESULT = Path(__file__).parent / "results" / "ladder.json"
NUM_DRAWS = 2000


def right_by_family(folder: Path, questions: list[TranscriptQuestion]) -> dict[str, np.ndarray]:
    """Whether each question of each family is answered rightly."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right: dict[str, list[bool]] = {}
    for question in questions:
        scores = option_scores(model, question.prompt, question.options)
        right.setdefault(question.family, []).append(int(scores.argmax()) == question.answer)
    return {family: np.array(each) for family, each in sorted(right.items())}


def macro(right: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over the families, with its interval of 95 %."""
    rng = np.random.default_rng(0)
    draws = np.mean(
        [rng.choice(each, (NUM_DRAWS, len(each))).mean(1) for each in right.values()], axis=0
    )
    low, high = np.quantile(draws, (0.025, 0.975))
    mean = np.mean([each.mean() for each in right.values()])
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=["llm-0.3m", "llm-1m", "llm-4m", "llm-9m"])
    parser.add_argument("--per-family", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    folders = [PARTS_DIR / name for name in args.names]
    tokenizer = load_tokenizer(str(folders[0]))
    questions = transcript_questions(tokenizer, 0, args.per_family)
    found = {}
    with torch.inference_mode():
        for name, folder in zip(args.names, folders, strict=True):
            right = right_by_family(folder, questions)
            families = {family: round(float(each.mean()), 3) for family, each in right.items()}
            found[name] = {"macro": macro(right), "families": families}
            print(name, found[name]["macro"], flush=True)
    result = {
        "models": found,
        "num_questions": len(questions),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("| family |", " | ".join(found), "|")
    for family in next(iter(found.values()))["families"]:
        cells = (f"{100 * each['families'][family]:.0f}" for each in found.values())
        print(f"| {family} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
