"""LoRA: train the LLM by low-rank matrices beside its frozen weights, then merge them into it.

The matrices are put, in place, into the LLM's linear layers by the library peft, so that the
model's three parts, the loop and the checkpoints stay what they are: the part `llm` merely has few
trainable parameters. The frozen weights can be held in 16 or 4 bits (QLoRA, arXiv 2305.14314).
Merging leaves an ordinary model, which loads without peft. Read next: `run.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from apollo.model import ApolloForConditionalGeneration

ADAPTER = "default"  # peft's name for the only set of matrices there is
PREFIX = "base_model.model."  # before each name in the files that peft's PeftModel reads
OTHER_PARTS = "other_parts.safetensors"


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank training of the LLM.

    Attributes:
        rank: Rank of the matrices.
        alpha: Their product is multiplied by alpha / rank.
        dropout: Share of a layer's inputs that the matrices do not see while training.
        targets: Names of the LLM's linear layers that get them; all of Qwen2's by default.
        base: How the frozen weights of these layers are held: float32, bfloat16 (half the memory)
            or nf4 (4 bits, QLoRA; needs the library bitsandbytes). The last two go with
            loop.mixed_precision bf16.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: list[str] = field(
        default_factory=lambda: [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ]
    )
    base: Literal["float32", "bfloat16", "nf4"] = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"rank and alpha must be at least 1, got {self.rank}, {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if not self.targets:
            raise ValueError("targets names no layer")


def add_lora(model: ApolloForConditionalGeneration, settings: LoraSettings) -> None:
    """Put low-rank matrices into the LLM and freeze everything else of it, in place.

    Encoders and connector are left as they are: their learning rates decide. The matrices begin
    such that the model's answers do not change.

    Raises:
        ValueError: A target is no linear layer of the LLM, or a library is missing.
    """
    peft = _library("peft")
    llm: Any = model.model.llm
    linear = {name for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(settings.targets) - known):
        raise ValueError(
            f"lora.targets: the LLM has no linear layer {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known))}"
        )
    chosen = sorted(name for name in linear if name.rpartition(".")[2] in settings.targets)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        held = _hold(llm.get_submodule(name), settings.base)
        setattr(llm.get_submodule(parent), child, held)
    others = [model.model.encoders, model.model.connector]
    before = [(p, p.requires_grad) for part in others for p in part.parameters()]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"model\.llm\..*\.({'|'.join(map(re.escape, settings.targets))})",
        base_model_name_or_path=model.config._name_or_path or None,
    )
    model.is_loaded_in_4bit = settings.base == "nf4"  # type: ignore[assignment]
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    finally:
        del model.is_loaded_in_4bit  # it was for peft alone
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:  # peft makes them like the weights beside them; updates need 32 bits
            parameter.data = parameter.data.float()


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` was called and `merge_lora` was not."""
    return any(hasattr(module, "lora_A") for module in model.modules())


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the product of the matrices to the weights they stand beside, and remove them.

    Weights come out in float32: those held in 4 bits as what they stand for, which is what the
    matrices were trained beside.
    """
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        base: Any = layer.get_base_layer()
        weight = _full_weight(base) + layer.get_delta_weight(ADAPTER).float()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.float())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear.train(layer.training))
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_lora(model: ApolloForConditionalGeneration, folder: Path, other_parts: list[str]) -> None:
    """Write the matrices alone, as peft's `PeftModel.from_pretrained` reads them.

    Args:
        model: With the matrices in it.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go.
        other_parts: Parts that were trained in full beside them, such as the connector; they go
            into `other_parts.safetensors`, which `load_lora` reads and peft does not.
    """
    peft: Any = _library("peft")
    folder.mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = model.peft_config[ADAPTER]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    others = {
        f"{part}.{name}": tensor.cpu().contiguous()
        for part in other_parts
        for name, tensor in model.parts()[part].state_dict().items()
    }
    if others:
        save_file(others, folder / OTHER_PARTS)


def load_lora(model: ApolloForConditionalGeneration, folder: Path) -> None:
    """Put what `save_lora` wrote into the model that it was trained from, in place.

    Raises:
        ValueError: The matrices are of another model.
    """
    peft: Any = _library("peft")
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    tensors = load_file(folder / "adapter_model.safetensors")
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    try:
        result = peft.set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"{[*missing, *result.unexpected_keys][:3]} do not match")
        if (folder / OTHER_PARTS).is_file():
            others = load_file(folder / OTHER_PARTS)
            for part in {name.partition(".")[0] for name in others}:
                own = {
                    n.partition(".")[2]: t for n, t in others.items() if n.startswith(f"{part}.")
                }
                model.parts()[part].load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"{folder} was trained from another model: {error}") from error


# ---- how frozen weights are held


def _hold(linear: nn.Module, base: str) -> nn.Module:
    """A linear layer with its weight in the precision asked for."""
    if base == "float32":
        return linear
    if base == "bfloat16":
        return linear.to(torch.bfloat16)
    bitsandbytes: Any = _library("bitsandbytes")
    assert isinstance(linear, nn.Linear)
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    # The weight becomes 4 bits when it is moved to the device it is used on.
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", module=layer
    )
    layer.bias = linear.bias
    layer._register_state_dict_hook(_leave_out_weight)
    layer.register_load_state_dict_post_hook(_do_without_weight)
    return layer


def _leave_out_weight(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    """Keep 4-bit weights out of checkpoints: they are made again from the model they are of."""
    for name in [name for name in state if name.startswith(f"{prefix}weight")]:
        del state[name]


def _do_without_weight(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.endswith("base_layer.weight")]


def _full_weight(base: Any) -> torch.Tensor:
    """The weight (out, in) of a frozen layer in float32, on its device."""
    quant_state = getattr(base.weight, "quant_state", None)
    if quant_state is None:
        return base.weight.float()
    bitsandbytes: Any = _library("bitsandbytes")
    return bitsandbytes.functional.dequantize_4bit(base.weight.data, quant_state).float()


def _library(name: Literal["peft", "bitsandbytes"]) -> ModuleType:
    """Import an optional library.

    Raises:
        ValueError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = {"peft": "finetune", "bitsandbytes": "qlora"}[name]
        raise ValueError(
            f"the library {name} is needed and not installed: pip install 'apollo-lmm[{extra}]'"
        ) from error
