"""Released checkpoints: from the authors' folder layout to a model that transformers loads.

The released weights lie in three folders, `llm/`, `mm_connector/` and `vision_tower/`, each with a
configuration of its own, and nothing at the root loads them without the authors' code. Here every
tensor gets the name it has in `modeling.py`. Nothing is computed: all headers are read and checked
first, then the bytes are copied range by range, so that dtypes stay, memory stays near that of an
empty model, and a bad folder fails before anything is written. Read next: docs/released.md for
what differs from the released code; `modeling.py` for what is loaded.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration import ENCODER_CONFIGS, ApolloConfig
from .encoders import ENCODERS, fused_grid
from .modeling import ApolloForConditionalGeneration
from .processing import END_OF_TURN, IMAGE_TOKEN, VIDEO_TOKEN, ApolloProcessor, new_special_tokens

LAYOUT = ("config.json", "llm/config.json", "mm_connector/config.json", "vision_tower/config.json")
"""The files by which a folder in the released layout is known."""

ENCODER_KINDS = {"siglip": "siglip_vision_model", "internvideo2": "internvideo2"}
"""What the name of an encoder in `vision_towers` contains -> its kind in `ENCODERS`."""

PREFIXES = {"siglip_vision_model": "vision_model.", "internvideo2": ""}
"""Encoder kind -> what its stored names begin with. transformers 5 writes SigLIP without it."""

CLIP_SAMPLING_RATIO = 0.65
"""The share of the context window that a video may fill: `clip_sampling_ratio` of the authors'
README (facts, 2.2)."""

BAD_VALUES = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError),
    StrictDataclassError,
)
"""What a value of a wrong kind in a configuration leads to, here, in transformers or in torch."""

CONVERSION = 1
"""Raise it when the same source converts to something else: `converted` then makes it anew."""

CHUNK_BYTES = 1 << 22
"""How much of a file is in memory at a time while it is copied."""


class ConversionError(ValueError):
    """A released checkpoint cannot be converted; one line that says why."""


@dataclass
class Report:
    """What became of every tensor of a checkpoint.

    Attributes:
        mapped: Stored name, with its folder in front -> name in the model.
        dropped: Stored name -> why the model has no use for it.
        missing: Stored names that the model needs and the folder lacks; a conversion with any
            fails.
        num_bytes: Bytes of the mapped tensors.
    """

    mapped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def __str__(self) -> str:
        """A table: tensors by folder, then the reasons for which some were dropped."""
        columns = {"mapped": self.mapped, "dropped": self.dropped, "missing": self.missing}
        counts = [Counter(key.rpartition("/")[0] for key in keys) for keys in columns.values()]
        lines = [f"{'':44}" + "".join(f"{column:>9}" for column in columns)]
        for folder in dict.fromkeys(folder for count in counts for folder in count):
            row = "".join(f"{count[folder]:9}" for count in counts)
            lines.append(f"{folder or 'root':44}{row}")
        reasons = Counter(self.dropped.values())
        lines += [f"dropped {number}: {reason}" for reason, number in reasons.items()]
        return "\n".join([*lines, f"{self.num_bytes / 1e9:.2f} GB of weights"])


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file, `start` to `stop` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """One folder of the layout and the names in it.

    Attributes:
        folder: Path below the root; "" is the root.
        targets: Stored name -> name in the model, of the tensors that must be there.
        unused: Stored name -> why it may be there and is dropped.
        prefix: What stored names may begin with.
    """

    folder: str
    targets: dict[str, str]
    unused: dict[str, str]
    prefix: str = ""

    def full_name(self, name: str) -> str:
        """The name for people: with the folder."""
        return f"{self.folder}/{self.prefix}{name}".removeprefix("/")


Copy = tuple[Path, list[tuple[str, Tensor]]]  # a file, and the tensors of it with their new names


def is_released(folder: str | Path) -> bool:
    """Whether a folder has the released layout."""
    return all((Path(folder) / name).is_file() for name in LAYOUT)


def convert(source: str | Path, target: str | Path) -> Report:
    """Convert a released checkpoint to a folder that `from_pretrained` loads, processor included.

    Args:
        source: A folder in the released layout, or a hub id, which is downloaded first.
        target: The folder to make; it may exist if it is empty.

    Returns:
        What became of every tensor.

    Raises:
        ConversionError: If the source is not what it should be, or the target is not empty. The
            target is then as it was: it appears when all of it has been written.
    """
    target = Path(target).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists already; give a new or an empty folder")
    folder = _find(source)
    try:
        config = _config(folder)
        processor = _processor(folder, config)
        generation_config = _generation_config(folder, processor)
        report, copies = _plan(folder, config)
    except ConversionError:
        raise
    except BAD_VALUES as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"{folder}: its configuration makes no model: {reason}") from error
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, copies, report)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        # Not save_pretrained: that refuses what released files hold, a temperature unsampled.
        generation_config.to_json_file(partial / "generation_config.json")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return report


def converted(model: Any, **options: Any) -> Any:
    """Return where transformers can load a model from; a released checkpoint is converted.

    The result of a conversion is kept in `apollo` below Hugging Face's cache (`HF_HOME`) until the
    source changes.

    Args:
        model: A folder or hub id in the released layout, which is converted; anything else is
            returned as it is.
        options: What `from_pretrained` was given; `revision`, `token`, `cache_dir` and
            `local_files_only` concern the hub.

    Raises:
        ConversionError: If a released checkpoint cannot be converted.
    """
    if not isinstance(model, str | os.PathLike):
        return model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        known = ("revision", "token", "cache_dir", "local_files_only")
        hub = {name: options[name] for name in known if options.get(name) is not None}
        try:
            huggingface_hub.hf_hub_download(str(model), "mm_connector/config.json", **hub)
        except (OSError, ValueError):  # an ordinary model, or transformers will say what is wrong
            return model
        folder = _download(str(model), **hub)
    if not is_released(folder):
        return model
    target = Path(huggingface_hub.constants.HF_HOME) / "apollo" / _fingerprint(folder)
    if not target.exists():
        try:
            convert(folder, target)
        except (ConversionError, OSError):
            if not target.exists():  # else another process was faster
                raise
    return str(target)


def main(args: argparse.Namespace) -> int:
    """Run `apollo convert`.

    Args:
        args: source, target.
    """
    print(convert(args.source, args.target))
    print(f"written to {args.target}")
    return 0


def _find(source: str | Path) -> Path:
    """The folder of a checkpoint, downloaded if it is on the hub."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source))
    if missing := [name for name in LAYOUT if not (folder / name).is_file()]:
        raise ConversionError(f"{source} is not in the released layout: no {', '.join(missing)}")
    return folder


