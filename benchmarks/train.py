"""Packing on the micro recipe's SFT mixture, and the feature cache on its and the first stage's.

    python benchmarks/train.py [--num-videos 60] [--steps 8] [--threads 1]

Makes a small world and joins the shipped parts by a new connector. The same optimiser steps (same
records, same loss) are then taken in four ways, in turn, a different one first each time:

- padded: what is usual; batches of the records in the mixture's order, padded to their longest
- padded, whole step: the same without accumulation
- sorted: our padded mode, records of like length in a batch
- packed: one row for each batch

Useful tokens are those that are no padding. A step is forward, backward, clipping and the Muon
update, from cached features; "with loading" adds the making of its batches in the same process,
which training does meanwhile in a worker. Ratios are paired by step; medians; CPU time, too, for
machines that are shared. Part of the gain of packing is that the head runs on supervised tokens
alone, which only packed rows do.

The second part takes steps of a stage as two epochs: the first decodes and encodes every video and
image before, the second finds the features in the cache. What that gains depends on what else a
step costs. So it is measured for both stages with frozen encoders, alignment, where the connector
alone is trained, and SFT; and, on a step of the same SFT mixture, for a model with random weights
that is made in the paper's proportions: the micro encoders are far cheaper beside their LLM than
the paper's are. Writes benchmarks/results/train.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apollo.data.collate import BatchMaker, fill_cache
from apollo.data.features import FeatureCache, fingerprint
from apollo.data.mixture import Mixture
from apollo.data.readers import open_sources
from apollo.media import sampling_of
from apollo.model import ApolloConfig, ApolloForConditionalGeneration, ApolloProcessor
from apollo.model.segments import use_packed_attention
from apollo.runtime import environment, keep_freed_memory
from apollo.train.joining import join_parts
from apollo.train.optim import build_optimizer
from apollo.train.recipes import Stage, TrainConfig, micro
from apollo.train.short_attention import short_attention
from apollo.train.trainer import count_items, count_tokens
from apollo.world.make import make_world

RESULT = Path(__file__).parent / "results" / "train.json"
USUAL, WHOLE, SORTED, PACKED = "padded", "padded, whole step", "sorted", "packed"
Model = tuple[ApolloForConditionalGeneration, ApolloProcessor]


def micro_model(config: TrainConfig, stage: Stage) -> Model:
    """Join the micro recipe's parts."""
    return join_parts(config.model, stage.max_clips)


def larger_model(config: TrainConfig, stage: Stage) -> Model:
    """Make a model with random weights in the proportions of Apollo-1.5B: encoders as large as the
    LLM, 25 patches for each of its tokens (the paper's: 31).
    """
    small, processor = micro_model(config, stage)
    base = {"num_hidden_layers": 12, "num_attention_heads": 12}
    siglip = {"hidden_size": 768, "intermediate_size": 3072, "image_size": 224, "patch_size": 16}
    video = {"d_model": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4, "init_values": 0.1}
    llm = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": len(processor.tokenizer),
        "tie_word_embeddings": True,
    }
    shape = ApolloConfig(
        encoders=[
            {"model_type": "siglip_vision_model", **base, **siglip},
            {"model_type": "internvideo2", **video},
        ],
        text_config=llm,
        tokens_per_clip=64,
        image_token_id=small.config.image_token_id,
        video_token_id=small.config.video_token_id,
    )
    model = ApolloForConditionalGeneration(shape)
    return model, ApolloProcessor.from_config(shape, processor.tokenizer, stage.max_clips)


