"""From a recipe to a run directory: `apollo train`.

`train` is the middle of three hops, command -> train -> run_stage. It joins the parts, gives each
stage its batches, and leaves behind config.yaml (replays the run), log.jsonl, curves.png,
checkpoints and model/. Read next: `recipes.py` for the values, `trainer.py` for the loop.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from torch import nn

from apollo.config import (
    ConfigError,
    apply_overrides,
    config_hash,
    load_config,
    save_config,
    to_yaml,
)
from apollo.data.collate import BatchMaker, fill_cache
from apollo.data.features import FeatureCache, fingerprint
from apollo.data.mixture import Mixture
from apollo.data.readers import OpenSource, count_types, open_sources
from apollo.media import sampling_of
from apollo.model.modeling import ApolloForConditionalGeneration
from apollo.model.processing import ApolloProcessor
from apollo.model.segments import use_packed_attention
from apollo.runtime import make_run_dir, progress, set_seed
from apollo.train.checkpoint import latest_checkpoint
from apollo.train.joining import join_parts
from apollo.train.lora import add_lora, merge_lora, save_lora
from apollo.train.optim import check_learning_rates
from apollo.train.recipes import RECIPES, Stage, TrainConfig
from apollo.train.scale import join_processes
from apollo.train.short_attention import short_attention
from apollo.train.trainer import AUTOCAST, LoopSettings, run_stage
from apollo.video import GuardedLoader

OnEval = Callable[[nn.Module, int], dict[str, float]]


def main(args: argparse.Namespace) -> int:
    """Run `apollo train`.

    Args:
        args: recipe (name or None), config (a config.yaml or None), set (overrides), out (folder or
            None), print_config, resume.
    """
    config = resolve_config(args)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    model_dir = train(config, resume=args.resume)
    Console(stderr=True).print(f"trained model: {model_dir}")
    return 0


def train(config: TrainConfig, resume: bool = False, on_eval: OnEval | None = None) -> Path:
    """Train all stages of a recipe.

    Args:
        config: What to train.
        resume: Go on in a folder where the same config was stopped.
        on_eval: See `run_stage`.

    Returns:
        The folder of the finished model, with its processor.

    Raises:
        ValueError: A setting, a part or a record that cannot be used.
    """
    process = join_processes()
    if not config.stages:
        raise ValueError("there are no stages to train")
    sources = [_read_sources(stage, config.data_dir) for stage in config.stages]
    set_seed(config.loop.seed)  # the new connector's weights
    model, processor = join_parts(config.model, config.stages[-1].max_clips)
    _check_lora(config)
    if config.lora:
        add_lora(model, config.lora)
    for stage in config.stages:  # now, rather than hours later when its turn comes
        check_learning_rates(model.parts(), stage.learning_rates)
        _size_of_batch(stage, config.loop, process.num_processes)
    if process.is_main_process:
        _prepare_run_dir(config, resume)
    process.wait_for_everyone()

    newest = latest_checkpoint(config.out_dir)
    if newest:
        newest.load_weights(model)
    first = newest.state.stage_index if newest else 0
    for index, stage in enumerate(config.stages[first:], start=first):
        batches = _make_batches(config, stage, sources[index], index, model, processor)
        run_stage(
            model,
            batches,
            stage,
            config.loop,
            config.out_dir,
            stage_index=index,
            resume=resume or index > first,
            on_eval=on_eval,
        )

    model_dir = config.out_dir / "model"
    if process.is_main_process:
        if config.lora:
            trained = {
                part for s in config.stages for part, rate in s.learning_rates.items() if rate
            }
            save_lora(model, config.out_dir / "adapter", sorted(trained - {"llm"}))
            merge_lora(model)
        model.save_pretrained(model_dir)
        processor.save_pretrained(model_dir)
        if config.feature_cache_dir:
            shutil.rmtree(_own_features(config, config.feature_cache_dir), ignore_errors=True)
    process.wait_for_everyone()
    return model_dir


# ---- the config of a run


def resolve_config(args: argparse.Namespace) -> TrainConfig:
    """Make the config from a recipe's name, a file, or the run that is to be resumed.

    Args:
        args: See `main`.

    Raises:
        ConfigError: None or several of them, a recipe that is not there, or a wrong setting.
    """
    if args.recipe and args.config:
        raise ConfigError("give a recipe or --config, not both")
    if args.recipe:
        if args.recipe not in RECIPES:
            nearest = difflib.get_close_matches(args.recipe, RECIPES, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(RECIPES)}"
            raise ConfigError(f"no recipe {args.recipe!r}; {hint}")
        config = RECIPES[args.recipe]()
    elif args.config:
        config = load_config(TrainConfig, args.config)
    elif args.resume and args.out:
        config = load_config(TrainConfig, Path(args.out) / "config.yaml")
    else:
        raise ConfigError("name a recipe (see `apollo list recipes`) or give --config FILE")
    config = apply_overrides(config, args.set or [])
    return replace(config, out_dir=Path(args.out)) if args.out else config


def _prepare_run_dir(config: TrainConfig, resume: bool) -> None:
    """Make the folder of the run and write its config; when resuming, the config must be the same.

    Raises:
        ValueError: The folder holds another run, or no run to resume.
    """
    path = config.out_dir / "config.yaml"
    if not resume:
        make_run_dir(config.out_dir)
        save_config(config, path)
        return
    if not path.is_file():
        raise ValueError(f"nothing to resume in {config.out_dir}: it has no config.yaml")
    earlier = replace(load_config(TrainConfig, path), out_dir=config.out_dir)
    # How the steps are taken may change, such as sharding; what they compute may not.
    loop = replace(
        config.loop, seed=earlier.loop.seed, mixed_precision=earlier.loop.mixed_precision
    )
    earlier = replace(earlier, loop=loop)
    if config_hash(earlier) != config_hash(config):
        raise ValueError(
            f"{path} is not the config given; resume it with --resume --out {config.out_dir} alone"
        )


def _check_lora(config: TrainConfig) -> None:
    if config.lora is None:
        return
    if not any(stage.learning_rates.get("llm") for stage in config.stages):
        raise ValueError(
            "lora is set but no stage trains the LLM: give llm a rate or set lora=null"
        )
    if config.lora.base != "float32" and config.loop.mixed_precision != "bf16":
        raise ValueError(
            f"lora.base {config.lora.base} needs loop.mixed_precision bf16, "
            f"not {config.loop.mixed_precision}"
        )
    if config.lora.base != "float32" and config.loop.sharding != "no":
        raise ValueError(
            f"lora.base {config.lora.base} cannot be sharded together with float32 matrices; "
            "set loop.sharding=no or lora.base=float32"
        )


# ---- the batches of a stage


def _read_sources(stage: Stage, data_dir: Path) -> list[OpenSource]:
    if not stage.sources:
        raise ValueError(f"stage {stage.name}: there are no sources")
    return open_sources(stage.sources, data_dir)


def _make_batches(
    config: TrainConfig,
    stage: Stage,
    sources: list[OpenSource],
    stage_index: int,
    model: ApolloForConditionalGeneration,
    processor: ApolloProcessor,
) -> BatchMaker:
    """Lay out the stage's mixture; encode its media beforehand if that is wanted and possible."""
    mixture = Mixture(
        sizes=[len(source.records) for source in sources],
        weights=[source.weight for source in sources],
        length=stage.steps * stage.batch_size,
        seed=config.loop.seed * 1_000 + stage_index,
    )
    process = PartialState()
    if process.is_main_process:
        _show_mixture(stage, sources, mixture)
    batches = BatchMaker(
        [source.records for source in sources],
        mixture,
        processor,
        batch_size=_size_of_batch(stage, config.loop, process.num_processes),
        sampling=replace(sampling_of(processor), max_clips=stage.max_clips),
        max_tokens=model.model.llm.config.max_position_embeddings,
        batches_per_step=config.loop.gradient_accumulation * process.num_processes,
        packed=stage.packing,
        load_video=GuardedLoader(config.video_time_limit_s).load,
        tokens_per_row=stage.tokens_per_row,
    )
    if stage.packing:
        use_packed_attention(model.model.llm)
    folder = config.feature_cache_dir
    if folder and not stage.learning_rates["encoders"]:
        if any(earlier.learning_rates["encoders"] for earlier in config.stages[:stage_index]):
            folder = _own_features(config, folder)
        batches.cache = _fill_cache(config, folder, batches, model, process)
    return batches


