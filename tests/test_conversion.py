"""Released checkpoints: converted, loaded and compared with the parts they were written from."""

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ENCODERS, make_video, user
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from apollo.chat import load_model
from apollo.cli import main as apollo
from apollo.model import (
    ApolloConfig,
    ApolloForConditionalGeneration,
    ApolloProcessor,
    InternVideo2Config,
    InternVideo2Model,
    conversion,
)
from apollo.model.conversion import ConversionError, convert, converted, is_released
from apollo.model.encoders import build

VECTORS = Path(os.environ.get("APOLLO_PARITY_DIR", Path(__file__).parent / "parity_vectors"))
SIGLIP_FOLDER = "vision_tower/siglip-so400m-patch14-384"
VIDEO_FOLDER = "vision_tower/internvideo2"
# Of each released size: whether the embeddings are tied, and the number of files of the LLM.
SHAPES = {"1.5B": (True, 1), "3B": (True, 2), "7B": (False, 4)}
TOKENS_PER_CLIP = 4
CONNECTOR = {"num_heads": 4, "head_dim": 4, "num_key_value_heads": 2, "ff_multi": 2, "depth": 1}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def write_shards(folder: Path, weights: dict[str, torch.Tensor], num_shards: int) -> None:
    names = sorted(weights)
    if num_shards == 1:
        save_file({name: weights[name].contiguous() for name in names}, folder / FILE)
        return
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        shares = names[shard::num_shards]
        save_file({name: weights[name].contiguous() for name in shares}, folder / file)
        weight_map |= dict.fromkeys(shares, file)
    write_json(folder / f"{FILE}.index.json", {"metadata": {}, "weight_map": weight_map})


FILE = "model.safetensors"


