"""The connector: fused features of a clip in, a fixed number of LLM tokens out.

A projection brings every feature to the LLM's width and a resampler turns the clip's grid of them
into N tokens. The paper compares three (Table 1); the Perceiver Resampler won and is what the
released models use. Its numbers and parameter names, the misspelt `wheight` included, are those of
the released `mm_connector.py`, so that its files load without renaming. Read next: `modeling.py`,
which puts the tokens into the text.

An image is a clip of equal frames, which the connector reads as it reads those of videos. The other
way that the paper tried (Table 8) is here, too: images through a connector of their own.

Shapes: C clips, (T, H, W) grid of features, P = T * H * W, V width of the features, D width of the
LLM, N tokens per clip.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration import ConnectorSettings

Grid = tuple[int, int, int]


class WeightedNorm(nn.Module):
    """LayerNorm (eps 1e-5) times one more learnt vector, as in the released connector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wheight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        return self.norm(x) * self.wheight


class PerceiverAttention(nn.Module):
    """Latents ask, the clip's features and the latents answer. No mask, positions or bias."""

    def __init__(self, settings: ConnectorSettings, width: int) -> None:
        super().__init__()
        self.num_heads = settings.num_heads
        self.num_key_value_heads = settings.num_key_value_heads
        inner, inner_kv = (
            n * settings.head_dim for n in (self.num_heads, self.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner_kv, bias=False)
        self.v_proj = nn.Linear(width, inner_kv, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Attend from latents (C, N, D) to context (C, P, D) followed by the latents."""
        context = torch.cat([context, latents], dim=1)
        q = self.q_proj(latents).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (
            proj(context).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        # Each key and value head serves the next num_heads / num_key_value_heads query heads. No
        # mask tells queries apart, so these heads ask as one with more queries: keys and values,
        # which are many, need not be repeated.
        heads = (self.num_key_value_heads, self.num_heads // self.num_key_value_heads)
        out = F.scaled_dot_product_attention(q.unflatten(1, heads).flatten(2, 3), k, v)
        out = out.unflatten(2, (heads[1], -1)).flatten(1, 2)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last axis."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PerceiverLayer(nn.Module):
    """One step of the latents: attention and MLP, each on normed input and added to the latents."""

    def __init__(self, settings: ConnectorSettings, width: int) -> None:
        super().__init__()
        self.input_latents_norm = WeightedNorm(width)
        self.input_context_norm = WeightedNorm(width)
        self.self_attn = PerceiverAttention(settings, width)
        self.post_attention_layernorm = WeightedNorm(width)
        self.mlp = GatedMLP(width, settings.ff_multi * width)

    def forward(self, latents: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return new latents (C, N, D); the context (C, P, D) stays what the projection made it."""
        normed = self.input_latents_norm(latents), self.input_context_norm(context)
        latents = latents + self.self_attn(*normed)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    """N learnt latents that read the clip, whatever its grid."""

    def __init__(
        self, settings: ConnectorSettings, width: int, num_tokens: int, grid: Grid
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(num_tokens, width))
        self.layers = nn.ModuleList(PerceiverLayer(settings, width) for _ in range(settings.depth))
        self.norm = WeightedNorm(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (C, T, H, W, D) to tokens (C, N, D)."""
        context = features.flatten(1, 3)  # (C, P, D)
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
        return self.norm(latents)


class AveragePool(nn.Module):
    """Adaptive average pooling of the clip's grid to a grid of N cells, see `pooled_grid`."""

    def __init__(
        self, settings: ConnectorSettings, width: int, num_tokens: int, grid: Grid
    ) -> None:
        super().__init__()
        self.grid = pooled_grid(num_tokens, grid)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (C, T, H, W, D) to tokens (C, N, D)."""
        pooled = F.adaptive_avg_pool3d(features.permute(0, 4, 1, 2, 3), self.grid)
        return pooled.flatten(2).transpose(1, 2)


class ConvProjection(nn.Module):
    """Two 2D convolutions, kernel and stride 2, on each frame, with SiLU between."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(vision_width, width, kernel_size=2, stride=2, bias=False)
        self.layer2 = nn.Conv2d(width, width, kernel_size=2, stride=2, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (C, T, H, W, V) to (C, T, H // 2 // 2, W // 2 // 2, D)."""
        frames = features.flatten(0, 1).permute(0, 3, 1, 2)  # (C * T, V, H, W)
        frames = self.layer2(F.silu(self.layer1(frames)))
        return frames.permute(0, 2, 3, 1).unflatten(0, features.shape[:2])


def linear_projection(vision_width: int, width: int) -> nn.Module:
    """One linear layer (the released `mlp1x_gelu`)."""
    return nn.Sequential(nn.Linear(vision_width, width))


def mlp_projection(vision_width: int, width: int) -> nn.Module:
    """Two linear layers with the exact GELU between them (the released `mlp2x_gelu`)."""
    return nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))


PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "perceiver": linear_projection,
    "mlp_pool": mlp_projection,
    "conv_pool": ConvProjection,
}
"""Connector -> its projection, built from (width of the features, width of the LLM)."""

RESAMPLERS: dict[str, Callable[[ConnectorSettings, int, int, Grid], nn.Module]] = {
    "perceiver": PerceiverResampler,
    "mlp_pool": AveragePool,
    "conv_pool": AveragePool,
}
"""Connector -> its resampler, built from (settings, width of the LLM, tokens per clip, grid)."""


class Connector(nn.Module):
    """A projection and a resampler.

    Args:
        settings: Which, and their shape.
        vision_width: Width V of the fused features.
        width: Width D of the LLM.
        num_tokens: Tokens per clip N.
        grid: Grid (T, H, W) of the fused features.

    Raises:
        ValueError: If the grid is too small for the convolutions.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        vision_width: int,
        width: int,
        num_tokens: int,
        grid: Grid,
    ) -> None:
        super().__init__()
        if settings.resampler == "conv_pool":
            if min(grid[1:]) < 4:
                raise ValueError(
                    f"connector: conv_pool needs at least 4 x 4 patches, got {grid[1:]}"
                )
            grid = (grid[0], grid[1] // 4, grid[2] // 4)
        self.proj = PROJECTIONS[settings.resampler](vision_width, width)
        self.resampler = RESAMPLERS[settings.resampler](settings, width, num_tokens, grid)

    def forward(self, features: torch.Tensor, is_image: torch.Tensor | None = None) -> torch.Tensor:
        """Map fused features (C, T, H, W, V) to LLM tokens (C, N, D), images or not."""
        return self.resampler(self.proj(features))


class SplitConnector(nn.Module):
    """A connector for videos, and one for images that reads one frame of the first encoder.

    Args:
        settings: Of both.
        vision_widths: Width of each encoder's features, which lie in this order in the fused ones.
        width: See `Connector`, as for the two that follow.
        num_tokens: Tokens per clip N.
        grid: Grid (T, H, W) of the fused features.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        vision_widths: list[int],
        width: int,
        num_tokens: int,
        grid: Grid,
    ) -> None:
        super().__init__()
        self.image_width = vision_widths[0]
        self.videos = Connector(settings, sum(vision_widths), width, num_tokens, grid)
        self.images = Connector(settings, self.image_width, width, num_tokens, (1, *grid[1:]))

    def forward(self, features: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
        """Map fused features (C, T, H, W, V), of images where `is_image` (C,), to (C, N, D)."""
        frames = features[is_image][:, :1, ..., : self.image_width]
        tokens = torch.cat([self.videos(features[~is_image]), self.images(frames)])
        order = torch.cat([(~is_image).nonzero(), is_image.nonzero()])[:, 0]
        return tokens[order.argsort()]


def pooled_grid(num_tokens: int, grid: Grid) -> Grid:
    """Choose the grid of `num_tokens` cells that a grid of features is pooled to.

    Of all (t, h, w) with t * h * w = num_tokens and no more steps than the features have, take the
    one whose cells are nearest to square, and among those the one that shrinks time and space most
    alike: 16 tokens of a (4, 5, 5) grid are (4, 2, 2), 128 of (4, 27, 27) are (2, 8, 8).
    """

    def distortion(cells: Grid) -> tuple[float, float]:
        t, h, w = (math.log(cell / size) for cell, size in zip(cells, grid, strict=True))
        return round(abs(h - w), 6), abs(t - (h + w) / 2)

    choices = [
        (t, h, num_tokens // t // h)
        for t in range(1, min(num_tokens, grid[0]) + 1)
        for h in range(1, num_tokens // t + 1)
        if num_tokens % (t * h) == 0
    ]
    return min(choices, key=distortion)


@torch.no_grad()
def init_connector_weights(module: nn.Module) -> None:
    """Give a module of the connector its first weights.

    Linear and convolution layers keep PyTorch's own initialisation, as the released code does.
    Latents are drawn from N(0, 0.02): the released code meant N(0.5, 0.1) but, by a misspelt
    argument, leaves them all zero; equal latents ask the same question until the gradients part
    them, and a common mean of 0.5 is removed by the norm anyway.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None:  # no convolution here has one
            bound = 1 / math.sqrt(module.weight.shape[1])
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, WeightedNorm):
        init.normal_(module.wheight, mean=1.0, std=0.02)
    elif isinstance(module, PerceiverResampler):
        init.normal_(module.latents, std=0.02)
