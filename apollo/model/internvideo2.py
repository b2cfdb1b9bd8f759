"""InternVideo2's video encoder in plain PyTorch: no fused kernels, no flash-attention package, no
timm.

The paper's best pair of encoders is SigLIP and InternVideo2 (Table 9), and transformers has no
InternVideo2. The numbers and the parameter names follow the released `modeling_internvideo2.py`, so
that its checkpoints load without renaming; only the CLIP heads, which Apollo never calls, are left
out. Read next: `encoders.py`.

Shapes: B clips, T time steps (frames / tubelet), G rows and columns of patches, P = T * G * G, D
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration import InternVideo2Config


class InternVideo2RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis. eps 1e-6 as in the released code."""
        normed = F.rms_norm(x.float(), self.weight.shape, eps=1e-6)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class LayerScale(nn.Module):
    """A learnt factor per channel on a residual branch, multiplied in float32."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the last axis."""
        return (x.float() * self.gamma.float()).to(x.dtype)


class InternVideo2Attention(nn.Module):
    """Self-attention; queries and keys are normed over the full width, before the heads part."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.q_norm = InternVideo2RMSNorm(config.d_model)
        self.k_norm = InternVideo2RMSNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend among all tokens (B, 1 + P, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 + P, D / heads)
            for part in (self.q_norm(q), self.k_norm(k), v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class InternVideo2MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        hidden = int(config.d_model * config.mlp_ratio)
        self.fc1 = nn.Linear(config.d_model, hidden)
        self.fc2 = nn.Linear(hidden, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to the last axis."""
        return self.fc2(F.gelu(self.fc1(x)))


