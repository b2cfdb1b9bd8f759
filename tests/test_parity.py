"""Our model against numbers that were computed with the reference implementation.

The vectors lie in `tests/parity_vectors/` or in the folder named by APOLLO_PARITY_DIR; they are
found by their names, so that further ones of the same layout are picked up. Their README tells what
each is.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig

from apollo.model import encoders
from apollo.model.configuration import ApolloConfig, ConnectorSettings
from apollo.model.connector import Connector
from apollo.model.encoders import HALF, IMAGENET_MEAN, IMAGENET_STD
from apollo.model.image_processing import Preprocessing
from apollo.model.internvideo2 import (
    InternVideo2Model,
    interpolate_position_table,
    sincos_position_table,
)
from apollo.model.modeling import ApolloForConditionalGeneration, load_encoder
from apollo.model.processing import ApolloProcessor
from apollo.video import ClipSampling, sample

VECTORS = Path(os.environ.get("APOLLO_PARITY_DIR", Path(__file__).parent / "parity_vectors"))
STATE = "state_dict."
PENULTIMATE = -2


def files(pattern: str) -> list:
    """Every file of a kind, as parameters of a test."""
    return [pytest.param(path, id=path.stem) for path in sorted(VECTORS.glob(pattern))]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Check that the largest difference is at most `tolerance` times the largest value, or 1."""
    assert ours.shape == theirs.shape
    error = (ours.float() - theirs).abs().max().item()
    assert error <= tolerance * max(1.0, theirs.abs().max().item())


def weights_of(vectors: dict, prefix: str = STATE) -> dict:
    return {name.removeprefix(prefix): v for name, v in vectors.items() if name.startswith(prefix)}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("pattern", ["connector_*", "alt_*", "internvideo2*", "siglip*", "e2e*"])
def test_there_are_vectors(pattern):
    assert list(VECTORS.glob(f"{pattern}.safetensors"))


# ---- connectors


def settings_of(config: dict, resampler: str) -> ConnectorSettings:
    return ConnectorSettings(
        resampler=resampler,
        depth=config["resampler_depth"],
        num_heads=config["resampler_n_heads"],
        head_dim=config["resampler_head_dim"],
        num_key_value_heads=config["num_key_value_heads"],
        ff_multi=config["ff_multi"],
    )


def connector_of(path: Path, resampler: str) -> tuple[Connector, dict, torch.Tensor]:
    """The connector of a file with its weights, the vectors, and the input with its grid."""
    described = "alternatives" if path.stem.startswith("alt_") else "perceiver"
    cases = json.loads((VECTORS / f"connector_{described}.json").read_text())["cases"]
    config, vectors = cases[path.stem]["config"], load_file(path)
    grid = tuple(config["token_input_shape"])
    connector = Connector(
        settings_of(config, resampler),
        config["vision_hidden_size"],
        config["text_hidden_size"],
        config["num_output_tokens"],
        grid,
    )
    connector.load_state_dict(weights_of(vectors))
    features = vectors["input"]
    return connector, vectors, features.reshape(len(features), *grid, -1)


@pytest.mark.parametrize("path", files("connector_perceiver_*.safetensors"))
def test_perceiver_resampler(path):
    connector, vectors, features = connector_of(path, "perceiver")
    assert_close(connector(features), vectors["output"])
    # Tiny activations: the norm's epsilon shows.
    connector.load_state_dict(weights_of(vectors, "eps_probe.override."), strict=False)
    assert_close(connector(features), vectors["eps_probe.output"])


ALTERNATIVES = {("mlp2x_gelu", "avg"): "mlp_pool", ("conv2d_2x2", "avg"): "conv_pool"}
"""Projector and resampler of the reference -> ours; the others are not part of our study."""


@pytest.mark.parametrize("path", files("alt_*.safetensors"))
def test_the_studys_alternatives(path):
    cases = json.loads((VECTORS / "connector_alternatives.json").read_text())["cases"]
    config = cases[path.stem]["config"]
    kind = ALTERNATIVES.get((config.get("projector_type"), config.get("resampler_type")))
    if kind is None:
        pytest.skip("not one of our connectors")
    connector, vectors, features = connector_of(path, kind)
    assert_close(connector(features), vectors["output"])
    projected = connector.proj(features)
    assert_close(projected, vectors["projector_output"])