class Bench:
    """A stage: the model, its optimiser and the batches of a step in each way.

    Args:
        folder: Where the world is and the cache will be.
        stage_name: A stage of the micro recipe.
        num_steps: Steps of the mixture.
        make_model: What is trained.
        changes: Settings of the stage that are not the recipe's.
    """

    def __init__(
        self,
        folder: Path,
        stage_name: str,
        num_steps: int,
        make_model: Callable[[TrainConfig, Stage], Model] = micro_model,
        **changes: Any,
    ) -> None:
        config = micro()
        (stage,) = (stage for stage in config.stages if stage.name == stage_name)
        stage = replace(stage, **changes)
        self.model, processor = make_model(config, stage)
        self.model.train()
        for name, part in self.model.parts().items():
            part.requires_grad_(stage.learning_rates[name] > 0).train(
                stage.learning_rates[name] > 0
            )
        use_packed_attention(self.model.model.llm)
        self.optimizer = build_optimizer(
            self.model.parts(), stage.learning_rates, stage.weight_decay, stage.optimizer
        )
        sources = open_sources(stage.sources, folder / "world")
        mixture = Mixture(
            [len(source.records) for source in sources],
            [source.weight for source in sources],
            num_steps * stage.batch_size,
            seed=0,
        )
        self.num_steps = num_steps
        self.pieces = config.loop.gradient_accumulation
        self.cache = FeatureCache(
            folder / "features", {"encoders": fingerprint(self.model.parts()["encoders"])}
        )
        self.sampling = replace(sampling_of(processor), max_clips=stage.max_clips)

        def maker(pieces_of_one_step: int, batches: int, packed: bool = False) -> BatchMaker:
            return BatchMaker(
                [source.records for source in sources],
                mixture,
                processor,
                batch_size=stage.batch_size // batches,
                sampling=self.sampling,
                max_tokens=self.model.model.llm.config.max_position_embeddings,
                cache=self.cache,
                batches_per_step=pieces_of_one_step,
                packed=packed,
            )

        # A maker that believes each batch to be a step keeps the mixture's order.
        self.makers = {
            USUAL: (maker(1, self.pieces), self.pieces),
            WHOLE: (maker(1, 1), 1),
            SORTED: (maker(self.pieces, self.pieces), self.pieces),
            PACKED: (maker(self.pieces, self.pieces, packed=True), self.pieces),
        }

    def batches(self, way: str, step: int) -> list[dict[str, Any]]:
        """Make the batches of a step."""
        maker, pieces = self.makers[way]
        return [maker(step * pieces + piece) for piece in range(pieces)]

    def step(self, batches: list[dict[str, Any]]) -> float:
        """Take a step; returns its loss."""
        num_items = sum(map(count_items, batches))
        loss = 0.0
        with short_attention():
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    output = self.model(**batch, num_items_in_batch=num_items)
                output.loss.backward()
                loss += output.loss.item()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def fill(self) -> int:
        """Encode what the steps will show; returns how many files."""
        maker, _ = self.makers[PACKED]
        drawn = {maker.mixture[i] for i in range(len(maker.mixture))}
        records = [maker.sources[source][place] for source, place in sorted(drawn)]

        @torch.no_grad()
        def encode(pixel_values: list[torch.Tensor]) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16), short_attention():
                return self.model.encode(pixel_values)

        return fill_cache(self.cache, records, self.sampling, maker.processor, encode)