def make_tokenizer(characters: int | None = None) -> Qwen2Tokenizer:
    """Qwen2's kind of tokenizer with no merges, and ChatML's tokens as stock Qwen2.5 has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:characters]
    tokenizer = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = "the LLM's own template"
    return tokenizer


def write_layout(
    folder: Path,
    tokenizer: Qwen2Tokenizer,
    siglip: dict[str, Any],
    internvideo2: dict[str, Any],
    connector: dict[str, Any],
    llm: dict[str, Any],
) -> None:
    """Write everything of a released folder but the weights."""
    write_json(
        folder / "config.json",
        {
            "architectures": ["ApolloForCausalLM"],
            "model_type": "apollo",
            "attn_implementation": "flash_attention_2",
            "clip_duration": 2,
            "encode_batch_size": 25,
            "llm_cfg": {"model_max_length": 16384},
            "mm_vision_select_layer": -2,
            "model_dtype": "torch.bfloat16",
        },
    )
    names = [Path(SIGLIP_FOLDER).name, Path(VIDEO_FOLDER).name]
    write_json(
        folder / "vision_tower/config.json",
        {"model_type": "hybrid_vision_tower", "configs": {}, "vision_towers": names},
    )
    write_json(
        folder / SIGLIP_FOLDER / "config.json", {"model_type": "siglip_vision_model"} | siglip
    )
    write_json(
        folder / VIDEO_FOLDER / "config.json",
        {"auto_map": {"AutoModel": "x"}, "use_flash_attn": False} | internvideo2,
    )
    fixed = {
        "projector_type": "mlp1x_gelu",
        "resampler_type": "perciver",
        "hidden_act": "silu",
        "resampler_depth": 1,
    }
    write_json(folder / "mm_connector/config.json", fixed | connector)
    fixed = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6}
    write_json(folder / "llm/config.json", fixed | llm)
    tokenizer.save_pretrained(folder / "llm")


def write_released(
    folder: Path, shape: str = "1.5B", dtype: torch.dtype = torch.bfloat16, **llm_settings: Any
) -> ApolloForConditionalGeneration:
    """Write a released folder with random weights; return the model joined from its parts."""
    torch.manual_seed(0)
    tied, num_shards = SHAPES[shape]
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
        **llm_settings,
    }
    video = ENCODERS["internvideo2"] | {"depth": 3}
    image = ENCODERS["siglip_vision_model"] | {"num_hidden_layers": 3}
    tokenizer = make_tokenizer()
    released_connector = {
        "resampler_n_heads": 4,
        "resampler_head_dim": 4,
        "num_key_value_heads": 2,
        "ff_multi": 2,
        "num_output_tokens": TOKENS_PER_CLIP,
        "token_input_shape": [4, 5, 5],
        "torch_dtype": "bfloat16",
    }
    write_layout(folder, tokenizer, image, video, released_connector, settings)
    write_json(
        folder / "llm/generation_config.json",
        {"temperature": 0.7, "top_p": 0.8, "do_sample": True, "repetition_penalty": 1.05},
    )
    rope = {"rope_type": "default", "rope_theta": 1e6}
    llm = Qwen2ForCausalLM(Qwen2Config(**settings, rope_parameters=rope)).to(dtype)
    parts = [
        SiglipVisionModel(SiglipVisionConfig(**image)),
        InternVideo2Model(InternVideo2Config(**video)),
    ]
    for part in parts:
        for parameter in part.to(dtype).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    weights = dict(llm.state_dict())
    if tied:
        weights.pop("lm_head.weight")
    write_shards(folder / "llm", weights, num_shards)
    weights = {f"vision_model.{name}": value for name, value in parts[0].state_dict().items()}
    write_shards(folder / SIGLIP_FOLDER, weights, 1)
    heads = ("clip_pos_embed", "clip_projector.norm1_k.bias", "final_clip_decoder.head.bias")
    weights = parts[1].state_dict() | {name: torch.ones(3, dtype=dtype) for name in heads}
    write_shards(folder / VIDEO_FOLDER, weights, 1)
    model = ApolloForConditionalGeneration.from_parts(
        parts, llm, tokenizer, CONNECTOR, tokens_per_clip=TOKENS_PER_CLIP
    )
    write_shards(folder / "mm_connector", model.model.connector.state_dict(), 1)
    return model


def conversation() -> list[dict[str, Any]]:
    video = make_video(3)
    video.duration_s = 6.0
    return [user(video, "what?")]


def logits_of(folder: Path, batch: Any) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> SimpleNamespace:
    """One folder in the released layout, not to be changed, and its conversion."""
    folder = tmp_path_factory.mktemp("released")
    model = write_released(folder / "source", "3B")
    report = convert(folder / "source", folder / "target")
    return SimpleNamespace(
        source=folder / "source", target=folder / "target", model=model, report=report
    )


# ---- what works


@pytest.mark.parametrize("shape", SHAPES)
def test_converted_model_answers_as_its_parts(shape, tmp_path):
    reference = write_released(tmp_path / "source", shape)
    convert(tmp_path / "source", tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    batch = processor(conversation(), add_generation_prompt=True)
    logits = logits_of(tmp_path / "target", batch)
    with torch.no_grad():
        expected = reference.float()(**batch).logits
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(tmp_path / "again", batch), logits)
    answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(**batch, max_new_tokens=4, do_sample=False), answer)


def test_processor_is_that_of_the_released_weights(released):
    processor = AutoProcessor.from_pretrained(released.target)
    assert (processor.prompt_format, processor.sampling) == ("released", "released")
    assert processor.max_clips == math.ceil(16384 * 0.65 / TOKENS_PER_CLIP)
    text = processor.apply_chat_template(conversation(), add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n\nYou are a helpful vision-language assistant.")


def test_84_clips_at_128_tokens():
    assert math.ceil(16384 * conversion.CLIP_SAMPLING_RATIO / 128) == 84


def test_generation_settings_are_kept_and_a_turn_ends(released):
    model = AutoModelForImageTextToText.from_pretrained(released.target)
    processor = AutoProcessor.from_pretrained(released.target)
    settings = model.generation_config
    assert (settings.temperature, settings.top_p, settings.repetition_penalty) == (0.7, 0.8, 1.05)
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in settings.eos_token_id
    assert settings.pad_token_id == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_every_tensor_is_accounted_for(released):
    stored = {}
    for path in released.source.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            folder = path.parent.relative_to(released.source)
            stored |= {f"{folder}/{name}": file.get_tensor(name) for name in file.keys()}
    report = released.report
    assert set(report.mapped) | set(report.dropped) == set(stored)
    assert not set(report.mapped) & set(report.dropped)
    assert report.missing == []
    written = {}
    for path in released.target.glob("*.safetensors"):
        written |= load_file(path)
    assert set(report.mapped.values()) == set(written)
    for name, ours in report.mapped.items():
        assert stored[name].dtype == written[ours].dtype == torch.bfloat16
        assert torch.equal(stored[name], written[ours]), name
    assert report.num_bytes == sum(tensor.nbytes for tensor in written.values())
    dropped = {name.removeprefix(f"{VIDEO_FOLDER}/") for name in report.dropped}
    assert {"img_pos_embed", "clip_pos_embed", "blocks.2.norm1.weight"} <= dropped
    assert f"{SIGLIP_FOLDER}/vision_model.post_layernorm.weight" in report.dropped
    assert f"{SIGLIP_FOLDER}/vision_model.encoder.layers.2.mlp.fc1.bias" in report.dropped


def test_writing_never_holds_a_whole_tensor(tmp_path):
    path, size = tmp_path / FILE, 1 << 26
    save_file({"a": torch.arange(size // 8).to(torch.int64)}, path)
    ((name, tensor),) = conversion._read_header(path).items()
    tracemalloc.start()
    conversion._write_weights(tmp_path, [(path, [(name, tensor)])], conversion.Report())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
    copied = load_file(tmp_path / "model-00001-of-00001.safetensors")["a"]
    assert torch.equal(copied, torch.arange(size // 8))


def test_mixed_dtypes_stay(tmp_path):
    write_released(tmp_path / "source")
    path = tmp_path / "source/mm_connector" / FILE
    weights = load_file(path)
    weights["resampler.latents"] = weights["resampler.latents"].float()
    save_file(weights, path)
    convert(tmp_path / "source", tmp_path / "target")
    index = json.loads((tmp_path / "target" / f"{FILE}.index.json").read_text())["weight_map"]
    latents, projection = "model.connector.resampler.latents", "model.connector.proj.0.weight"
    with safe_open(tmp_path / "target" / index[latents], "pt") as file:
        assert file.get_tensor(latents).dtype == torch.float32
        assert torch.equal(file.get_tensor(projection), weights["proj.0.weight"])


def test_known_extra_heads_are_dropped(tmp_path):
    write_released(tmp_path / "source")
    path = tmp_path / "source/llm" / FILE
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    save_file({"lm_head.weight": torch.ones(3, 2)}, tmp_path / "source" / FILE)
    report = convert(tmp_path / "source", tmp_path / "target")
    assert {"llm/lm_head.weight", "lm_head.weight"} <= set(report.dropped)


def test_siglip_as_transformers_5_writes_it(tmp_path):
    write_released(tmp_path / "source")
    path = tmp_path / "source" / SIGLIP_FOLDER / FILE
    weights = {key.removeprefix("vision_model."): value for key, value in load_file(path).items()}
    save_file(weights, path)
    convert(tmp_path / "source", tmp_path / "target")
    target = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    loaded = target.model.encoders[0].embeddings.patch_embedding.bias
    assert torch.equal(loaded, weights["embeddings.patch_embedding.bias"])


def test_encoders_keep_the_order_of_the_folder(tmp_path):
    write_released(tmp_path / "source")
    path = tmp_path / "source/vision_tower/config.json"
    edit_json(path, vision_towers=json.loads(path.read_text())["vision_towers"][::-1])
    convert(tmp_path / "source", tmp_path / "target")
    config = ApolloConfig.from_pretrained(tmp_path / "target")
    assert [e.model_type for e in config.encoders] == ["internvideo2", "siglip_vision_model"]


def test_reference_weights_convert_to_the_reference_logits(tmp_path):
    described = json.loads((VECTORS / "e2e.json").read_text())["configs"]
    source = tmp_path / "source"
    # The vectors' vocabulary of 200 has no tokenizer; any that fits will do.
    write_layout(
        source,
        make_tokenizer(150),
        *(described[part] for part in ("siglip", "internvideo2", "connector", "llm")),
    )
    edit_json(source / "config.json", model_dtype="torch.float32")
    parts = {
        "siglip": SIGLIP_FOLDER,
        "internvideo2": VIDEO_FOLDER,
        "connector": "mm_connector",
        "llm": "llm",
    }
    for name, folder in parts.items():
        (source / folder / FILE).write_bytes((VECTORS / f"e2e_{name}.safetensors").read_bytes())
    convert(source, tmp_path / "target")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "target")
    model.config.image_token_id, model.config.video_token_id = -201, -200
    io = load_file(VECTORS / "e2e_io.safetensors")
    pixels = [
        torch.cat([io[f"pixel_values.{name}.sample{row}"] for row in (0, 1)])
        for name in ("siglip", "internvideo2")
    ]
    pixels[1] = pixels[1].transpose(1, 2)
    with torch.no_grad():
        logits = model(io["input_ids"], io["attention_mask"], pixel_values=pixels).logits
    read = io["attention_mask"].bool()
    expected = io["logits"][read]
    bound = 2e-5 * max(1.0, expected.abs().max().item())
    assert (logits[read] - expected).abs().max() <= bound


# ---- loading without converting by hand


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/apollo"


def test_released_folder_loads_as_it_is(released, cache):
    model = ApolloForConditionalGeneration.from_pretrained(released.source, dtype=torch.float32)
    processor = ApolloProcessor.from_pretrained(released.source)
    chat_model, chat_processor = load_model(released.source)
    assert chat_processor.prompt_format == processor.prompt_format == "released"
    assert len(list(cache.iterdir())) == 1  # converted once
    batch = processor(conversation())
    expected = logits_of(released.target, batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        torch.testing.assert_close(chat_model.cpu()(**batch).logits, expected)


def test_changed_source_is_converted_anew(tmp_path, cache):
    write_released(tmp_path / "source")
    first = converted(tmp_path / "source")
    assert converted(tmp_path / "source") == first
    edit_json(tmp_path / "source/config.json", encode_batch_size=7)
    second = converted(tmp_path / "source")
    assert second != first
    assert ApolloConfig.from_pretrained(second).encode_batch_size == 7


def test_hub_id_is_downloaded_first(released, cache, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options.get("revision")))
        return str(released.source)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **options: "found")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert is_released(released.source)
    ApolloForConditionalGeneration.from_pretrained("owner/apollo", revision="main")
    convert("owner/apollo", tmp_path / "target")
    assert asked == [("owner/apollo", "main"), ("owner/apollo", None)]


def test_other_models_are_left_alone(released, cache, monkeypatch):
    def not_there(*names: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_there)
    assert converted("owner/other") == "owner/other"
    assert converted(released.target) == released.target
    assert converted(None) is None
    assert not cache.exists()


def test_command(released, tmp_path, capsys):
    assert apollo(["convert", str(released.source), str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "mm_connector" in out and "CLIP heads" in out and "missing" in out
    assert apollo(["convert", str(released.source), str(tmp_path / "model")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("apollo: error: ") and err.count("\n") == 1


# ---- what does not


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any], folder: str = "mm_connector"):
    def corrupt(source: Path) -> None:
        path = source / folder / FILE
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return corrupt


def truncate(source: Path) -> None:
    path = source / "llm/model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing part": (lambda s: (s / "mm_connector/config.json").unlink(), "mm_connector/config"),
    "missing encoder": (lambda s: (s / VIDEO_FOLDER / "config.json").unlink(), "internvideo2"),
    "missing weights": (lambda s: (s / SIGLIP_FOLDER / FILE).unlink(), "siglip.*missing"),
    "missing shard": (
        lambda s: (s / "llm/model-00001-of-00002.safetensors").unlink(),
        "model-00001-of-00002.safetensors missing",
    ),
    "missing tokenizer": (lambda s: (s / "llm/tokenizer.json").unlink(), "tokenizer"),
    "damaged tokenizer": (lambda s: (s / "llm/tokenizer.json").write_text("{"), "tokenizer"),
    "damaged config": (lambda s: (s / "llm/config.json").write_text("{"), "llm/config.json"),
    "config of a wrong type": (
        lambda s: edit_json(s / "config.json", encode_batch_size="many"),
        "encode_batch_size",
    ),
    "config of a wrong kind": (
        lambda s: edit_json(s / "config.json", llm_cfg="qwen"),
        "its configuration makes no model",
    ),
    "empty grid": (
        lambda s: edit_json(s / "mm_connector/config.json", token_input_shape=[]),
        "its configuration makes no model",
    ),
    "unknown dtype": (
        lambda s: edit_json(s / "config.json", model_dtype="torch.surprise"),
        "model_dtype",
    ),
    "layer counted from the start": (
        lambda s: edit_json(s / "config.json", mm_vision_select_layer=1),
        "mm_vision_select_layer",
    ),
    "config lacks a field": (
        lambda s: write_json(
            s / "mm_connector/config.json",
            {"projector_type": "mlp1x_gelu", "resampler_type": "perciver", "hidden_act": "silu"},
        ),
        "no 'token_input_shape'",
    ),
    "other connector": (
        lambda s: edit_json(s / "mm_connector/config.json", resampler_type="avg"),
        "resampler_type",
    ),
    "other grid": (
        lambda s: edit_json(s / "mm_connector/config.json", token_input_shape=[4, 9, 9]),
        "token_input_shape",
    ),
    "other encoder": (
        lambda s: edit_json(s / "vision_tower/config.json", vision_towers=["dino"]),
        "'dino'",
    ),
    "encoder outside": (
        lambda s: edit_json(s / "vision_tower/config.json", vision_towers=["../siglip"]),
        "vision_towers",
    ),
    "shard outside": (
        lambda s: edit_json(s / f"llm/{FILE}.index.json", weight_map={"a": "../x.safetensors"}),
        "x.safetensors",
    ),
    "small vocabulary": (
        lambda s: edit_json(s / "llm/config.json", vocab_size=100),
        "only 100 embeddings",
    ),
    "truncated": (truncate, "model-00002-of-00002.safetensors is damaged"),
    "wrong shape": (
        edit_weights(lambda w: w.update({"resampler.latents": torch.zeros(5, 16)})),
        r"mm_connector/resampler.latents \(expected \(4, 16\), found \(5, 16\)\) of the wrong",
    ),
    "unknown key": (
        edit_weights(lambda w: w.update({"resampler.more": torch.zeros(1)})),
        "mm_connector/resampler.more unknown",
    ),
    "CLIP head of another part": (
        edit_weights(lambda w: w.update({"clip_decoder.0.head.bias": torch.zeros(1)})),
        "clip_decoder.0.head.bias unknown",
    ),
    "block past the depth": (
        edit_weights(lambda w: w.update({"blocks.3.norm1.weight": torch.ones(16)}), VIDEO_FOLDER),
        "blocks.3.norm1.weight unknown",
    ),
    "missing key": (
        edit_weights(
            lambda w: w.pop("vision_model.embeddings.patch_embedding.bias"), SIGLIP_FOLDER
        ),
        "siglip.*/vision_model.embeddings.patch_embedding.bias missing",
    ),
    "stored twice": (
        edit_weights(
            lambda w: w.update({"embeddings.patch_embedding.bias": torch.zeros(16)}), SIGLIP_FOLDER
        ),
        "vision_model.embeddings.patch_embedding.bias stored twice",
    ),
    "untied without a head": (
        lambda s: edit_json(s / "llm/config.json", tie_word_embeddings=False),
        "llm/lm_head.weight missing",
    ),
    "weights at the root": (
        lambda s: save_file({"surprise": torch.zeros(1)}, s / FILE),
        "surprise unknown",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_folder_is_one_error_and_leaves_nothing(name, released, tmp_path):
    corrupt, message = CORRUPTIONS[name]
    source = tmp_path / "source"
    for path in released.source.rglob("*"):
        if path.is_file():
            (source / path.relative_to(released.source)).parent.mkdir(parents=True, exist_ok=True)
            (source / path.relative_to(released.source)).write_bytes(path.read_bytes())
    corrupt(source)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(source, tmp_path / "new/target")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_interrupted_writing_leaves_nothing(released, tmp_path, monkeypatch):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(released.source, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_target_with_something_in_it_is_refused(released, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ConversionError, match="exists already"):
        convert(released.source, target)
    with pytest.raises(ConversionError, match="exists already"):
        convert(released.source, target / "mine.txt")
    assert (target / "mine.txt").read_text() == "keep"
    (target / "mine.txt").unlink()
    convert(released.source, target)  # an empty folder is no obstacle
    assert (target / "config.json").is_file()


def test_folder_of_another_kind_is_refused(released, tmp_path):
    with pytest.raises(ConversionError, match="not in the released layout"):
        convert(released.target, tmp_path / "target")
    with pytest.raises(ConversionError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "target")


# ---- the released sizes, without their weights

# Of each released size: LLM width, MLP width, layers, heads, KV heads, tied, vocabulary, and the
# parameters of its connector (facts, 1.2 and 1.3).
RELEASED_SIZES = {
    "1.5B": ((1536, 8960, 28, 12, 2, True, 151936), 38_358_528),
    "3B": ((2048, 11008, 36, 16, 2, True, 151936), 63_727_616),
    "7B": ((3584, 18944, 28, 28, 4, False, 152064), 177_583_616),
}


def released_model(size: str) -> ApolloForConditionalGeneration:
    """A released size with its default encoders and connector, on the meta device."""
    (hidden, inner, layers, heads, kv_heads, tied, vocabulary), _ = RELEASED_SIZES[size]
    text_config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        return ApolloForConditionalGeneration(ApolloConfig(text_config=text_config))


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_released_sizes(size):
    model = released_model(size)
    connector = model.model.connector
    assert sum(p.numel() for p in connector.parameters()) == RELEASED_SIZES[size][1]
    width = model.config.text_config.hidden_size
    shapes = {name: tuple(value.shape) for name, value in connector.state_dict().items()}
    assert shapes == connector_shapes(width)
    with torch.no_grad():
        pixels = [torch.empty(2, 4, 3, side, side, device="meta") for side in (384, 224)]
        features = model.encode(pixels)
        assert features.shape == (2, 4, 27, 27, 2560)
        assert model.connect(features).shape == (2, 128, width)


def connector_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released connector (facts, 8.3)."""
    layer = "resampler.layers.0."
    norms = ("input_latents_norm", "input_context_norm", "post_attention_layernorm")
    names = [*(f"{layer}{norm}" for norm in norms), "resampler.norm"]
    parameters = ("norm.weight", "norm.bias", "wheight")
    return {
        "proj.0.weight": (width, 2560),
        "proj.0.bias": (width,),
        "resampler.latents": (128, width),
        f"{layer}self_attn.q_proj.weight": (1536, width),
        f"{layer}self_attn.k_proj.weight": (384, width),
        f"{layer}self_attn.v_proj.weight": (384, width),
        f"{layer}self_attn.o_proj.weight": (width, 1536),
        f"{layer}mlp.gate_proj.weight": (4 * width, width),
        f"{layer}mlp.up_proj.weight": (4 * width, width),
        f"{layer}mlp.down_proj.weight": (width, 4 * width),
        **{f"{name}.{parameter}": (width,) for name in names for parameter in parameters},
    }


