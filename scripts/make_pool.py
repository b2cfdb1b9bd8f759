"""Train fourteen micro models that answer two pools of questions, for benchmarks/curation.py.

    python scripts/make_pool.py [NAME ...]

They differ in LLM, encoders, connector, in what learns, for how long, and in seeds. Models that
share parts share one training on captions, of which each is a branch; one more is the model that
ships. Conditions are the video, one frame and the text alone. What was answered goes into
benchmarks/pool, a small table for each pool and model; models that are there are left out, so that
run again after a stop, on any machine, it goes on where it was. Hours of one core. Names
make these models alone: two processes share the work if no trunk is in both.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from apollo.eval.scoring import read_predictions
from apollo.train.recipes import PARTS_DIR, ModelSettings, TrainConfig, micro
from apollo.train.run import train

RUNS, TABLES = Path("runs/pool"), Path("benchmarks/pool")
TRAIN_VIDEOS = 2000
VIDEOS = {2: 1750, 3: 400}
"""Seed of a pool -> its videos: some 8,600 and 2,000 questions."""
FIELDS = ("benchmark", "question_id", "video", "family", "needs", "duration_s", "condition",
          "num_options", "answer", "prediction")  # fmt: skip
IMAGE, VIDEO = (str(PARTS_DIR / name) for name in ("siglip", "internvideo2"))
MLP = replace(micro().model.connector, resampler="mlp_pool")
SHIPPED = "micro"
TRUNKS: dict[str, tuple[int, dict[str, Any]]] = {
    "0.3m": (600, {"llm": str(PARTS_DIR / "llm-0.3m")}),
    "1m": (600, {}),
    "1m_image": (400, {"encoders": [IMAGE]}),
    "1m_video": (400, {"encoders": [VIDEO]}),
    "1m_mlp": (400, {"connector": MLP}),
    "4m": (300, {"llm": str(PARTS_DIR / "llm-4m")}),
}
"""Trained on captions -> for how many steps, and what it has unlike the recipe `micro`."""
FROZEN_LLM = {"encoders": 0.0, "connector": 2e-3, "llm": 0.0}
BRANCHES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "micro_pictures": (SHIPPED, 200, {"kinds": ("text", "image", "multi_image")}),
    "micro_video": (SHIPPED, 200, {"kinds": ("video",)}),
    "micro_text": (SHIPPED, 200, {"kinds": ("text",)}),
    "micro_images": (SHIPPED, 400, {"kinds": ("image",)}),
    "0.3m": ("0.3m", 450, {}),
    "0.3m_few": ("0.3m", 150, {}),
    "0.3m_seed1": ("0.3m", 300, {"seed": 1}),
    "1m": ("1m", 450, {}),
    "1m_few": ("1m", 150, {}),
    "1m_connector": ("1m", 300, {"learning_rates": FROZEN_LLM}),
    "1m_image": ("1m_image", 300, {}),
    "1m_mlp": ("1m_mlp", 300, {}),
    "1m_video": ("1m_video", 300, {}),
    "4m": ("4m", 300, {}),
}
"""Model -> its trunk or the model that ships, steps on questions, and what else it has unlike the
recipe's last stage: `kinds` of data, and fields of the stage."""


def trunk(name: str) -> TrainConfig:
    """Captions of images and videos, encoders frozen: their features are kept and shared."""
    config, (steps, unlike) = micro(), TRUNKS[name]
    captions = replace(config.stages[0], steps=steps, packing=True)
    return replace(
        config,
        model=replace(config.model, **unlike),
        stages=[captions],
        loop=replace(config.loop, gradient_accumulation=1),
    )


def branch(name: str) -> TrainConfig:
    """Questions, on from a trunk or from the model that ships."""
    config, (start, steps, unlike) = micro(), BRANCHES[name]
    sft = config.stages[2]
    kinds, seed = unlike.get("kinds"), unlike.get("seed", 0)
    fields = {key: value for key, value in unlike.items() if key not in ("kinds", "seed")}
    sources = [source for source in sft.sources if not kinds or source.type in kinds]
    model = start if start == SHIPPED else str(RUNS / "trunks" / start / "model")
    return replace(
        config,
        model=ModelSettings(start=model),
        stages=[replace(sft, steps=steps, batch_size=16, sources=sources, **fields)],
        loop=replace(config.loop, gradient_accumulation=1, seed=seed),
    )


def trained(config: TrainConfig, out_dir: Path) -> str:
    """The model of a run, which is begun or gone on with if it is not there yet."""
    if not (out_dir / "model").is_dir():
        config = replace(
            config,
            data_dir=RUNS / "world",
            out_dir=out_dir,
            feature_cache_dir=RUNS / "features",
        )
        train(config, resume=out_dir.is_dir())
    return str(out_dir / "model")


def model_of(name: str) -> str:
    """The model of a name: what `apollo eval` calls it."""
    if name == SHIPPED:
        return name
    start = BRANCHES[name][0]
    if start in TRUNKS:
        trained(trunk(start), RUNS / "trunks" / start)
    return trained(branch(name), RUNS / name)


def apollo(*args: object) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", "apollo", *map(str, args)], check=True)


def make_worlds() -> None:
    """Make what is trained on and asked about, as far as it is not there."""
    for name, num_videos, seed, split in [
        ("world", TRAIN_VIDEOS, 0, "train"),
        *((f"world_{seed}", number, seed, "test") for seed, number in VIDEOS.items()),
    ]:
        world = RUNS / name
        if not (world / "world.json").is_file():
            apollo("world", "make", world, "--num-videos", num_videos, "--seed", seed,
                   "--split", split)  # fmt: skip


def write_table(name: str, answers: Path, table: Path) -> None:
    """Keep of a model's predictions what an audit reads."""
    rows = [
        {"model": name, "class": each.question_class}
        | {field: getattr(each, field) for field in FIELDS}
        for each in read_predictions(answers)
    ]
    table.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), table, compression="zstd")


def main() -> None:
    """Make the models that are named, or all."""
    make_worlds()
    for name in sys.argv[1:] or (SHIPPED, *BRANCHES):
        tables = {seed: TABLES / f"seed_{seed}" / f"{name}.parquet" for seed in VIDEOS}
        if all(table.is_file() for table in tables.values()):
            continue
        model = model_of(name)
        for seed, table in tables.items():
            out = RUNS / f"answers_{seed}" / name
            apollo("eval", model, "--data", RUNS / f"world_{seed}", "--condition", "video",
                   "frame", "text", "--feature-cache", RUNS / "asked", "--out", out)  # fmt: skip
            write_table(name, out / "predictions.jsonl", table)


if __name__ == "__main__":
    main()
