"""The shapes of published parts, so that a model of them can be planned without a file of theirs.

Each stands as its config.json states it on the hub, as far as it differs from the defaults of
transformers. Read next: `joining.py`, which builds with them.
"""

from __future__ import annotations

from typing import Any

from apollo.model.configuration import SIGLIP_SO400M
from apollo.train.recipes import INTERNVIDEO2, SIGLIP

_QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
_QWEN_0P5B = _QWEN | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
_QWEN_1P5B = _QWEN | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
_QWEN_3B = _QWEN | {
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}
_QWEN_4B = _QWEN | {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 40,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "rope_theta": 5e6,
    "tie_word_embeddings": False,
}
_QWEN_7B = _QWEN | {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    SIGLIP: SIGLIP_SO400M,
    INTERNVIDEO2: {"model_type": "internvideo2"},
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_0P5B,
    "Qwen/Qwen2-0.5B-Instruct": _QWEN_0P5B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1P5B,
    "Qwen/Qwen2-1.5B-Instruct": _QWEN_1P5B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN_3B,
    "Qwen/Qwen1.5-4B-Chat": _QWEN_4B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
    "Qwen/Qwen2-7B-Instruct": _QWEN_7B,
    "facebook/dinov2-large": {
        "model_type": "dinov2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
    },
    "MCG-NJU/videomae-large": {
        "model_type": "videomae",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "facebook/vjepa2-vith-fpc64-256": {
        "model_type": "vjepa2",
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "crop_size": 256,
    },
}
"""Hub id of a part of the paper's models or studies -> its shape."""