INTERNVIDEO2_BLOCK = (
    *("norm1.weight", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("attn.q_norm.weight", "attn.k_norm.weight", "ls1.gamma", "norm2.weight"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"),
)


def internvideo2_names(num_blocks: int) -> set[str]:
    """What a released InternVideo2 file holds besides its CLIP heads (facts, 8.3)."""
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    blocks = {f"blocks.{i}.{name}" for i in range(num_blocks) for name in INTERNVIDEO2_BLOCK}
    return names | blocks


def test_internvideo2_has_the_released_names():
    config = ApolloConfig().encoders[1]
    with torch.device("meta"):
        whole = set(InternVideo2Model(config).state_dict())
        cut = set(build(config, -2, 4).state_dict())
    assert whole == internvideo2_names(40) | {"img_pos_embed"}
    assert cut == internvideo2_names(39)


def test_siglip_has_the_released_names():
    config = ApolloConfig().encoders[0]
    with torch.device("meta"):
        model = SiglipVisionModel(config)
        cut = set(build(config, -2, 4).state_dict())
    whole = {name: value for name, value in model.state_dict().items()}
    assert sum(value.numel() for value in whole.values()) == 428_225_600  # 857 MB in bfloat16
    outside = {name for name in whole if name.startswith(("head.", "post_layernorm."))}
    last_layer = {name for name in whole if name.startswith("encoder.layers.26.")}
    assert len(last_layer) == 16 and cut == set(whole) - outside - last_layer
    # As the reference's own file, at a smaller depth, names them.
    reference = load_file(VECTORS / "e2e_siglip.safetensors")
    layers = range(27)
    expected = {
        name.replace("layers.0.", f"layers.{layer}.")
        for name in reference
        for layer in layers
        if "layers." not in name or "layers.0." in name
    }
    assert {f"vision_model.{name}" for name in whole} == expected