def _download(hub_id: str, **options: Any) -> Path:
    patterns = ["*.json", "*.txt", "*.safetensors"]  # none of the authors' code
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConversionError(
            f"{hub_id} is no folder, and the hub does not have it for us: {reason}"
        ) from error


def _fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors"))
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr((CONVERSION, folder.resolve(), facts)).encode()).hexdigest()[:16]


# ---- configurations


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return content


def _config(folder: Path) -> ApolloConfig:
    """Translate the configurations of the root and the parts (facts, 1.2, 1.3 and 8.2)."""
    root, llm = _read_json(folder / "config.json"), _read_json(folder / "llm/config.json")
    connector_path = folder / "mm_connector/config.json"
    connector = _read_json(connector_path)
    expected = {"projector_type": ("mlp1x_gelu",), "resampler_type": ("perciver", "perceiver")}
    for name, choices in {**expected, "hidden_act": ("silu",)}.items():
        if connector.get(name) not in choices:
            raise ConversionError(
                f"{connector_path}: {name} must be {choices[0]!r}, got {connector.get(name)!r}"
            )
    if root.get("use_mm_start_end"):
        raise ConversionError(f"{folder / 'config.json'}: use_mm_start_end is not supported")
    layer = root.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int) or layer >= 0:
        # The two encoders of the released code count from the start differently.
        raise ConversionError(f"mm_vision_select_layer must be a negative number, got {layer!r}")
    try:
        encoders = [_encoder_config(folder, name) for name in _encoder_names(folder)]
        grid = tuple(connector["token_input_shape"])
        settings = {
            "depth": connector["resampler_depth"],
            "num_heads": connector["resampler_n_heads"],
            "head_dim": connector["resampler_head_dim"],
            "num_key_value_heads": connector["num_key_value_heads"],
            "ff_multi": connector["ff_multi"],
        }
        tokens_per_clip = connector["num_output_tokens"]
    except KeyError as error:
        raise ConversionError(f"{connector_path}: no {error}") from error
    if fused_grid(encoders, grid[0]) != grid:
        raise ConversionError(
            f"{connector_path}: token_input_shape is {grid}, "
            f"the encoders give {fused_grid(encoders, grid[0])}"
        )
    # Which attention kernel runs is for whoever loads the model to say.
    ignored = ("attn_implementation", "_attn_implementation", "auto_map", "transformers_version")
    config = ApolloConfig(
        encoders=encoders,
        selected_layers=[layer] * len(encoders),
        connector=settings,
        text_config={name: value for name, value in llm.items() if name not in ignored},
        tokens_per_clip=tokens_per_clip,
        frames_per_clip=grid[0],
        clip_duration_s=root.get("clip_duration", 2),
        encode_batch_size=root.get("encode_batch_size", 25),
    )
    dtype = root.get("model_dtype") or connector.get("torch_dtype") or llm.get("torch_dtype")
    if dtype:
        config.dtype = str(dtype).removeprefix("torch.")
        if config.dtype not in ("float32", "bfloat16", "float16"):
            raise ConversionError(f"{folder / 'config.json'}: unknown model_dtype {dtype!r}")
    config.architectures = [ApolloForConditionalGeneration.__name__]
    return config