class InternVideo2Block(GradientCheckpointingLayer):
    """Attention and MLP, each with norm, LayerScale and stochastic depth."""

    def __init__(self, config: InternVideo2Config, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = InternVideo2RMSNorm(config.d_model)
        self.attn = InternVideo2Attention(config)
        self.ls1 = LayerScale(config.d_model, config.init_values)
        self.norm2 = InternVideo2RMSNorm(config.d_model)
        self.mlp = InternVideo2MLP(config)
        self.ls2 = LayerScale(config.d_model, config.init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, 1 + P, D) to tokens of the same shape."""
        x = x + self._keep(self.ls1(self.attn(self.norm1(x))))
        return x + self._keep(self.ls2(self.mlp(self.norm2(x))))

    def _keep(self, branch: torch.Tensor) -> torch.Tensor:
        """While training, drop the branch for a random share of the clips."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - self.drop_path)
        return branch * keep / (1.0 - self.drop_path)


class PatchEmbed(nn.Module):
    """Cut clips into patches and embed each."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        size = (config.tubelet_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.d_model, kernel_size=size, stride=size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map frames (B, frames, 3, H, W) to patches (B, T, G, G, D)."""
        patches = self.proj(pixel_values.transpose(1, 2).to(self.proj.weight.dtype))
        return patches.permute(0, 2, 3, 4, 1)


class InternVideo2Model(PreTrainedModel):
    """The encoder: patches, position tables, blocks."""

    config: InternVideo2Config
    config_class = InternVideo2Config
    base_model_prefix = "internvideo2"
    main_input_name = "pixel_values"
    input_modalities = "video"
    supports_gradient_checkpointing = True
    # Attention is always torch's own scaled_dot_product_attention, which picks a flash kernel where
    # there is one.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["InternVideo2Block"]
    # The released files also hold the CLIP heads of InternVideo2's own training, which Apollo never
    # calls.
    _keys_to_ignore_on_load_unexpected = [r"^clip_", r"^final_clip_"]

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__(config)
        grid = config.img_size // config.patch_size
        steps = config.num_frames // config.tubelet_size
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + steps * grid**2, config.d_model))
        self.img_pos_embed = (
            nn.Parameter(torch.zeros(1, 1 + grid**2, config.d_model))
            if config.sep_image_video_pos_embed
            else None
        )
        last = max(1, config.depth - 1)
        self.blocks = nn.ModuleList(
            InternVideo2Block(config, config.drop_path_rate * index / last)
            for index in range(config.depth)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the layer that reads pixels."""
        return self.patch_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerScale):
            init.constant_(module.gamma, self.config.init_values)
        elif isinstance(module, InternVideo2Model):
            config = module.config
            grid = config.img_size // config.patch_size
            steps = config.num_frames // config.tubelet_size
            init.normal_(module.cls_token, std=config.initializer_range)
            if module.pos_embed is not None:
                init.copy_(module.pos_embed, sincos_position_table(config.d_model, steps, grid))
            if module.img_pos_embed is not None:
                init.copy_(module.img_pos_embed, sincos_position_table(config.d_model, 1, grid))

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_blocks: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[torch.Tensor]:
        """Encode clips.

        Args:
            pixel_values: Frames (B, frames, 3, H, W). One frame uses the image position table;
                another number of frames or another size than the configuration's resamples the
                position table.
            num_blocks: Stop after so many blocks; all of them by default. The released
                `x_vis_return_idx` i means `depth + 1 + i` blocks here.
            return_dict: Return a `BaseModelOutput` (default) or a tuple.
            kwargs: Ignored options that transformers hands to every encoder.

        Returns:
            `last_hidden_state` (B, 1 + P, D): the residual stream without a final norm.
        """
        patches = self.patch_embed(pixel_values)
        steps, rows, columns = patches.shape[1:4]
        x = torch.cat(
            [self.cls_token.expand(patches.shape[0], -1, -1), patches.flatten(1, 3)], dim=1
        )
        x = x + self.position_table(steps, rows, columns).to(x.dtype)
        for block in self.blocks[:num_blocks]:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x) if return_dict is not False else (x,)

    def position_table(self, steps: int, rows: int, columns: int) -> torch.Tensor:
        """Return the position embeddings (1, 1 + steps * rows * columns, D) of a clip."""
        grid = self.config.img_size // self.config.patch_size
        if steps == 1 and self.img_pos_embed is not None:
            return interpolate_position_table(
                self.img_pos_embed, (1, grid, grid), (1, rows, columns)
            )
        table_steps = self.config.num_frames // self.config.tubelet_size
        return interpolate_position_table(
            self.pos_embed, (table_steps, grid, grid), (steps, rows, columns)
        )


def interpolate_position_table(
    table: torch.Tensor, old: tuple[int, int, int], new: tuple[int, int, int]
) -> torch.Tensor:
    """Resample a position table (1, 1 + T * G * G, D) from one patch grid (steps, rows, columns) to
    another.

    As in the released code: first linear in time for each place, then bicubic in space for each
        step; the class
    token's entry stays.
    """
    if old == new:
        return table
    dtype = table.dtype
    first, rest = table[:, :1], table[:, 1:].float()
    steps, rows, columns = old
    if new[0] != steps:
        places = rest.view(steps, rows * columns, -1).permute(1, 2, 0)  # (places, D, steps)
        places = F.interpolate(places, size=new[0], mode="linear", align_corners=False)
        rest = places.permute(2, 0, 1)  # (new steps, places, D)
    if new[1:] != (rows, columns):
        maps = rest.reshape(new[0], rows, columns, -1).permute(
            0, 3, 1, 2
        )  # (steps, D, rows, columns)
        maps = F.interpolate(maps, size=new[1:], mode="bicubic", align_corners=False)
        rest = maps.permute(0, 2, 3, 1)
    return torch.cat([first, rest.reshape(1, -1, table.shape[-1]).to(dtype)], dim=1)


def sincos_position_table(width: int, steps: int, grid: int) -> torch.Tensor:
    """Return the initial position table (1, 1 + steps * grid * grid, width).

    A quarter of the channels holds sines and cosines of the time step, the other three quarters
    those of the place, column before row; the class token's entry is zero (released
    `pos_embed.py`).
    """

    def waves(channels: int, positions: torch.Tensor) -> torch.Tensor:
        half = channels // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = positions.double().reshape(-1, 1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    if width % 16:
        raise ValueError(f"internvideo2: d_model must be a multiple of 16, got {width}")
    place_width = width // 4 * 3
    step, row, column = torch.meshgrid(
        torch.arange(steps), torch.arange(grid), torch.arange(grid), indexing="ij"
    )
    parts = [waves(width // 4, step), waves(place_width // 2, column), waves(place_width // 2, row)]
    table = torch.cat(parts, dim=1).float()
    return torch.cat([torch.zeros(1, width), table])[None]