def _own_features(config: TrainConfig, folder: Path) -> Path:
    """Where features of encoders that this run has trained lie until it ends: no other has them."""
    return folder / "runs" / hashlib.sha256(str(config.out_dir.resolve()).encode()).hexdigest()[:16]


def _size_of_batch(stage: Stage, loop: LoopSettings, num_processes: int) -> int:
    pieces = loop.gradient_accumulation * num_processes
    if stage.batch_size % pieces:
        raise ValueError(
            f"stage {stage.name}: batch_size {stage.batch_size} must be a multiple of "
            f"gradient_accumulation {loop.gradient_accumulation} x {num_processes} processes"
        )
    return stage.batch_size // pieces


def _fill_cache(
    config: TrainConfig,
    folder: Path,
    batches: BatchMaker,
    model: ApolloForConditionalGeneration,
    process: PartialState,
) -> FeatureCache:
    """Encode what the stage will show and the cache does not hold yet."""
    settings = {
        "sampling": asdict(batches.sampling),
        "encoders": fingerprint(model.parts()["encoders"]),
        "squares": [asdict(square) for square in batches.processor.squares],
        "precision": config.loop.mixed_precision,
    }
    cache = FeatureCache(folder, settings)
    dtype = AUTOCAST[config.loop.mixed_precision]

    @torch.no_grad()
    def encode(pixel_values: list[torch.Tensor]) -> torch.Tensor:
        bfloat16 = torch.autocast(process.device.type, dtype, enabled=dtype is not None)
        with bfloat16, short_attention():
            return model.encode(pixel_values)

    drawn = {batches.mixture[i] for i in range(len(batches.mixture))}
    records = [batches.sources[source][place] for source, place in sorted(drawn)]
    if process.is_main_process:
        model.to(process.device).eval()
        num_new = fill_cache(
            cache,
            records,
            batches.sampling,
            batches.processor,
            encode,
            progress,
            batches.load_video,
        )
        Console(stderr=True).print(
            f"feature cache {cache.folder}: {num_new} videos and images encoded, {cache.size()}"
        )
    process.wait_for_everyone()
    return cache


def _show_mixture(stage: Stage, sources: list[OpenSource], mixture: Mixture) -> None:
    """Print what the stage will draw from each source, and of each type."""
    table = Table("source", "records", "drawn", "share", "passes", title=f"stage {stage.name}")
    for one, size, count in zip(sources, mixture.sizes, mixture.counts(), strict=True):
        share, passes = count / len(mixture), count / size
        table.add_row(str(one.source.path), f"{size}", f"{count}", f"{share:.1%}", f"{passes:.2f}")
    table.add_section()
    for type_, count in count_types(sources, mixture).items():
        table.add_row(type_, "", f"{count}", f"{count / len(mixture):.1%}", "")
    Console(stderr=True).print(table)
