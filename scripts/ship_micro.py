"""Put the trained micro model and its parts into apollo/assets, in float16, with what made them.

Run by make_micro.sh after the trainings. made.json holds, for each, the SHA-256 of the weights and
the steps, last loss and seconds of each stage; logs, curves and configs lie beside it.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import apollo  # noqa: F401  registers the model
from apollo.runtime import environment, read_jsonl

ASSETS = Path("apollo/assets")
LOADERS = {
    "parts/llm": (AutoModelForCausalLM, Path("runs/parts/llm-3m")),
    "parts/siglip": (AutoModel, Path("runs/parts/siglip")),
    "parts/internvideo2": (AutoModel, Path("runs/parts/internvideo2")),
    "micro": (AutoModelForImageTextToText, Path("runs/micro")),
}


def main() -> None:
    """Ship all four."""
    made = {"environment": environment()}
    for name, (auto_class, run_dir) in LOADERS.items():
        target = ASSETS / name
        shutil.rmtree(target, ignore_errors=True)
        model = auto_class.from_pretrained(run_dir / "model", dtype=torch.float32)
        model.half().save_pretrained(target)
        if name == "parts/llm":
            AutoTokenizer.from_pretrained(run_dir / "model").save_pretrained(target)
        if name == "micro":
            AutoProcessor.from_pretrained(run_dir / "model").save_pretrained(target)
        lines = list(read_jsonl(run_dir / "log.jsonl"))
        last = {line["stage"]: line for line in lines}
        made[name] = {
            "sha256": hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "stages": {
                stage: {k: line[k] for k in ("step", "loss", "elapsed_s")}
                for stage, line in last.items()
            },
        }
        logs = ASSETS / "logs" / name.rpartition("/")[2]
        logs.mkdir(parents=True, exist_ok=True)
        for file in ("log.jsonl", "curves.png", "config.yaml"):
            if (run_dir / file).is_file():
                shutil.copy(run_dir / file, logs)
    (ASSETS / "made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
