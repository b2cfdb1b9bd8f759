"""Encoders that learn from pixels alone: self-distillation (DINO) and masked autoencoding.

Both are modules that the one loop can train, `model(**batch, num_items_in_batch=n).loss`, and both
get their views and masks with the batch, so that a batch stays a function of its number. The
paper's study compares such encoders with language-supervised ones (Table 9). What all the world's
questions turn on must survive: a thing's colour and on which side it is, so that nothing here
changes colours or mirrors a picture, as trainings on photographs do. Read next: `encoder_parts.py`,
which trains them.

Shapes: B rows, V views, T frames, S size in pixels, P patches, D width, K prototypes.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Model, VideoMAEForPreTraining
from transformers.utils import ModelOutput

NUM_PROTOTYPES = 256
"""Outputs of the heads; 65,536 in arXiv 2104.14294, for a million photographs."""
BOTTLENECK = 64
"""Width before the prototypes; 256 there."""
TEACHER_MOMENTUM = 0.99
"""Share of the teacher that stays in a step; 0.996 and more there, for trainings fifty times as
long."""
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05
"""arXiv 2104.14294, Section 3.2, whose teacher goes from 0.04 to 0.07."""
SINKHORN_ROUNDS = 3
"""arXiv 2304.07193, Section 4."""
GLOBAL_AREAS, LOCAL_AREAS = (0.4, 1.0), (0.15, 0.4)
"""Share of the picture that a view shows; local views of arXiv 2104.14294 begin at 0.05, which here
is often plain ground."""
NUM_LOCAL_VIEWS = 4
MASKED_PATCHES = 0.4
"""Share of patches hidden from the student; up to 0.5 in arXiv 2304.07193."""
MASKED_TUBES = 0.75
"""Share of tubes hidden from the autoencoder; 0.9 in arXiv 2203.12602, for clips of 16 frames, in
which there is more to go by than in 4."""


# ---- self-distillation


class PrototypeHead(nn.Module):
    """How well tokens (..., D) fit each of K learnt prototypes: cosines (..., K)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, BOTTLENECK),
        )
        self.prototypes = nn.Parameter(torch.randn(NUM_PROTOTYPES, BOTTLENECK))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compare tokens with the prototypes."""
        directions = F.normalize(self.layers(tokens), dim=-1)
        return F.linear(directions, F.normalize(self.prototypes, dim=-1)).float()


class EncoderWithHead(nn.Module):
    """An encoder and its head: what student and teacher both are."""

    def __init__(self, encoder: Dinov2Model) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = PrototypeHead(encoder.config.hidden_size)

    def forward(
        self, pixel_values: torch.Tensor, hidden_patches: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode views (B, 3, S, S), some patches (B, P) hidden, to tokens (B, 1 + P, D)."""
        return self.encoder(pixel_values, bool_masked_pos=hidden_patches).last_hidden_state


