"""Train a dozen micro models that answer two pools of questions, for benchmarks/curation.py.

    python scripts/make_pool.py [NAME ...]

They differ in LLM, encoders, connector, in what learns, for how long, and in seeds. Models that
share parts share one training on captions, of which each is a branch. Conditions are the video,
one frame and the text alone. Hours on two cores, after make_micro.sh; run again after a stop, it
goes on where it was. Names make these models alone: two processes share the work if no trunk is in
both.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from apollo.train.recipes import PARTS_DIR, ModelSettings, TrainConfig, micro
from apollo.train.run import train

POOL = Path("runs/pool")
VIDEOS = {2: 1750, 3: 700}
"""Seed of a pool -> its videos: some 8,600 and 3,400 questions."""
IMAGE, VIDEO = (str(PARTS_DIR / name) for name in ("siglip", "internvideo2"))
MLP = replace(micro().model.connector, resampler="mlp_pool")
TRUNKS: dict[str, dict[str, Any]] = {
    "0.3m": {"llm": str(PARTS_DIR / "llm-0.3m")},
    "1m": {},
    "1m_image": {"encoders": [IMAGE]},
    "1m_video": {"encoders": [VIDEO]},
    "1m_mlp": {"connector": MLP},
    "3m": {"llm": str(PARTS_DIR / "llm-3m")},
}
"""Trained on captions -> what it has unlike the recipe `micro`."""
FROZEN_LLM = {"encoders": 0.0, "connector": 2e-3, "llm": 0.0}
BRANCHES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "0.3m": ("0.3m", 1200, {}),
    "0.3m_few": ("0.3m", 200, {}),
    "0.3m_seed1": ("0.3m", 600, {"seed": 1}),
    "1m": ("1m", 1200, {}),
    "1m_few": ("1m", 200, {}),
    "1m_seed1": ("1m", 600, {"seed": 1}),
    "1m_connector": ("1m", 600, {"learning_rates": FROZEN_LLM}),
    "1m_image": ("1m_image", 600, {}),
    "1m_video": ("1m_video", 600, {}),
    "1m_mlp": ("1m_mlp", 600, {}),
    "3m": ("3m", 800, {}),
    "3m_few": ("3m", 200, {}),
}
"""Model -> its trunk, steps on questions, and what else it has unlike the recipe's last stage."""


def trunk(name: str) -> TrainConfig:
    """Captions of images and videos, encoders frozen: their features are kept and shared."""
    config = micro()
    captions = replace(config.stages[0], steps=1000)
    return replace(config, model=replace(config.model, **TRUNKS[name]), stages=[captions])


def branch(name: str) -> TrainConfig:
    """Questions, on from a trunk."""
    config = micro()
    start, steps, unlike = BRANCHES[name]
    stage = {key: value for key, value in unlike.items() if key != "seed"}
    return replace(
        config,
        model=ModelSettings(start=str(POOL / "trunks" / start / "model")),
        stages=[replace(config.stages[2], steps=steps, batch_size=16, **stage)],
        loop=replace(config.loop, gradient_accumulation=2, seed=unlike.get("seed", 0)),
    )


def trained(config: TrainConfig, out_dir: Path) -> Path:
    """The model of a run, which is begun or gone on with if it is not there yet."""
    if not (out_dir / "model").is_dir():
        config = replace(config, out_dir=out_dir, feature_cache_dir=Path("runs/features"))
        train(config, resume=out_dir.is_dir())
    return out_dir / "model"


def apollo(*args: object) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", "apollo", *map(str, args)], check=True)


def main() -> None:
    """Make the models that are named, or all."""
    for seed, num_videos in VIDEOS.items():
        world = POOL / f"world_{seed}"
        if not (world / "world.json").is_file():
            apollo(
                "world",
                "make",
                world,
                "--num-videos",
                num_videos,
                "--seed",
                seed,
                "--split",
                "test",
            )
    for name in sys.argv[1:] or BRANCHES:
        start = BRANCHES[name][0]
        trained(trunk(start), POOL / "trunks" / start)
        model = trained(branch(name), POOL / name)
        for seed in VIDEOS:
            out = POOL / f"answers_{seed}" / name
            apollo(
                "eval",
                model,
                "--data",
                POOL / f"world_{seed}",
                "--condition",
                "video",
                "frame",
                "text",
                "--out",
                out,
            )


if __name__ == "__main__":
    main()
