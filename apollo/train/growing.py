"""A wider or deeper language model that starts as a smaller one: same answers, more room to learn.

The larger micro language models would need most of a day each to read from nothing. Instead they
begin as several copies of a trained one side by side (HyperCloning, arXiv 2409.12903), whose hidden
state is the small one's repeated, or with layers between its own that add nothing yet (block
expansion, arXiv 2401.02415). Every logit is the same to rounding, and what the small one learnt
does not have to be learnt again. Read next: `llm_part.py`, which teaches them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
NOISE = 1.0
"""Size of what makes the copies differ, relative to the weights that a copy starts with."""


@torch.no_grad()
def deepen(small: Qwen2ForCausalLM, layers: int) -> Qwen2ForCausalLM:
    """Make a model of more layers that computes the same.

    New layers are spread between the old ones: each is a copy of the one before it whose two
    outputs start at zero.

    Args:
        small: It stays as it is.
        layers: How many in all.
    """
    old = small.config.num_hidden_layers
    large = _empty(small, num_hidden_layers=layers, layer_types=None)
    large.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    large.model.norm.load_state_dict(small.model.norm.state_dict())
    sources = [number * old // layers for number in range(layers)]
    for number, source in enumerate(sources):
        layer = large.model.layers[number]
        layer.load_state_dict(small.model.layers[source].state_dict())
        if number and sources[number - 1] == source:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return large


@torch.no_grad()
def widen(small: Qwen2ForCausalLM, copies: int) -> Qwen2ForCausalLM:
    """Make a model of `copies` times the width, heads and hidden units that computes the same.

    A matrix reads each copy of its input with its share of the small matrix's weights and some
    noise; over the copies, which are equal at the start, the noise adds up to nothing. Without it
    they would get equal gradients and stay equal.

    Args:
        small: With tied embeddings; it stays as it is.
        copies: How many, 2 or more.
    """
    assert small.config.tie_word_embeddings, "the head is repeated with the embeddings"
    large = _empty(small, **{size: copies * getattr(small.config, size) for size in WIDTHS})
    source = small.state_dict()
    for name, weight in large.named_parameters():
        old = source[name].float()
        if name.endswith("embed_tokens.weight"):
            new = old.repeat(1, copies)
        elif old.dim() == 2:
            parts = NOISE * old.std() * torch.randn(copies, copies * old.shape[0], old.shape[1])
            parts += old.repeat(copies, 1) - parts.mean(0)
            new = torch.cat(list(parts / copies), dim=1)
        else:  # norms and biases
            new = old.repeat(copies)
        weight.copy_(new)
    # The tied head adds up the copies.
    large.model.norm.weight /= copies
    return large


def _empty(small: Qwen2ForCausalLM, **changes: Any) -> Qwen2ForCausalLM:
    """A model of the small one's configuration but for these fields, in float32."""
    config = Qwen2Config(**{**small.config.to_dict(), **changes, "dtype": "float32"})
    return Qwen2ForCausalLM(config)
