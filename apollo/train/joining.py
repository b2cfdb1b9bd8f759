"""From `ModelSettings` to a model: load trained parts and join them, or go on with a finished one.

The same settings also make the model without weights, on torch's meta device, so that sizes can be
counted in a second and nothing is downloaded: the shapes of the paper's parts are known here. Read
next: `run.py`, which trains the model; `plan.py`, which counts it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from apollo.chat import find_model, load_model
from apollo.model import ApolloConfig, ApolloForConditionalGeneration, ApolloProcessor
from apollo.model.configuration import ENCODER_CONFIGS, InternVideo2Config
from apollo.model.internvideo2 import InternVideo2Model
from apollo.train.published import PUBLISHED
from apollo.train.recipes import INTERNVIDEO2, ModelSettings

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""What transformers calls a tokenizer that is all in its tokenizer.json."""


def join_parts(
    settings: ModelSettings, max_clips: int
) -> tuple[ApolloForConditionalGeneration, ApolloProcessor]:
    """Load the model to train, all in float32, and its processor.

    Args:
        settings: Parts and how a new connector joins them, or a finished model.
        max_clips: Largest number of clips of a video, for whoever uses the finished model.

    Raises:
        ValueError: A part is not there or cannot be loaded.
    """
    if settings.start:
        model, processor = load_model(settings.start)
        model = model.float()
        model.config.note = settings.note or model.config.note
        processor.max_clips = max_clips
        return model, processor
    names = [_find_part(name) for name in (*settings.encoders, settings.llm)]
    try:
        tokenizer = load_tokenizer(names[-1])
        model = ApolloForConditionalGeneration.from_parts(
            encoders=[_load_encoder(name) for name in names[:-1]],
            llm=names[-1],
            tokenizer=tokenizer,
            connector=asdict(settings.connector),
            **_shape(settings),
        ).float()
    except OSError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ValueError(f"cannot load a part of the model: {reason}") from error
    processor = ApolloProcessor.from_config(
        model.config, tokenizer, max_clips, sampling=settings.sampling
    )
    return model, processor


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of an LLM as the folder or hub id has it.

    AutoTokenizer gives every model of type qwen2 Qwen2's own way to cut text into pieces, even
    where the files have another and say that they are plain: an LLM would then read tokens that it
    has never been taught.
    """
    if get_tokenizer_config(name).get("tokenizer_class") in PLAIN_TOKENIZERS:
        return PreTrainedTokenizerFast.from_pretrained(name)
    return AutoTokenizer.from_pretrained(name)


def model_config(settings: ModelSettings) -> ApolloConfig:
    """The configuration of the model, from the parts' shapes alone.

    Raises:
        ValueError: A part is not there, or is of an unknown kind.
    """
    if settings.start:
        config = AutoConfig.from_pretrained(find_model(settings.start))
        if not isinstance(config, ApolloConfig):
            raise ValueError(
                f"{settings.start} is of type {config.model_type}, not an Apollo model"
            )
        return config
    return ApolloConfig(
        encoders=[part_config(name) for name in settings.encoders],
        text_config=part_config(settings.llm),
        connector=asdict(settings.connector),
        **_shape(settings),
    )


def empty_model(settings: ModelSettings) -> ApolloForConditionalGeneration:
    """The model on the meta device: every shape, no weights, no download of any."""
    with torch.device("meta"):
        return ApolloForConditionalGeneration(model_config(settings))


def part_config(name: str) -> PreTrainedConfig:
    """The configuration of a part: of the paper's parts from `PUBLISHED`, else read.

    Raises:
        ValueError: There is none.
    """
    if name in PUBLISHED and not Path(name).is_dir():
        shape = dict(PUBLISHED[name])
        kind = shape.pop("model_type")
        return ({**CONFIG_MAPPING} | ENCODER_CONFIGS)[kind](**shape)
    try:
        config = AutoConfig.from_pretrained(_find_part(name))
    except OSError as error:
        raise ValueError(f"cannot read the shape of {name}: {error}") from error
    return getattr(config, "vision_config", config)


def _shape(settings: ModelSettings) -> dict[str, Any]:
    return {
        "tokens_per_clip": settings.tokens_per_clip,
        "frames_per_clip": settings.frames_per_clip,
        "clip_duration_s": settings.clip_duration_s,
        "token_integration": settings.token_integration,
        "note": settings.note,
    }


def _find_part(name: str) -> str:
    """A folder with a part, or a hub id as it is.

    Raises:
        ValueError: It can be neither.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    # A hub id is owner/name, and so may a mistyped path be: then its parent exists.
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or folder.parent.is_dir():
        raise ValueError(f"no model part in {name}: it has no config.json")
    return name


def _load_encoder(name: str) -> str | PreTrainedModel:
    """InternVideo2 is published as a PyTorch file alone; all else transformers can load itself."""
    if name != INTERNVIDEO2:
        return name
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(INTERNVIDEO2, "InternVideo2-stage2_1b-224p-f4.pt")
    return read_internvideo2(Path(path), InternVideo2Config())


def read_internvideo2(path: Path, config: InternVideo2Config) -> InternVideo2Model:
    """Take the video encoder out of a checkpoint of InternVideo2's second stage.

    Beside the encoder such a file holds a text encoder and heads, all under `module` or `model`.

    Raises:
        ValueError: The encoder is not in the file, or has another shape.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("module", "model"):
        state = state.get(wrapper, state)
    prefix = "vision_encoder."
    own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    model = InternVideo2Model(config)
    try:
        missing = model.load_state_dict(own, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit InternVideo2: {error}") from error
    if missing:
        raise ValueError(f"{path} holds no InternVideo2 encoder: {missing[:3]} are missing")
    return model
