"""The encoders: what each is called, how it is run, and how the features of two become one.

Apollo sees with one or two pre-trained encoders, an image encoder that is run on every frame and a
video encoder that is run on every clip (paper Sec. 4.2, Table 9). Here each kind is one entry of
`ENCODERS`; the models themselves are transformers' (InternVideo2: `internvideo2.py`). Read next:
`connector.py`, which turns features into LLM tokens.

Shapes: C clips, T frames, S frame size, P patches, (t, h, w) an encoder's grid of patches, D_e its
width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Model, SiglipVisionModel, VideoMAEModel, VJEPA2Model
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .image_processing import Preprocessing
from .internvideo2 import InternVideo2Model

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderKind:
    """One kind of encoder.

    Args:
        model_class: Its transformers class.
        per_frame: Whether it takes single frames (an image encoder) or whole clips.
        size_name: The configuration field that holds the frame size.
        layers: Where its list of layers lies.
        unused: Modules after the layers (final norm, heads) that the selected hidden state does not
            pass.
        num_extra_tokens: Tokens before the patches (a class token), which are dropped.
        mean: Mean colour it was trained with, see `Preprocessing`.
        std: Standard deviation of the colours.
        resize: How frames are resized for it.
        options: What its `forward` must be told.
        prepare: Fits it, in place, to clips of so many frames.
    """

    model_class: type[PreTrainedModel]
    per_frame: bool
    size_name: str
    layers: str
    unused: tuple[str, ...]
    num_extra_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str
    options: tuple[tuple[str, bool], ...] = ()
    prepare: Callable[[PreTrainedModel, int], None] | None = None


def _prepare_dinov2(model: Any, num_frames: int) -> None:
    model.embeddings.mask_token = None  # only pre-training masks patches


def _prepare_videomae(model: Any, num_frames: int) -> None:
    """Cut the fixed sine table to the clip; its entries depend on nothing but their index."""
    config = model.config
    if num_frames > config.num_frames:
        raise ValueError(
            f"videomae: made for clips of up to {config.num_frames} frames, "
            f"got frames_per_clip {num_frames}"
        )
    num_patches = num_frames // config.tubelet_size * (config.image_size // config.patch_size) ** 2
    embeddings = model.embeddings
    embeddings.position_embeddings = embeddings.position_embeddings[:, :num_patches]


def _prepare_internvideo2(model: Any, num_frames: int) -> None:
    """Drop the position table that clips of this length never use."""
    if model.img_pos_embed is None:
        return
    if num_frames // model.config.tubelet_size == 1:
        model.pos_embed = None
    else:
        model.img_pos_embed = None


ENCODERS: dict[str, EncoderKind] = {
    "siglip_vision_model": EncoderKind(
        model_class=SiglipVisionModel,
        per_frame=True,
        size_name="image_size",
        layers="encoder.layers",
        unused=("post_layernorm", "head"),
        num_extra_tokens=0,
        mean=HALF,
        std=HALF,
        resize="pillow_bicubic",
    ),
    "dinov2": EncoderKind(
        model_class=Dinov2Model,
        per_frame=True,
        size_name="image_size",
        layers="encoder.layer",
        unused=("layernorm",),
        num_extra_tokens=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize="pillow_bicubic",
        prepare=_prepare_dinov2,
    ),
    "videomae": EncoderKind(
        model_class=VideoMAEModel,
        per_frame=False,
        size_name="image_size",
        layers="encoder.layer",
        unused=("layernorm",),
        num_extra_tokens=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize="bilinear",
        prepare=_prepare_videomae,
    ),
    "vjepa2": EncoderKind(
        model_class=VJEPA2Model,
        per_frame=False,
        size_name="crop_size",
        layers="encoder.layer",
        unused=("encoder.layernorm", "predictor"),
        num_extra_tokens=0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize="bilinear",
        options=(("skip_predictor", True),),
    ),
    "internvideo2": EncoderKind(
        model_class=InternVideo2Model,
        per_frame=False,
        size_name="img_size",
        layers="blocks",
        unused=(),
        num_extra_tokens=1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize="bilinear",
        prepare=_prepare_internvideo2,
    ),
}
"""Encoder kind (transformers' `model_type`) -> how it is run."""


def image_size(config: PreTrainedConfig) -> int:
    """Return the frame size S, in pixels, that an encoder takes."""
    return int(getattr(config, ENCODERS[config.model_type].size_name))


def preprocessing(config: PreTrainedConfig) -> Preprocessing:
    """Return how an encoder wants its frames."""
    kind = ENCODERS[config.model_type]
    return Preprocessing(image_size(config), kind.mean, kind.std, kind.resize)


def grid(config: PreTrainedConfig, num_frames: int) -> tuple[int, int, int]:
    """Return an encoder's grid of patches (t, h, w) for a clip of `num_frames` frames."""
    side = image_size(config) // config.patch_size
    return num_frames // getattr(config, "tubelet_size", 1), side, side


def fused_grid(configs: list[PreTrainedConfig], num_frames: int) -> tuple[int, int, int]:
    """Return the elementwise maximum of the encoders' grids, on which their features meet."""
    grids = [grid(config, num_frames) for config in configs]
    return max(g[0] for g in grids), max(g[1] for g in grids), max(g[2] for g in grids)


def build(config: PreTrainedConfig, selected_layer: int, num_frames: int) -> PreTrainedModel:
    """Make an encoder with random weights, cut at the selected layer."""
    return cut(ENCODERS[config.model_type].model_class(config), selected_layer, num_frames)


def cut(model: PreTrainedModel, selected_layer: int, num_frames: int) -> PreTrainedModel:
    """Remove, in place, whatever the selected hidden state does not need.

    The last hidden state of a cut encoder is the selected one, with no norm after it. What is
    removed would cost memory and time, and its parameters would wait in vain for a gradient.

    Args:
        model: A whole encoder.
        selected_layer: Index into its layers + 1 hidden states; -2 drops one layer.
        num_frames: Frames of the clips it will see.

    Returns:
        The same model.
    """
    kind = ENCODERS[model.config.model_type]
    layers: Any = model.get_submodule(kind.layers)
    num_kept = (
        selected_layer
        if selected_layer > 0
        else model.config.num_hidden_layers + 1 + selected_layer
    )
    del layers[num_kept:]
    for name in kind.unused:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if getattr(parent, child, None) is not None:
            setattr(parent, child, nn.Identity())
    if kind.prepare is not None:
        kind.prepare(model, num_frames)
    return model


def encode(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run one cut encoder.

    Args:
        model: Made by `build` or `cut`.
        pixel_values: Frames (C, T, 3, S, S), padded and resized for this encoder; uint8, or
            normalised already.

    Returns:
        Features (C, t, h, w, D_e).
    """
    if len(pixel_values) == 0:
        # transformers' layers cannot take zero clips; a blank one, of which nothing is kept, gives
        # every parameter its zero gradient.
        return encode(model, pixel_values.new_zeros(1, *pixel_values.shape[1:]))[:0]
    kind = ENCODERS[model.config.model_type]
    if pixel_values.dtype == torch.uint8:
        pixel_values = preprocessing(model.config).normalise(pixel_values)
    num_clips, num_frames = pixel_values.shape[:2]
    inputs = pixel_values.flatten(0, 1) if kind.per_frame else pixel_values
    tokens = model(inputs.to(model.dtype), **dict(kind.options)).last_hidden_state
    tokens = tokens[:, kind.num_extra_tokens :]
    return tokens.reshape(num_clips, *grid(model.config, num_frames), tokens.shape[-1])


def fuse(features: list[torch.Tensor], target: tuple[int, int, int]) -> torch.Tensor:
    """Bring features to one grid and concatenate their channels.

    Features whose grid differs are resampled in float32 by trilinear interpolation without aligned
    corners, as in the released code; the others pass untouched.

    Args:
        features: For each encoder, in the order of the configuration, (C, t, h, w, D_e).
        target: The grid (T, H, W), see `fused_grid`.

    Returns:
        Fused features (C, T, H, W, D), D the sum of the widths.
    """
    return torch.cat([_resample(feature, target) for feature in features], dim=-1)


def _resample(feature: torch.Tensor, target: tuple[int, int, int]) -> torch.Tensor:
    if feature.shape[1:4] == target:
        return feature
    channels_first = feature.permute(0, 4, 1, 2, 3).float()
    resampled = F.interpolate(channels_first, size=target, mode="trilinear", align_corners=False)
    return resampled.permute(0, 2, 3, 4, 1).to(feature.dtype)
