"""Write a trained model for others: merged, in the precision wanted, with its processor.

The result loads with transformers' Auto classes and with every `apollo` command. Read next:
`lora.py`, whose matrices are merged here when they come alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

from apollo.chat import load_model
from apollo.runtime import make_run_dir
from apollo.train.lora import load_lora, merge_lora


def main(args: argparse.Namespace) -> int:
    """Run `apollo export`.

    Args:
        args: source (folder of a run, a model or an adapter), base (model of an adapter, or None),
            out (folder), dtype (name of the weights' type).
    """
    export(args.source, Path(args.out), args.dtype, args.base)
    Console(stderr=True).print(f"exported model: {args.out}")
    return 0


def export(source: str, out_dir: Path, dtype: str = "bfloat16", base: str | None = None) -> None:
    """Write a model, with low-rank matrices merged into it.

    Args:
        source: A finished run's folder, a model's folder or hub id, or the folder of an adapter.
        out_dir: New or empty folder.
        dtype: Type of the weights, such as "bfloat16".
        base: The model that an adapter was trained from; by default the one it names.

    Raises:
        ValueError: The source is none of these, or an adapter of another model.
    """
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        if not (folder / "model").is_dir():
            raise ValueError(f"the run in {folder} has no model yet; finish it with --resume")
        folder = folder / "model"
        source = str(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    if base and not is_adapter:
        raise ValueError(f"--base goes with an adapter, and {source} is none")
    make_run_dir(out_dir)
    model, processor = load_model(_base_of(folder, base) if is_adapter else source)
    if is_adapter:
        load_lora(model.float(), folder)
        merge_lora(model)
    model.to(getattr(torch, dtype)).save_pretrained(out_dir)
    processor.save_pretrained(out_dir)


def _base_of(folder: Path, base: str | None) -> str:
    """The model that an adapter was trained from."""
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = base or named.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder} does not say what it was trained from; give --base")
    return base