# ---- encoders


def load_from_folder(folder: Path, config: dict, weights: dict) -> torch.nn.Module:
    """Save weights with their original names beside a config and load them as a user would."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModel.from_pretrained(folder).eval()


def internvideo2_config(config: dict) -> dict:
    derived = ("mlp_ratio", "mlp_hidden", "drop_path_rate")
    kept = {key: value for key, value in config.items() if key not in derived}
    return kept | {"model_type": "internvideo2", "architectures": ["InternVideo2Model"]}


@pytest.fixture(params=files("internvideo2.json"))
def video_encoder(request, tmp_path):
    config = json.loads(request.param.read_text())["config"]
    weights = load_file(VECTORS / "internvideo2_weights.safetensors")
    return load_from_folder(tmp_path, internvideo2_config(config), weights)


@pytest.fixture
def video_io():
    return load_file(VECTORS / "internvideo2_io.safetensors")


def frames_first(clips: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W), as the reference has it, to our (B, T, 3, H, W)."""
    return clips.transpose(1, 2)


def test_internvideo2_stops_early(video_encoder, video_io):
    clips = frames_first(video_io["input"])
    depth = video_encoder.config.depth
    for blocks, name in ((depth, "output_idx_minus1"), (depth - 1, "output_idx_minus2")):
        assert_close(video_encoder(clips, num_blocks=blocks).last_hidden_state, video_io[name])
    image = video_encoder(clips[:, :1], num_blocks=depth - 1).last_hidden_state
    assert_close(image, video_io["image_mode.output_idx_minus2"])


def test_internvideo2_takes_other_numbers_of_frames(video_encoder, video_io):
    clips = frames_first(video_io["tower.input_8frames"])
    config = video_encoder.config
    hidden = video_encoder(clips, num_blocks=config.depth - 1).last_hidden_state
    assert_close(hidden, video_io["interp_8frames.output_idx_minus2"])
    side = config.img_size // config.patch_size
    described = json.loads((VECTORS / "internvideo2.json").read_text())
    larger = described["interp_larger_image"]["to_img_size"] // config.patch_size
    for grid, name in (
        ((8, side, side), "interp_8frames"),
        ((4, larger, larger), "interp_larger_image"),
    ):
        table = interpolate_position_table(video_encoder.pos_embed, (4, side, side), grid)
        assert_close(table, video_io[f"{name}.pos_embed"], 1e-5)


def test_internvideo2_as_a_tower(video_encoder, video_io):
    tower = encoders.cut(video_encoder, PENULTIMATE, 4)
    eight = frames_first(video_io["tower.input_8frames"])
    four = frames_first(video_io["input"])
    one = eight[:, :1].expand(-1, 4, -1, -1, -1)
    assert_close(encoders.encode(tower, four), video_io["tower.output_4frames"])
    assert_close(encoders.encode(tower, eight[:, ::2]), video_io["tower.output_8frames"])
    assert_close(encoders.encode(tower, one), video_io["tower.output_1frame"])


def test_internvideo2_with_tiny_activations(video_encoder, video_io):
    probe = load_file(VECTORS / "internvideo2_eps_probe.safetensors")
    video_encoder.load_state_dict(weights_of(probe, "override."), strict=False)
    clips, blocks = frames_first(video_io["input"]), video_encoder.config.depth - 1
    hidden = video_encoder(clips, num_blocks=blocks).last_hidden_state
    assert_close(hidden, probe["output_idx_minus2"])


def test_position_tables(video_encoder):
    tables = load_file(VECTORS / "internvideo2_sincos_init.safetensors")
    config = video_encoder.config
    side = config.img_size // config.patch_size
    width, frames = config.d_model, config.num_frames
    assert_close(sincos_position_table(width, frames, side), tables["pos_embed_init"], 1e-5)
    assert_close(sincos_position_table(width, 1, side), tables["img_pos_embed_init"], 1e-5)
    for name, expected in tables.items():
        if name.startswith("sincos_d"):
            width, side, frames = (int(part[1:]) for part in name.split("_")[1:])
            assert_close(sincos_position_table(width, frames, side)[0], expected, 1e-5)


