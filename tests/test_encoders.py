"""Every encoder is run at the right layer, on the right frames, and two meet on one grid."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ENCODERS as TINY
from tiny_models import IMAGE_ENCODERS, make_config
from transformers import AutoModel

from apollo.model import InternVideo2Config, InternVideo2Model, encoders
from apollo.model.configuration import ENCODER_CONFIGS
from apollo.model.internvideo2 import interpolate_position_table, sincos_position_table

NUM_FRAMES = 4


def make(kind: str, layer: int = -2):
    torch.manual_seed(0)
    return encoders.build(ENCODER_CONFIGS[kind](**TINY[kind]), layer, NUM_FRAMES).eval()


def clips_for(model, num_clips: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    size = encoders.image_size(model.config)
    return torch.randn(num_clips, NUM_FRAMES, 3, size, size)


def test_tables_name_the_same_encoders():
    assert list(encoders.ENCODERS) == list(ENCODER_CONFIGS) == list(TINY)


@pytest.mark.parametrize("kind", TINY)
def test_features_have_the_grid_and_every_parameter_a_gradient(kind):
    model = make(kind)
    features = encoders.encode(model, clips_for(model))
    assert features.shape == (2, *encoders.grid(model.config, NUM_FRAMES), model.config.hidden_size)
    features.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", TINY)
def test_no_clips_give_no_features_and_zero_gradients(kind):
    model = make(kind)
    features = encoders.encode(model, clips_for(model, 0))
    assert features.shape == (0, *encoders.grid(model.config, NUM_FRAMES), model.config.hidden_size)
    features.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "internvideo2"])
def test_selected_layer_is_transformers_hidden_state(kind, layer):
    config = ENCODER_CONFIGS[kind](**{**TINY[kind], "num_frames": NUM_FRAMES})
    whole = encoders.ENCODERS[kind].model_class(config).eval()
    pixels = clips_for(whole)
    inputs = pixels.flatten(0, 1) if kind in IMAGE_ENCODERS else pixels
    with torch.no_grad():
        expected = whole(inputs, output_hidden_states=True).hidden_states[layer]
        features = encoders.encode(encoders.cut(whole, layer, NUM_FRAMES), pixels)
    if kind == "dinov2":
        expected = expected[:, 1:]
    assert torch.equal(features.reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", TINY)
def test_clips_are_independent_and_image_encoders_see_single_frames(kind):
    model = make(kind)
    pixels = clips_for(model)
    with torch.no_grad():
        features = encoders.encode(model, pixels)
        swapped = encoders.encode(model, pixels.flip(0))
        reversed_frames = encoders.encode(model, pixels.flip(1))
    torch.testing.assert_close(swapped, features.flip(0))
    same = torch.allclose(reversed_frames, features.flip(1), atol=1e-5)
    assert same == (kind in IMAGE_ENCODERS)


def test_videomae_takes_shorter_clips_but_not_longer_ones():
    with pytest.raises(ValueError, match="videomae: made for clips of up to 8 frames"):
        encoders.build(ENCODER_CONFIGS["videomae"](**TINY["videomae"]), -2, 16)


def test_fuse_concatenates_in_order_and_leaves_the_larger_grid_untouched():
    image, video = torch.randn(2, 4, 5, 5, 3), torch.randn(2, 2, 3, 3, 7)
    fused = encoders.fuse([image, video], (4, 5, 5))
    assert fused.shape == (2, 4, 5, 5, 10)
    assert torch.equal(fused[..., :3], image)
    constant = encoders.fuse([image, torch.full_like(video, 2.5)], (4, 5, 5))
    torch.testing.assert_close(constant[..., 3:], torch.full((2, 4, 5, 5, 7), 2.5))
    assert encoders.fuse([image[:0], video[:0]], (4, 5, 5)).shape == (0, 4, 5, 5, 10)
    half = encoders.fuse([image.bfloat16(), video.bfloat16()], (4, 5, 5))
    assert half.dtype == torch.bfloat16


def test_fused_grid_is_the_elementwise_maximum():
    config = make_config(("dinov2", "videomae"))
    assert encoders.fused_grid(config.encoders, 4) == (4, 4, 4)
    config = make_config(("siglip_vision_model", "vjepa2"))
    assert encoders.fused_grid(config.encoders, 4) == (4, 5, 5)


def internvideo2(**settings) -> InternVideo2Model:
    torch.manual_seed(0)
    return InternVideo2Model(InternVideo2Config(**{**TINY["internvideo2"], **settings})).eval()


def test_internvideo2_stops_early_and_adds_no_norm():
    model = internvideo2(depth=3)
    pixels = torch.randn(1, 4, 3, 24, 24)
    with torch.no_grad():
        two, three = (model(pixels, num_blocks=n).last_hidden_state for n in (2, 3))
        assert torch.equal(model.blocks[2](two), three)
        assert torch.equal(model(pixels).last_hidden_state, three)


def test_internvideo2_takes_one_frame_other_lengths_and_other_sizes():
    model = internvideo2()
    with torch.no_grad():
        for frames, size in ((1, 24), (8, 24), (4, 36)):
            out = model(torch.randn(1, frames, 3, size, size)).last_hidden_state
            assert out.shape == (1, 1 + frames * (size // 6) ** 2, 16)
        assert torch.equal(model.position_table(1, 4, 4), model.img_pos_embed)
        assert torch.equal(model.position_table(4, 4, 4), model.pos_embed)
    shared = internvideo2(sep_image_video_pos_embed=False)
    assert shared.img_pos_embed is None
    assert shared(torch.randn(1, 1, 3, 24, 24)).last_hidden_state.shape[1] == 17


def test_position_tables():
    table = sincos_position_table(16, 4, 3)
    assert table.shape == (1, 37, 16) and not table[0, 0].any()
    assert interpolate_position_table(table, (4, 3, 3), (4, 3, 3)) is table
    longer = interpolate_position_table(table, (4, 3, 3), (8, 3, 3))
    assert torch.equal(longer[:, 0], table[:, 0])
    # Places do not change when only time is stretched: the last 12 of 16 channels hold the place.
    torch.testing.assert_close(longer[0, 1:10, 4:], table[0, 1:10, 4:])
    # Columns come before rows: a step to the right changes the first half of the place.
    assert not torch.allclose(table[0, 1, 4:10], table[0, 2, 4:10])
    assert torch.equal(table[0, 1, 10:], table[0, 2, 10:])
    with pytest.raises(ValueError, match="multiple of 16"):
        sincos_position_table(24, 4, 3)


def test_internvideo2_drops_paths_only_while_training():
    model = internvideo2(drop_path_rate=0.9)
    pixels = torch.randn(8, 4, 3, 24, 24)
    with torch.no_grad():
        still = [model(pixels).last_hidden_state for _ in range(2)]
        moving = [model.train()(pixels).last_hidden_state for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)


def test_internvideo2_round_trip_ignores_the_clip_heads(tmp_path):
    model = internvideo2()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["clip_projector.norm1_q.weight"] = torch.zeros(16)
    weights["final_clip_decoder.head.bias"] = torch.zeros(16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    pixels = torch.randn(1, 4, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(again(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(d_model=16, num_heads=3), "d_model / num_heads"),
        (dict(img_size=25), "img_size / patch_size"),
        (dict(num_frames=4, tubelet_size=3), "num_frames / tubelet_size"),
    ],
)
def test_internvideo2_refuses_shapes_that_do_not_divide(settings, message):
    with pytest.raises(ValueError, match=message):
        InternVideo2Config(**{**TINY["internvideo2"], **settings})
