"""Put trained parts and the micro model into apollo/assets, in float16, with what made them.

    python scripts/ship.py siglip internvideo2 llm-1m micro

Parts are taken from runs/parts/NAME, the model from runs/micro. made.json has for each the SHA-256
of the weights, the machine, and the steps, last loss and seconds of each stage; logs, curves and
configs lie in logs/NAME.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

import apollo  # noqa: F401  registers the model
from apollo.runtime import environment, read_jsonl
from apollo.train.joining import load_tokenizer

ASSETS = Path("apollo/assets")


def ship(name: str) -> dict:
    """Ship one; returns its entry of made.json."""
    run_dir, target = Path("runs/parts") / name, ASSETS / "parts" / name
    loader, load_text = AutoModel, None
    if name == "micro":
        run_dir, target = Path("runs/micro"), ASSETS / "micro"
        loader, load_text = AutoModelForImageTextToText, AutoProcessor.from_pretrained
    elif name.startswith("llm-"):
        loader, load_text = AutoModelForCausalLM, load_tokenizer
    shutil.rmtree(target, ignore_errors=True)
    model = loader.from_pretrained(run_dir / "model", dtype=torch.float32)
    model.half().save_pretrained(target)
    if load_text:
        load_text(str(run_dir / "model")).save_pretrained(target)
    logs = ASSETS / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    for file in ("log.jsonl", "curves.png", "config.yaml"):
        if (run_dir / file).is_file():
            shutil.copy(run_dir / file, logs)
    for file in (target / "config.json", logs / "config.yaml"):  # the checkout lies anywhere
        if file.is_file():
            file.write_text(file.read_text().replace(f"{Path.cwd()}/", ""))
    return {
        "sha256": hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "stages": {
            line["stage"]: {k: line[k] for k in ("step", "loss", "elapsed_s")}
            for line in read_jsonl(run_dir / "log.jsonl")
        },
        "environment": environment(),
    }


def main() -> None:
    """Ship what is named."""
    file = ASSETS / "made.json"
    made = json.loads(file.read_text())
    for name in sys.argv[1:]:
        made[name] = ship(name)
        file.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
