"""A wider language model that starts as a smaller one: same answers, more room to learn.

The larger micro language models would need most of a day each to read from nothing. Instead they
begin as several copies of a trained one side by side (HyperCloning, arXiv 2409.12903): the hidden
state is the small one's repeated, so every logit is the same to rounding, and what the small one
learnt does not have to be learnt again. Read next: `llm_part.py`, which teaches them.
"""

from __future__ import annotations

import copy

import torch
from transformers import Qwen2ForCausalLM

NOISE = 1.0
"""Size of what makes the copies differ, relative to the weights that a copy starts with."""


@torch.no_grad()
def grow(small: Qwen2ForCausalLM, copies: int) -> Qwen2ForCausalLM:
    """Make a model of `copies` times the width, heads and hidden units that computes the same.

    A matrix reads each copy of its input with its share of the small matrix's weights and some
    noise; over the copies, which are equal at the start, the noise adds up to nothing. Without it
    they would get equal gradients and stay equal.

    Args:
        small: With tied embeddings; it stays as it is.
        copies: How many, 2 or more.
    """
    config = copy.deepcopy(small.config)
    assert config.tie_word_embeddings, "the head is repeated with the embeddings"
    for size in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        setattr(config, size, copies * getattr(config, size))
    config.initializer_range = config.hidden_size**-0.5  # as `llm_part.language_model` has it
    config.dtype = torch.float32
    large = Qwen2ForCausalLM(config)
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