def measure_ways(bench: Bench) -> dict[str, Any]:
    """Take each step in each way and compare them step by step."""
    ways = list(bench.makers)
    step_s: dict[str, list[float]] = {way: [] for way in ways}
    load_s: dict[str, list[float]] = {way: [] for way in ways}
    cpu_s: dict[str, list[float]] = {way: [] for way in ways}
    fed = dict.fromkeys(ways, 0)
    useful = []
    weights = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    apart = 0.0
    for number in range(-1, bench.num_steps):  # the first is a warm-up
        first = number % len(ways)
        losses = []
        for way in ways[first:] + ways[:first]:
            started = time.perf_counter()
            batches = bench.batches(way, max(number, 0))
            loaded, cpu_loaded = time.perf_counter(), time.process_time()
            losses.append(bench.step(batches))
            finished, cpu_finished = time.perf_counter(), time.process_time()
            bench.model.load_state_dict(weights)  # all ways start from the same model
            if number < 0:
                continue
            load_s[way].append(loaded - started)
            step_s[way].append(finished - loaded)
            cpu_s[way].append(cpu_finished - cpu_loaded)
            fed[way] += sum(batch["input_ids"].numel() for batch in batches)
        apart = max(apart, max(losses) - min(losses))
        if number >= 0:
            useful.append(sum(map(count_tokens, batches)))

    def faster(way: str, *seconds: dict[str, list[float]]) -> float:
        """How many times as long a way takes as packing, step by step."""
        one, other = ([sum(both) for both in zip(*(s[w] for s in seconds), strict=True)]
                      for w in (way, PACKED))  # fmt: skip
        return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 2)

    return {
        "ways": {
            way: {
                "useful_tokens_per_s": round(
                    statistics.median(n / s for n, s in zip(useful, step_s[way], strict=True))
                ),
                "with_loading": round(
                    statistics.median(
                        n / (s + load)
                        for n, s, load in zip(useful, step_s[way], load_s[way], strict=True)
                    )
                ),
                "padding": round(1 - sum(useful) / fed[way], 3),
                "packed_is_faster_by": faster(way, step_s),
                "packed_is_faster_by_in_cpu_time": faster(way, cpu_s),
                "packed_is_faster_by_with_loading": faster(way, step_s, load_s),
            }
            for way in ways
        },
        "useful_tokens_per_step": round(statistics.mean(useful)),
        "largest_difference_of_losses": apart,
        "connector_share_of_packed_step": round(connector_share(bench), 2),
    }


def connector_share(bench: Bench) -> float:
    """How much of a packed step the connector takes, which has no padding to lose."""
    shares = []
    for number in range(min(bench.num_steps, 4)):
        batches = bench.batches(PACKED, number)
        started = time.perf_counter()
        bench.step(batches)
        whole_s = time.perf_counter() - started
        started = time.perf_counter()
        for batch in batches:
            if "clip_features" in batch:
                with short_attention(), torch.autocast("cpu", torch.bfloat16):
                    tokens = bench.model.connect(batch["clip_features"])
                    tokens.float().sum().backward()
        shares.append((time.perf_counter() - started) / whole_s)
        bench.optimizer.zero_grad()
    return statistics.median(shares)


def measure_cache(bench: Bench) -> dict[str, Any]:
    """Take the packed steps as two epochs, the cache being empty before the first."""
    for path in bench.cache.folder.glob("*/*"):
        path.unlink()
    started = time.perf_counter()
    num_files = bench.fill()
    filled_s = time.perf_counter() - started
    epochs_s = []
    for _ in range(2):
        started = time.perf_counter()
        bench.fill()  # the second epoch looks whether all is there, too
        for number in range(bench.num_steps):
            bench.step(bench.batches(PACKED, number))
        epochs_s.append(time.perf_counter() - started)
    first_s = filled_s + epochs_s[0]
    return {
        "first_epoch_s": round(first_s, 1),
        "of_this_decode_and_encode_s": round(filled_s, 1),
        "second_epoch_s": round(epochs_s[1], 1),
        "second_is_faster_by": round(first_s / epochs_s[1], 2),
        "records": len(bench.makers[PACKED][0].mixture),
        "files_encoded": num_files,
        "cache": str(bench.cache.size()),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-videos", type=int, default=60)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder / "world", args.num_videos, seed=0)
        bench = Bench(folder, "sft", args.steps)
        bench.fill()
        packing = measure_ways(bench)
        print(json.dumps(packing, indent=1), flush=True)
        cache = {"sft": measure_cache(bench)}
        cache["align"] = measure_cache(Bench(folder, "align", args.steps))
        cache["sft, larger model"] = measure_cache(
            # AdamW as in the paper's recipes: a step of Muon costs as much as some thousand tokens.
            Bench(folder, "sft", 1, larger_model, batch_size=8, optimizer="adamw")
        )
    result = {
        "packing": packing,
        "feature_cache": cache,
        "settings": vars(args),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