def siglip(folder: Path, config: dict, weights: dict) -> torch.nn.Module:
    folder.mkdir(exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    SiglipVisionConfig(**config).save_pretrained(folder)
    return load_encoder(folder)


@pytest.mark.parametrize("path", files("siglip_select*.safetensors"))
def test_siglip_features(path, tmp_path):
    vectors = load_file(path)
    case = json.loads((VECTORS / "towers.json").read_text())[path.stem]
    model = siglip(tmp_path, case["config"], weights_of(vectors))
    tower = encoders.cut(model, case["mm_vision_select_layer"], 4)
    assert_close(encoders.encode(tower, vectors["pixel_values"]), vectors["features"])


@pytest.mark.parametrize("path", files("hybrid_fuse*.safetensors"))
def test_fusion(path):
    vectors = load_file(path)
    image = vectors["siglip_features"]
    grid = tuple(image.shape[1:4])
    for video, fused in (
        ("internvideo2_features", "fused"),
        ("temporal.video_features", "temporal.fused"),
    ):
        ours = encoders.fuse([image, vectors[video]], grid)
        assert_close(ours.flatten(1, 3), vectors[fused], 1e-5)


# ---- the whole model


@pytest.fixture(params=files("e2e.json"))
def whole(request, tmp_path):
    """The whole model with the reference's weights, and its inputs and outputs."""
    configs = json.loads(request.param.read_text())["configs"]
    parts = ("siglip", "internvideo2", "connector", "llm", "io")
    load = {part: load_file(VECTORS / f"e2e_{part}.safetensors") for part in parts}
    image_encoder = siglip(tmp_path / "siglip", configs["siglip"], load["siglip"])
    (tmp_path / "video").mkdir()
    video_encoder = load_from_folder(
        tmp_path / "video", internvideo2_config(configs["internvideo2"]), load["internvideo2"]
    )
    assert isinstance(video_encoder, InternVideo2Model)
    described = {k: v for k, v in configs["llm"].items() if k not in ("attention", "qkv_bias")}
    theta = described.pop("rope_theta")
    llm = Qwen2ForCausalLM(
        Qwen2Config(**described, rope_parameters={"rope_type": "default", "rope_theta": theta})
    )
    llm.load_state_dict(load["llm"])
    connector = settings_of(configs["connector"], "perceiver")
    config = ApolloConfig(
        encoders=[image_encoder.config, video_encoder.config],
        text_config=llm.config,
        connector=asdict(connector),
        tokens_per_clip=configs["connector"]["num_output_tokens"],
        image_token_id=-201,
        video_token_id=-200,
    )
    model = ApolloForConditionalGeneration(config).eval()
    model.model.encoders = torch.nn.ModuleList(
        encoders.cut(encoder, configs["mm_vision_select_layer"], 4)
        for encoder in (image_encoder, video_encoder)
    )
    model.model.llm, model.lm_head = llm.model, llm.lm_head
    model.model.connector.load_state_dict(load["connector"])
    return model, load["io"]


def pixels_of(io: dict) -> list[torch.Tensor]:
    """Pixel values of all samples, one tensor per encoder."""

    def joined(encoder: str) -> torch.Tensor:
        names = sorted(name for name in io if name.startswith(f"pixel_values.{encoder}."))
        return torch.cat([io[name] for name in names])

    return [joined("siglip"), frames_first(joined("internvideo2"))]


@pytest.mark.parametrize("encode_batch_size", [None, 1])
def test_end_to_end(whole, encode_batch_size):
    model, io = whole
    if encode_batch_size:
        model.config.encode_batch_size = encode_batch_size
    pixels, read = pixels_of(io), io["attention_mask"].bool()
    features = model.encode(pixels)
    assert_close(features.flatten(1, 3), io["fused_tokens"])
    assert_close(model.connect(features), io["connector_tokens"])
    assert_close(model.model.embed(io["input_ids"], pixels)[read], io["inputs_embeds"][read])
    output = model(io["input_ids"], io["attention_mask"], pixel_values=pixels, labels=io["labels"])
    assert_close(output.logits[read], io["logits"][read])
    assert_close(output.loss[None], io["loss"])


# ---- preprocessing


@pytest.mark.parametrize("path", files("preprocessing*.safetensors"))
def test_preprocessing(path):
    vectors = load_file(path)
    size = json.loads(path.with_suffix(".json").read_text())["size"]
    for name in [name for name in vectors if name.endswith(".frames")]:
        clip, frames = name.removesuffix(".frames"), vectors[name].numpy()
        ours = Preprocessing(size, HALF, HALF, "pillow_bicubic")(frames)
        assert_close(ours, vectors[f"{clip}.siglip"][0], 1e-5)
        ours = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bilinear")(frames)
        theirs = frames_first(vectors[f"{clip}.internvideo2"])[0]
        levels = (ours - theirs).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
        assert levels.max() <= 1.001  # the reference rounds to whole levels as OpenCV does


# ---- sampling


def sampling_rows() -> list:
    """Rows of every sampling file."""
    return [
        pytest.param(row, id=f"{row['total_frames']}-frames-{row['fps_name']}-fps-{number}")
        for path in sorted(VECTORS.glob("sampling*.json"))
        for number, row in enumerate(json.loads(path.read_text())["rows"])
    ]


@pytest.mark.parametrize("row", sampling_rows())
def test_released_sampling(row):
    num_frames, fps = row["total_frames"], row["original_fps"]
    duration_s, ratio = num_frames / fps, row.get("clip_sampling_ratio", 1)
    budget = max(1, math.ceil(duration_s / 2 * ratio))
    times_s, spans_s = sample(duration_s, ClipSampling("released", max_clips=budget), fps)
    indices = np.floor(times_s * fps).astype("<i8")
    if row.get("error") or row["out_of_range"]:  # the reference fails; ours shows frames that exist
        assert indices.min() >= 0 and indices.max() <= max(0, num_frames - 1)
        return
    assert hashlib.sha256(indices.tobytes()).hexdigest() == row["indices_sha256"]
    if "timestamps" in row:
        np.testing.assert_allclose(spans_s, row["timestamps"], rtol=0, atol=1e-9)
    else:
        shown = spans_s[[0, row["middle_index"], -1]]
        expected = row["timestamps_first_middle_last"]
        np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("row", sampling_rows())
def test_our_own_sampling_covers_every_video_to_its_end(row):
    duration_s = row["total_frames"] / row["original_fps"]
    for max_clips in (None, 84):
        _, spans_s = sample(duration_s, ClipSampling(max_clips=max_clips))
        assert spans_s[0, 0] == 0
        assert spans_s[-1, 1] == pytest.approx(duration_s, abs=0.021)


# ---- prompts


@dataclass
class Clips:
    """As much of loaded clips as a prompt tells of."""

    spans_s: np.ndarray
    duration_s: float
    frames: np.ndarray


@pytest.mark.parametrize("path", files("prompts*.json"))
def test_released_prompts(path):
    described = json.loads(path.read_text())
    processor = ApolloProcessor(
        TOKENIZER,
        preprocessing=[],
        tokens_per_clip=described["num_repeat_token"],
        max_clips=max_clips_for_budget(described),
        prompt_format="released",
        sampling="released",
    )
    sampling = ClipSampling(processor.sampling, max_clips=processor.max_clips)
    for case in described["cases"].values():
        fps = case["original_fps"]
        duration_s = case["total_frames"] / fps
        _, spans_s = sample(duration_s, sampling, fps)
        clips = Clips(spans_s, duration_s, np.zeros((len(spans_s), 4, 1, 1, 3), np.uint8))
        parts = [{"type": "video", "video": clips}, {"type": "text", "text": described["question"]}]
        assert written(processor, [{"role": "user", "content": parts}]) == case["prompt"]
        assert case["replace_string"] in case["prompt"]
    said = described["text_only_two_turns"].split("<|im_end|>\n")
    words = [turn.split("\n", 1)[1] for turn in said[1:-1]]
    roles = ("user", "assistant", "user")
    turns = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
    assert written(processor, turns) == described["text_only_two_turns"]


def max_clips_for_budget(described: dict) -> int:
    tokens = described["model_max_length"] * described["window_ratio"]
    return math.ceil(tokens / described["num_repeat_token"])


def written(processor: ApolloProcessor, messages: list) -> str:
    """The prompt with its placeholders, up to where the answer begins."""
    prompts, spans, media = processor._render([messages], add_generation_prompt=True)
    return "".join(text for text, _ in processor._pieces(prompts[0], spans[0], media[0]))