class SelfDistillation(nn.Module):
    """A student that must say of part of a picture what its own average says of another part.

    DINO (arXiv 2104.14294): the teacher, a moving average of the student, sorts two large views of
    a picture among prototypes; the student must sort every other view of it, small ones too, in the
    same way. As in DINOv2 (arXiv 2304.07193) it must also sort the patches that are hidden from it;
    they are what an LLM will see.

    The teacher follows when the next training batch comes in: by then the student's step is done,
    and a checkpoint between the two holds all there is to know.

    Args:
        encoder: The student's; the teacher starts as its copy.
    """

    def __init__(self, encoder: Dinov2Model) -> None:
        super().__init__()
        self.student = EncoderWithHead(encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(
        self,
        global_views: torch.Tensor,
        local_views: torch.Tensor,
        hidden_patches: torch.Tensor,
        num_items_in_batch: int | None = None,
    ) -> ModelOutput:
        """Loss of the pictures, averaged over those of the global step.

        Args:
            global_views: (B, 2, 3, S, S).
            local_views: (B, V, 3, s, s) with a smaller size s.
            hidden_patches: (B, 2, P), True where a patch of a global view is hidden from the
                student; of equally many in each.
            num_items_in_batch: Pictures of the global step; B by default.

        Returns:
            `loss`, and `targets` (B, 2, K): what the teacher said of the global views.
        """
        if self.training:
            self._follow()
        hidden = hidden_patches.flatten(0, 1)  # (2 B, P)
        targets, patch_targets = self._targets(global_views, hidden)
        tokens = self.student(global_views.flatten(0, 1), hidden)
        local_tokens = self.student(local_views.flatten(0, 1))
        pictures = torch.cat(
            [
                tokens[:, 0].unflatten(0, global_views.shape[:2]),
                local_tokens[:, 0].unflatten(0, local_views.shape[:2]),
            ],
            dim=1,
        )  # (B, 2 + V, D)
        said = (self.student.head(pictures) / STUDENT_TEMPERATURE).log_softmax(-1)
        patch_said = self.student.head(tokens[:, 1:][hidden]) / STUDENT_TEMPERATURE
        # Every view against both of the teacher's, but none against itself.
        others = 1 - torch.eye(2, said.shape[1], device=said.device)
        pairs = -torch.einsum("bgk,bvk->bgv", targets, said)
        loss = (pairs * others).sum() / (len(pairs) * others.sum())
        loss = loss - (patch_targets * patch_said.log_softmax(-1)).sum(-1).mean()
        rows = num_items_in_batch or len(global_views)
        return ModelOutput(loss=loss * len(global_views) / rows, targets=targets)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the teacher a little towards the student."""
        torch._foreach_lerp_(
            list(self.teacher.parameters()),
            list(self.student.parameters()),
            1 - TEACHER_MOMENTUM,
        )

    @torch.no_grad()
    def _targets(
        self, views: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher says of global views (B, 2, K) and of the patches hidden in them."""
        tokens = self.teacher(views.flatten(0, 1))
        pictures = sort_evenly(self.teacher.head(tokens[:, 0]))
        patches = sort_evenly(self.teacher.head(tokens[:, 1:][hidden]))
        return pictures.unflatten(0, views.shape[:2]), patches


def sort_evenly(cosines: torch.Tensor) -> torch.Tensor:
    """Sort tokens (N, K) among prototypes sharply, each prototype getting about as many.

    The Sinkhorn-Knopp centring of DINOv2. The running mean that DINO subtracts is not enough here:
    after 200 steps with it the teacher knew four kinds of pictures, the four colours of the ground.

    Args:
        cosines: What a head says of all tokens of a batch.

    Returns:
        Shares (N, K) that sum to 1 in each row.
    """
    shares = cosines / TEACHER_TEMPERATURE
    for _ in range(SINKHORN_ROUNDS):
        shares = shares - shares.logsumexp(0)
        shares = shares - shares.logsumexp(1, keepdim=True)
    return shares.exp()


def crop(
    pictures: torch.Tensor,
    rng: np.random.Generator,
    num_views: int,
    size: int,
    areas: tuple[float, float],
) -> torch.Tensor:
    """Cut random squares out of pictures (B, 3, S, S): (B, num_views, 3, size, size).

    Args:
        pictures: The pictures.
        rng: Decides the squares.
        num_views: Squares of each picture.
        size: Side of a view in pixels.
        areas: Smallest and largest share of the picture's area.
    """
    count = len(pictures) * num_views
    side = torch.from_numpy(np.sqrt(rng.uniform(*areas, count))).float()
    # In the coordinates of grid_sample the picture reaches from -1 to 1.
    centre = torch.from_numpy(rng.uniform(-1, 1, (count, 2))).float() * (1 - side)[:, None]
    place = torch.cat([torch.diag_embed(side[:, None].expand(-1, 2)), centre[..., None]], dim=2)
    grid = F.affine_grid(place, [count, 3, size, size], align_corners=False)
    repeated = pictures.repeat_interleave(num_views, 0)
    views = F.grid_sample(repeated, grid, padding_mode="border", align_corners=False)
    return views.unflatten(0, (len(pictures), num_views))


# ---- masked autoencoding


class MaskedAutoencoder(nn.Module):
    """VideoMAE (arXiv 2203.12602): paint the hidden patches of a clip from those that are seen.

    Args:
        model: The encoder, and a small decoder that is thrown away in the end.
    """

    def __init__(self, model: VideoMAEForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixel_values: torch.Tensor,
        hidden_patches: torch.Tensor,
        num_items_in_batch: int | None = None,
    ) -> ModelOutput:
        """Squared error of the hidden pixels, from 0 to 1, averaged over the global step's clips.

        Args:
            pixel_values: (B, T, 3, S, S).
            hidden_patches: (B, P), True where a patch is hidden; of equally many in each clip.
            num_items_in_batch: Clips of the global step; B by default.
        """
        loss = self.model(pixel_values, bool_masked_pos=hidden_patches).loss
        return ModelOutput(
            loss=loss * len(pixel_values) / (num_items_in_batch or len(pixel_values))
        )


def hide(rng: np.random.Generator, rows: int, num_patches: int, share: float) -> torch.Tensor:
    """Hide a share of patches, of equally many in each row: (rows, num_patches), True where."""
    ranks = rng.random((rows, num_patches)).argsort(axis=1)
    return torch.from_numpy(ranks < round(num_patches * share))
