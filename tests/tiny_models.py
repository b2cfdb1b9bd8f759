"""Models, a tokenizer and media that are as small as they can be, for the tests of apollo.model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from apollo.model import (
    ApolloConfig,
    ApolloForConditionalGeneration,
    ApolloProcessor,
    new_special_tokens,
    register,
)

register()

ENCODERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=30,
        patch_size=6,
    ),
    "dinov2": dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=7,
    ),
    "videomae": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=6,
        num_frames=8,
    ),
    "vjepa2": dict(
        hidden_size=24,
        mlp_ratio=2.0,
        num_hidden_layers=2,
        num_attention_heads=2,
        crop_size=24,
        patch_size=6,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    ),
    "internvideo2": dict(
        d_model=16, num_heads=2, depth=2, img_size=24, patch_size=6, init_values=0.1
    ),
}
IMAGE_ENCODERS = ("siglip_vision_model", "dinov2")
VIDEO_ENCODERS = ("videomae", "vjepa2", "internvideo2")
PAIR = ("siglip_vision_model", "internvideo2")
TOKENS_PER_CLIP = 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: no merges, one token per byte, and the special tokens."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    new_special_tokens(tokenizer)
    return tokenizer


TOKENIZER = make_tokenizer()


def make_llm_config(**settings: Any) -> Qwen2Config:
    return Qwen2Config(
        **{
            "vocab_size": len(TOKENIZER),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "pad_token_id": TOKENIZER.pad_token_id,
            "eos_token_id": TOKENIZER.eos_token_id,
            **settings,
        }
    )


CONNECTOR = dict(num_heads=4, head_dim=4, num_key_value_heads=2, ff_multi=2)


def make_config(
    kinds: tuple[str, ...] = PAIR, resampler: str = "perceiver", **settings: Any
) -> ApolloConfig:
    return ApolloConfig(
        **{
            "encoders": [{"model_type": kind, **ENCODERS[kind]} for kind in kinds],
            "connector": CONNECTOR | {"resampler": resampler},
            "text_config": make_llm_config(),
            "tokens_per_clip": TOKENS_PER_CLIP,
            "image_token_id": TOKENIZER.convert_tokens_to_ids("<|image_token|>"),
            "video_token_id": TOKENIZER.convert_tokens_to_ids("<|video_token|>"),
            **settings,
        }
    )


def make_model(config: ApolloConfig, seed: int = 0) -> ApolloForConditionalGeneration:
    torch.manual_seed(seed)
    return ApolloForConditionalGeneration(config).eval()


def make_processor(config: ApolloConfig) -> ApolloProcessor:
    return ApolloProcessor.from_config(config, TOKENIZER)


def make_video(num_clips: int, seed: int = 0, num_frames: int = 4) -> SimpleNamespace:
    """What apollo.video.load_clips returns, as far as the processor looks at it."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (num_clips, num_frames, 18, 26, 3), dtype=np.uint8)
    starts = np.arange(num_clips) * 2.0
    return SimpleNamespace(frames=frames, spans_s=np.stack([starts, starts + 2.0], axis=1))


def make_image(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (20, 15, 3), dtype=np.uint8))


def user(*content: Any) -> dict[str, Any]:
    """A user's message of strings, images and videos."""
    parts: list[dict[str, Any]] = []
    for item in content:
        if isinstance(item, str):
            parts.append({"type": "text", "text": item})
        elif hasattr(item, "spans_s"):
            parts.append({"type": "video", "video": item})
        else:
            parts.append({"type": "image", "image": item})
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def mixed_conversations() -> list[list[dict[str, Any]]]:
    """Text, an image, several images, a video with two turns."""
    return [
        [user("hi"), assistant("yes")],
        [user(make_image(1), "what?"), assistant("a dog")],
        [user(make_image(2), make_image(3), "and now?"), assistant("two")],
        [user(make_video(3), "when?"), assistant("late"), user("sure?"), assistant("no")],
    ]
