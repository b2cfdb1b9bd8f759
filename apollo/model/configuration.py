"""The configuration of an Apollo model: which parts, and how clips meet text.

It is a plain transformers configuration, so that `AutoConfig`, `save_pretrained` and
`from_pretrained` work. Every default is the released model's unless a comment says otherwise. Read
next: `modeling.py`, which builds the parts named here; `processing.py`, which lays out the prompt
with the same numbers.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Dinov2Config, SiglipVisionConfig, VideoMAEConfig, VJEPA2Config
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TOKEN_INTEGRATIONS = ("none", "start_end", "timestamps", "timestamps_start_end")
"""How a clip's tokens stand in the text (paper Table 2); `timestamps` was chosen there."""

RESAMPLER_NAMES = ("perceiver", "mlp_pool", "conv_pool")
"""The three connectors of the paper's Table 1; `connector.RESAMPLERS` builds them."""

IMAGE_PATHS = ("unified", "split")
"""How images go through the model (paper, Table 8); `unified` was chosen there."""


@strict
class InternVideo2Config(PreTrainedConfig):
    """Shape of an InternVideo2 video encoder, with the field names of the released `config.json`.

    Defaults are InternVideo2-Stage2_1B-224p-f4, the encoder of the released models. Fields of the
    released file that only concern its CLIP heads or fused kernels are accepted and not used.

    Args:
        d_model: Width of the residual stream.
        num_heads: Attention heads.
        depth: Number of blocks.
        img_size: Height and width of a frame, in pixels.
        patch_size: Height and width of a patch, in pixels.
        num_frames: Frames of the clips that the position table is made for.
        tubelet_size: Frames per patch.
        mlp_ratio: MLP width divided by `d_model`; the product is truncated (6144 for the released
            1408).
        init_values: Initial LayerScale. The released 1e-5 suits a 40-block model; small ones learn
            faster with 0.1.
        drop_path_rate: Stochastic depth of the last block while training, rising linearly from 0.
            The released code uses 0.25; the default here is none, so that training is reproducible
            unless one asks for it.
        sep_image_video_pos_embed: Whether a single frame has its own position table.
    """

    model_type = "internvideo2"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "depth",
        "image_size": "img_size",
    }

    d_model: int = 1408
    num_heads: int = 16
    depth: int = 40
    img_size: int = 224
    patch_size: int = 14
    num_frames: int = 4
    tubelet_size: int = 1
    mlp_ratio: float | int = 48 / 11
    init_values: float = 1e-5
    drop_path_rate: float | int = 0.0
    sep_image_video_pos_embed: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the shapes that must divide each other."""
        super().__post_init__(**kwargs)
        for name, whole, part in (
            ("d_model / num_heads", self.d_model, self.num_heads),
            ("img_size / patch_size", self.img_size, self.patch_size),
            ("num_frames / tubelet_size", self.num_frames, self.tubelet_size),
        ):
            if part < 1 or whole % part:
                raise ValueError(
                    f"internvideo2: {name} must be a whole number, got {whole} / {part}"
                )


ENCODER_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "siglip_vision_model": SiglipVisionConfig,
    "dinov2": Dinov2Config,
    "videomae": VideoMAEConfig,
    "vjepa2": VJEPA2Config,
    "internvideo2": InternVideo2Config,
}
"""Encoder kind (transformers' `model_type`) -> its configuration; see `encoders.ENCODERS`."""


@dataclass(frozen=True)
class ConnectorSettings:
    """Shape of the connector. Defaults are the released `mm_connector/config.json`.

    Args:
        resampler: One of `connector.RESAMPLERS`; the other fields concern the perceiver only.
        depth: Perceiver layers.
        num_heads: Query heads of the cross-attention.
        head_dim: Width of one head.
        num_key_value_heads: Key and value heads, each shared by `num_heads / num_key_value_heads`
            query heads.
        ff_multi: MLP width divided by the LLM's width.
        image_path: Images as clips of equal frames, like videos (`unified`), or as one frame of the
            first encoder through a connector of their own (`split`).
    """

    resampler: str = "perceiver"
    depth: int = 1
    num_heads: int = 16
    head_dim: int = 96
    num_key_value_heads: int = 4
    ff_multi: int = 4
    image_path: str = "unified"

    def __post_init__(self) -> None:
        for name, choices in (("resampler", RESAMPLER_NAMES), ("image_path", IMAGE_PATHS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"connector: unknown {name} {getattr(self, name)!r}; "
                    f"choose from {', '.join(choices)}"
                )
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"connector: num_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "ConnectorSettings":
        """Build from a dictionary; a key that is no setting is a ValueError."""
        known = [setting.name for setting in fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(
                f"connector: unknown setting {', '.join(unknown)}; choose from {', '.join(known)}"
            )
        return cls(**settings)


@strict
class ApolloConfig(PreTrainedConfig):
    """Everything that shapes an Apollo model.

    Args:
        encoders: One or two encoder configurations (or dictionaries with a `model_type` of
            `ENCODER_CONFIGS`). With two, their features are concatenated in this order; the paper's
            order is the image encoder first.
        selected_layers: For each encoder the hidden state that is used, as an index into its layers
            + 1 hidden states. -2, the default, is the output of the last layer but one (released
            `mm_vision_select_layer`).
        connector: Settings of the connector, see `ConnectorSettings`.
        text_config: The LLM's configuration; Qwen2 by default.
        tokens_per_clip: LLM tokens per clip. The released models use 128 per 4-frame clip, the
            paper's ablations 64.
        frames_per_clip: Frames in a clip (paper Sec. 6: 4).
        clip_duration_s: Seconds that a clip covers (released `clip_duration`: 2, which makes 2
            frames a second).
        token_integration: One of `TOKEN_INTEGRATIONS` (paper Table 2).
        image_token_id: Id of the placeholder for one token of an image.
        video_token_id: Id of the placeholder for one token of a video.
        encode_batch_size: Clips that go through the encoders at once when no gradient is needed
            (released: 25).
        note: What the model says about itself to its users, e.g. what it was trained on.

    Raises:
        ValueError: For an unknown encoder, resampler or format, no encoder or more than two, or a
            clip length that an encoder cannot take.
    """

    model_type = "apollo_vlm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    encoders: list = field(default_factory=lambda: _released_encoders())
    selected_layers: list = field(default_factory=list)
    connector: dict = field(default_factory=dict)
    text_config: Any = None
    tokens_per_clip: int = 128
    frames_per_clip: int = 4
    clip_duration_s: float | int = 2.0
    token_integration: Literal["none", "start_end", "timestamps", "timestamps_start_end"] = (
        "timestamps"
    )
    image_token_id: int = 151665
    video_token_id: int = 151666
    encode_batch_size: int = 25
    tie_word_embeddings: bool = False
    note: str = ""

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn dictionaries into configurations and check that they fit together."""
        self.text_config = _text_config(self.text_config)
        # The LLM's own setting rules: a second value at the top could only disagree with it.
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self.encoders = [_encoder_config(encoder) for encoder in self.encoders]
        self.connector = asdict(ConnectorSettings.from_dict(self.connector))
        self.selected_layers = self.selected_layers or [-2] * len(self.encoders)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if not 1 <= len(self.encoders) <= 2:
            raise ValueError(f"encoders: one or two are supported, got {len(self.encoders)}")
        if len(self.selected_layers) != len(self.encoders):
            raise ValueError(
                f"selected_layers: one per encoder is needed, got {len(self.selected_layers)} "
                f"for {len(self.encoders)} encoders"
            )
        for name in ("tokens_per_clip", "frames_per_clip", "clip_duration_s", "encode_batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for encoder, layer in zip(self.encoders, self.selected_layers, strict=True):
            num_layers = encoder.num_hidden_layers
            if not -num_layers <= layer <= num_layers or layer == 0:
                raise ValueError(
                    f"selected_layers: {encoder.model_type} has {num_layers} layers, got {layer}"
                )
            tubelet_size = getattr(encoder, "tubelet_size", 1)
            if self.frames_per_clip % tubelet_size:
                raise ValueError(
                    f"frames_per_clip: {encoder.model_type} takes a multiple of {tubelet_size}, "
                    f"got {self.frames_per_clip}"
                )

    @property
    def connector_settings(self) -> ConnectorSettings:
        """The connector's settings as a value with named fields."""
        return ConnectorSettings.from_dict(self.connector)

    def to_dict(self) -> dict[str, Any]:
        """Serialise, the list of encoder configurations included."""
        output = super().to_dict()
        output["encoders"] = [encoder.to_diff_dict() for encoder in self.encoders]
        for encoder in output["encoders"]:
            encoder.pop("transformers_version", None)
        return output


SIGLIP_SO400M: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
"""Shape of siglip-so400m-patch14-384, the image encoder of the released models."""


def _released_encoders() -> list[PreTrainedConfig]:
    return [_encoder_config(SIGLIP_SO400M), InternVideo2Config()]


def _encoder_config(encoder: dict | PreTrainedConfig) -> PreTrainedConfig:
    kind = encoder.get("model_type") if isinstance(encoder, dict) else encoder.model_type
    if kind not in ENCODER_CONFIGS:
        raise ValueError(
            f"encoders: unknown encoder {kind!r}; choose from {', '.join(ENCODER_CONFIGS)}"
        )
    if isinstance(encoder, PreTrainedConfig):
        return encoder
    return ENCODER_CONFIGS[kind](**{k: v for k, v in encoder.items() if k != "model_type"})


def _text_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    settings = dict(config or {})
    kind = settings.pop("model_type", "qwen2")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"text_config: transformers knows no model_type {kind!r}")
    return CONFIG_MAPPING[kind](**settings)
