"""The connectors: shapes, released names, sensible beginnings, and settings that are refused."""

import math

import pytest
import torch
from tiny_models import (
    CONNECTOR,
    PAIR,
    make_config,
    make_image,
    make_model,
    make_processor,
    make_video,
    user,
)

from apollo.model.configuration import ConnectorSettings
from apollo.model.connector import RESAMPLERS, Connector, init_connector_weights, pooled_grid

GRID = (4, 5, 6)


def make(resampler: str, num_tokens: int = 8, grid=GRID, depth: int = 1) -> Connector:
    torch.manual_seed(0)
    settings = ConnectorSettings(
        resampler=resampler, depth=depth, num_heads=4, head_dim=6, num_key_value_heads=2, ff_multi=2
    )
    return Connector(settings, 10, 16, num_tokens, grid).apply(init_connector_weights)


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 16])
def test_tokens_per_clip_is_a_setting(resampler, num_tokens):
    connector = make(resampler, num_tokens)
    features = torch.randn(3, *GRID, 10)
    tokens = connector(features)
    assert tokens.shape == (3, num_tokens, 16)
    torch.testing.assert_close(connector(features.flip(0)), tokens.flip(0))
    assert connector(features[:0]).shape == (0, num_tokens, 16)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert [name for name, p in connector.named_parameters() if p.grad is None] == []


def test_perceiver_names_are_the_released_ones():
    norm = ["wheight", "norm.weight", "norm.bias"]
    layer = "resampler.layers.{}."
    expected = {"proj.0.weight", "proj.0.bias", "resampler.latents"}
    expected |= {f"resampler.norm.{n}" for n in norm}
    for i in range(2):
        for name in ("input_latents_norm", "input_context_norm", "post_attention_layernorm"):
            expected |= {layer.format(i) + f"{name}.{n}" for n in norm}
        expected |= {layer.format(i) + f"self_attn.{n}_proj.weight" for n in "qkvo"}
        expected |= {layer.format(i) + f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert set(make("perceiver", depth=2).state_dict()) == expected


@pytest.mark.parametrize(
    ("width", "parameters"), [(1536, 38_358_528), (2048, 63_727_616), (3584, 177_583_616)]
)
def test_default_connector_has_the_released_size(width, parameters):
    with torch.device("meta"):
        connector = Connector(ConnectorSettings(), 2560, width, 128, (4, 27, 27))
    assert sum(p.numel() for p in connector.parameters()) == parameters


def split_model():
    return make_model(make_config(connector=CONNECTOR | {"image_path": "split"}))


def test_split_images_go_through_a_connector_of_their_own():
    model = split_model()
    connector, width = model.model.connector, model.config.encoders[0].hidden_size
    is_image = torch.tensor([True, False, True, False, False])
    features = torch.randn(5, *model.model.grid, sum(e.hidden_size for e in model.config.encoders))
    tokens = connector(features, is_image)
    torch.testing.assert_close(tokens[~is_image], connector.videos(features[~is_image]))
    for clip in (0, 2):
        frame = features[clip : clip + 1, :1, ..., :width]
        torch.testing.assert_close(tokens[clip : clip + 1], connector.images(frame))
    other = features.clone()
    other[is_image, 1:], other[is_image, ..., width:] = 0.0, 0.0
    torch.testing.assert_close(connector(other, is_image), tokens)


@pytest.mark.parametrize("shown", [[], ["image"], ["video"], ["image", "video", "image"]])
def test_split_takes_any_batch_and_every_parameter_a_gradient(shown):
    model = split_model().train()
    media = [make_image(1) if kind == "image" else make_video(2) for kind in shown]
    messages = [user(*media, "what?"), {"role": "assistant", "content": "a cat"}]
    batch = make_processor(model.config)([messages], with_labels=True)
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    norms = {
        kind: sum(p.grad.norm() for p in module.parameters())
        for kind, module in model.model.connector.named_children()
    }
    assert {kind for kind, norm in norms.items() if norm > 0} == {f"{kind}s" for kind in shown}


def test_split_needs_an_image_encoder_first():
    with pytest.raises(ValueError, match="internvideo2 cannot"):
        make_model(make_config(PAIR[::-1], connector=CONNECTOR | {"image_path": "split"}))


def test_latents_ask_different_questions_from_the_start():
    connector = make_model(make_config()).model.connector
    latents = connector.resampler.latents
    assert torch.pdist(latents).min() > 1e-3
    assert 0.5 < latents.std() / 0.02 < 2
    tokens = connector(torch.randn(1, 4, 5, 5, 32))
    assert torch.pdist(tokens[0]).min() > 1e-3


def test_new_linear_layers_begin_as_pytorchs():
    connector = make_model(make_config()).model.connector
    weight = connector.proj[0].weight
    bound = 1 / math.sqrt(weight.shape[1])
    assert weight.abs().max() <= bound and weight.abs().max() > 0.9 * bound
    assert 0 < connector.proj[0].bias.abs().max() <= bound


def test_pools_average_what_the_projection_made():
    connector = make("mlp_pool", num_tokens=1)
    features = torch.randn(2, *GRID, 10)
    mean = connector.proj(features).mean(dim=(1, 2, 3))
    torch.testing.assert_close(connector(features)[:, 0], mean)


@pytest.mark.parametrize(
    ("num_tokens", "grid", "cells"),
    [
        (16, (4, 5, 5), (4, 2, 2)),
        (8, (4, 3, 3), (2, 2, 2)),
        (128, (4, 27, 27), (2, 8, 8)),
        (1, (4, 6, 6), (1, 1, 1)),
    ],
)
def test_pooled_grid(num_tokens, grid, cells):
    assert pooled_grid(num_tokens, grid) == cells


def test_pooled_grid_always_has_the_asked_number_of_cells():
    for num_tokens in range(1, 65):
        t, h, w = pooled_grid(num_tokens, (4, 6, 6))
        assert t * h * w == num_tokens and t <= 4


def test_small_grids_are_refused_by_convolutions():
    with pytest.raises(ValueError, match="at least 4 x 4 patches"):
        make("conv_pool", grid=(4, 3, 6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(resampler="perciver"), "unknown resampler 'perciver'; choose from perceiver"),
        (dict(image_path="spilt"), "unknown image_path 'spilt'; choose from unified, split"),
        (dict(heads=3), "unknown setting heads; choose from resampler"),
        (dict(num_heads=5), "must be a multiple of num_key_value_heads"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConnectorSettings.from_dict(settings)
