"""Evaluating with what is shared read once, against each question by itself.

    python benchmarks/eval.py                 # both models, about ten minutes on two cores
    python benchmarks/eval.py --model micro   # the shipped model alone

The usual way: for each question the video is decoded and encoded, prompt and video are read, and
an answer as long as the right one is generated, one question at a time. Ours: `apollo.eval.local`,
which decodes and encodes a video once, lets the LLM read it once, scores the questions' options in
batches, and decodes the next video meanwhile, as the runner does. Both answer questions of a micro
world in turns, after a warm-up (the usual way three a video, for one costs as much as the next);
the ratio is the median of the rounds' ratios of seconds per question. The larger model has random
weights: a SigLIP-base image encoder (about 90 M parameters) and an LLM of SmolLM-135M's shape, with
the micro tokenizer. Writes benchmarks/results/eval.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config
from transformers.utils import logging

from apollo.chat import find_model
from apollo.eval.local import ApolloAnswerer
from apollo.eval.prompts import question_text
from apollo.eval.questions import Question, read_jsonl
from apollo.media import load_video
from apollo.model import ApolloConfig, ApolloForConditionalGeneration, ApolloProcessor
from apollo.model.processing import END_OF_TURN
from apollo.runtime import environment, set_seed
from apollo.world.make import make_world

RESULTS = Path(__file__).parent / "results"
SIGLIP_BASE: dict[str, Any] = {  # config.json of google/siglip-base-patch16-224
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
SMOLLM_135M: dict[str, Any] = {  # config.json of HuggingFaceTB/SmolLM-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
QUESTIONS_PER_VIDEO = (3, 10)
NUM_USUAL = 3
"""Questions per video that are asked in the usual way: one costs as much as the next."""
SCORINGS = {"micro": ("letter", "option"), "larger": ("letter",)}


def make_larger(folder: Path) -> Path:
    """Save a model with random weights whose parts have the sizes of real small ones."""
    processor = ApolloProcessor.from_pretrained(find_model("micro"))
    tokenizer = processor.tokenizer
    ids = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_token|>")
        for kind in ("image", "video")
    }
    llm = Qwen2Config(**SMOLLM_135M, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config = ApolloConfig(encoders=[SIGLIP_BASE], text_config=llm, tokens_per_clip=32, **ids)
    ApolloForConditionalGeneration(config).save_pretrained(folder)
    ApolloProcessor.from_config(config, tokenizer, max_clips=6).save_pretrained(folder)
    return folder


def read_questions(folder: Path, num_videos: int) -> list[list[Question]]:
    """Read a world's questions, ten a video: its five, and those with the options turned round."""
    by_video: dict[Path, list[Question]] = {}
    for question in read_jsonl(folder / "questions.jsonl"):
        by_video.setdefault(question.video, []).append(question)
    groups = []
    for questions in list(by_video.values())[:num_videos]:
        turned = [
            replace(q, options=q.options[::-1], answer=len(q.options) - 1 - q.answer)
            for q in questions
        ]
        groups.append([*questions, *turned])
        assert len(groups[-1]) == max(QUESTIONS_PER_VIDEO), "the world asks five questions a video"
    return groups


def usual(answerer: ApolloAnswerer, groups: Sequence[list[Question]]) -> None:
    """Decode, encode and generate for each question by itself."""
    model, processor = answerer.model, answerer.processor
    for question in (question for group in groups for question in group):
        clips = load_video(question.video, processor)
        text = question_text(question, answerer.scoring)
        content = [{"type": "video", "video": clips}, {"type": "text", "text": text}]
        batch = processor([{"role": "user", "content": content}], add_generation_prompt=True)
        right = "A" if answerer.scoring == "letter" else question.options[question.answer]
        num_tokens = len(processor.tokenizer(right + END_OF_TURN)["input_ids"])
        model.generate(  # type: ignore[misc]
            **batch.to(model.device),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )


def ours(answerer: ApolloAnswerer, groups: Sequence[list[Question]]) -> None:
    """Answer a video's questions together, and decode the next video meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(answerer.watch, groups[0][0], "video")
        for index, group in enumerate(groups):
            seen = watched.result()
            if index + 1 < len(groups):
                watched = pool.submit(answerer.watch, groups[index + 1][0], "video")
            answerer.answer(group, "video", seen)


WAYS = {"usual": usual, "ours": ours}


def compare(
    answerer: ApolloAnswerer, groups: Sequence[list[Question]], rounds: int
) -> dict[str, Any]:
    """Time both ways in turns.

    Returns:
        Medians of the seconds per question and of the rounds' ratios.
    """
    asked = {"usual": [group[:NUM_USUAL] for group in groups], "ours": groups}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        WAYS[way](answerer, [groups[0][:2]])  # warm-up
    for number in range(rounds):
        order = list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]
        for way in order:
            started = time.perf_counter()
            WAYS[way](answerer, asked[way])
            spent_s = time.perf_counter() - started
            seconds[way].append(spent_s / sum(map(len, asked[way])))
    ratios = [u / o for u, o in zip(seconds["usual"], seconds["ours"], strict=True)]
    return {
        "num_videos": len(groups),
        "num_questions": sum(map(len, groups)),
        **{f"{way}_s_per_question": round(statistics.median(seconds[way]), 4) for way in WAYS},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }


def measure(model: str, folder: Path, groups: list[list[Question]], rounds: int) -> dict[str, Any]:
    """Compare the two ways for one model and each of its `SCORINGS`."""
    found: dict[str, Any] = {}
    for scoring in SCORINGS[model]:
        answerer = ApolloAnswerer(folder, scoring=scoring)
        parts = answerer.model.parts().items()
        found["parameters"] = {
            name: sum(p.numel() for p in part.parameters()) for name, part in parts
        }
        for number in QUESTIONS_PER_VIDEO:
            chosen = [group[:number] for group in groups]
            result = compare(answerer, chosen, rounds)
            found[f"{scoring}, {number} questions per video"] = result
            print(model, scoring, number, result, flush=True)
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("micro", "larger", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-videos", type=int, default=12, help="for the micro model")
    parser.add_argument("--larger-num-videos", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="that compute; decoding has its own")
    options = parser.parse_args()
    logging.disable_progress_bar()
    set_seed(0)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary) / "world"
        make_world(world, options.num_videos, seed=5, split="test")
        if options.model != "larger":
            groups = read_questions(world, options.num_videos)
            result["micro"] = measure("micro", Path(find_model("micro")), groups, options.rounds)
        if options.model != "micro":
            groups = read_questions(world, options.larger_num_videos)
            folder = make_larger(Path(temporary) / "larger")
            result["larger"] = measure("larger", folder, groups, options.rounds)
    result["environment"] = environment()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "eval.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