def _encoder_names(folder: Path) -> list[str]:
    """The encoders' folders in the order in which their channels are concatenated."""
    path = folder / "vision_tower/config.json"
    names = _read_json(path).get("vision_towers")
    if not names or not isinstance(names, list) or any(Path(name).name != name for name in names):
        raise ConversionError(f"{path}: vision_towers must list folders, got {names!r}")
    return names


def _encoder_config(folder: Path, name: str) -> PreTrainedConfig:
    kinds = [kind for word, kind in ENCODER_KINDS.items() if word in name.lower()]
    if len(kinds) != 1:
        raise ConversionError(
            f"vision_tower: {name!r} is no known encoder; its name must contain one of "
            f"{', '.join(ENCODER_KINDS)}"
        )
    config_class = ENCODER_CONFIGS[kinds[0]]
    fields = _read_json(folder / "vision_tower" / name / "config.json")
    # What we know no field for concerns the unused heads and fused kernels.
    known: Any = config_class
    return config_class(**{k: v for k, v in fields.items() if k in known.__dataclass_fields__})


def _processor(folder: Path, config: ApolloConfig) -> ApolloProcessor:
    """Make the processor, with prompts and sampling as released, and set the placeholders' ids."""
    if not any((folder / "llm" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # transformers would make an empty tokenizer of its own
        raise ConversionError(f"{folder / 'llm'}: tokenizer.json missing")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder / "llm", local_files_only=True)
    except Exception as error:  # what the tokenizers library raises has no narrower type
        reason = " ".join(str(error).split())
        raise ConversionError(f"{folder / 'llm'}: no tokenizer can be read: {reason}") from error
    new_special_tokens(tokenizer)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ConversionError(
            f"{folder / 'llm'}: the tokenizer has {len(tokenizer)} tokens with those of the prompt,"
            f" the LLM only {config.text_config.vocab_size} embeddings"
        )
    tokenizer.chat_template = None  # the LLM's own; it would be saved over the processor's
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    root = _read_json(folder / "config.json")
    # The released loader, too, takes the LLM's 32,768 positions where no window is named.
    window = (
        root.get("model_max_length")
        or (root.get("llm_cfg") or {}).get("model_max_length")
        or getattr(config.text_config, "model_max_length", None)
        or config.text_config.max_position_embeddings
    )
    return ApolloProcessor.from_config(
        config,
        tokenizer,
        max_clips=math.ceil(window * CLIP_SAMPLING_RATIO / config.tokens_per_clip),
        prompt_format="released",
        sampling="released",
    )


def _generation_config(folder: Path, processor: ApolloProcessor) -> GenerationConfig:
    """The LLM's settings, with a turn's end as an end."""
    path = folder / "llm/generation_config.json"
    generation = GenerationConfig.from_dict(_read_json(path) if path.exists() else {})
    tokenizer: Any = processor.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    stored: Any = generation.eos_token_id or []
    others = [
        end for end in ([stored] if isinstance(stored, int) else stored) if end != end_of_turn
    ]
    generation.update(eos_token_id=[end_of_turn, *others], pad_token_id=tokenizer.pad_token_id)
    return generation


# ---- tensors


def _plan(folder: Path, config: ApolloConfig) -> tuple[Report, list[Copy]]:
    """Read all headers and decide about every tensor."""
    with torch.device("meta"):
        model = ApolloForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    report = Report()
    copies: list[Copy] = []
    problems: dict[str, list[str]] = {"unknown": [], "stored twice": [], "of the wrong shape": []}
    for part in _parts(folder, model):
        missing = dict.fromkeys(part.targets)
        for path in _weight_files(folder / part.folder):
            copies.append((path, copy := []))
            for stored, tensor in _read_header(path).items():
                name = stored.removeprefix(part.prefix)
                label = part.full_name(name)
                if label in report.mapped or label in report.dropped:
                    problems["stored twice"].append(label)
                elif name in part.targets:
                    missing.pop(name)
                    report.mapped[label] = target = part.targets[name]
                    report.num_bytes += tensor.stop - tensor.start
                    copy.append((target, tensor))
                    if tensor.shape != shapes[target]:
                        problems["of the wrong shape"].append(
                            f"{label} (expected {shapes[target]}, found {tensor.shape})"
                        )
                elif reason := part.unused.get(name) or _clip_head(part, name):
                    report.dropped[label] = reason
                else:
                    problems["unknown"].append(label)
        report.missing += [part.full_name(name) for name in missing]
    problems["missing"] = report.missing
    if found := [f"{_some(names)} {what}" for what, names in problems.items() if names]:
        raise ConversionError(f"{folder}: {'; '.join(found)}")
    return report, [copy for copy in copies if copy[1]]


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _parts(folder: Path, model: ApolloForConditionalGeneration) -> Iterator[Part]:
    """Yield the folders of the layout with the names that belong into them (facts, 8.3)."""
    config, llm = model.config, _renamed(model.model.llm, "model.", "model.llm.")
    if config.tie_word_embeddings:
        yield Part("llm", llm, {"lm_head.weight": "head of the LLM, tied to its embeddings"})
    else:
        yield Part("llm", llm | {"lm_head.weight": "lm_head.weight"}, {})
    yield Part("mm_connector", _renamed(model.model.connector, "", "model.connector."), {})
    for index, (name, encoder) in enumerate(
        zip(_encoder_names(folder), config.encoders, strict=True)
    ):
        kept = _renamed(model.model.encoders[index], "", f"model.encoders.{index}.")
        with torch.device("meta"):
            whole = ENCODERS[encoder.model_type].model_class(encoder)
        reason = f"part of {encoder.model_type} that the selected layer does not need"
        unused = {name: reason for name in whole.state_dict() if name not in kept}
        yield Part(f"vision_tower/{name}", kept, unused, PREFIXES[encoder.model_type])
    if any(folder.glob("*.safetensors")):
        yield Part("", {}, {"lm_head.weight": "head that the released code makes and never calls"})


def _renamed(module: nn.Module, stored: str, ours: str) -> dict[str, str]:
    return {stored + name: ours + name for name in module.state_dict()}


def _clip_head(part: Part, name: str) -> str:
    """Say why a tensor is dropped if it is of the heads of InternVideo2's own training."""
    is_head = name.startswith(("clip_", "final_clip_")) and "internvideo2" in part.folder.lower()
    return "CLIP heads of internvideo2, never called" if is_head else ""


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: the shards of its index, or the one."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index}: no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise ConversionError(f"{index}: {outside[0]!r} is no name of a file beside it")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ConversionError(f"{folder}: {', '.join(missing)} missing")
    return [folder / name for name in names]


def _read_header(path: Path) -> dict[str, Tensor]:
    """Read where the tensors of a file lie, in the order of their bytes."""
    try:
        with safe_open(path, "pt"):  # checks the header, and that the file is as long as it says
            pass
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged or not safetensors: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {
        name: Tensor(
            entry["dtype"],
            tuple(entry["shape"]),
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _write_weights(folder: Path, copies: list[Copy], report: Report) -> None:
    """Write one shard for each file with something in it, and their index."""
    weight_map: dict[str, str] = {}
    for number, (path, tensors) in enumerate(copies, start=1):
        name = f"model-{number:05}-of-{len(copies):05}.safetensors"
        weight_map |= {target: name for target, _ in tensors}
        with path.open("rb") as source, (folder / name).open("wb") as shard:
            _write_shard(shard, source, tensors)
    index = {"metadata": {"total_size": report.num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(shard: BinaryIO, source: BinaryIO, tensors: list[tuple[str, Tensor]]) -> None:
    """Write a safetensors file: length of the header, header, the tensors' bytes without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        stop = offset + tensor.stop - tensor.start
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, stop),
        }
        offset = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors begin aligned
    shard.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, tensor in tensors:
        source.seek(tensor.start)
        remaining = tensor.stop - tensor.start
        while remaining:
            chunk = source.read(min(remaining, CHUNK_BYTES))
            if not chunk:
                raise ConversionError(f"{name}: its file ended early; did it change meanwhile?")
            shard.write(chunk)
            remaining -= len(chunk)
