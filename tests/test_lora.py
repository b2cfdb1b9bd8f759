"""LoRA: nothing changes at first, only the matrices learn, merged equals unmerged, files load."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_model as load_model_file
from safetensors.torch import save_model
from tiny_models import (
    make_config,
    make_llm_config,
    make_model,
    make_processor,
    mixed_conversations,
)
from tiny_recipes import make_data, make_parts, shrunken
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from apollo.chat import load_model
from apollo.cli import main as apollo
from apollo.model import ApolloForConditionalGeneration
from apollo.train import log, trainer
from apollo.train.checkpoint import list_checkpoints
from apollo.train.export import export
from apollo.train.lora import LoraSettings, add_lora, has_lora, load_lora, merge_lora, save_lora
from apollo.train.recipes import RECIPES, TrainConfig
from apollo.train.run import train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def batch() -> dict:
    config = make_config()
    return dict(make_processor(config)(mixed_conversations(), with_labels=True))


def with_random_matrices(settings: LoraSettings | None = None) -> ApolloForConditionalGeneration:
    """A model whose matrices are no longer zero, as after training."""
    model = make_model(make_config())
    add_lora(model, settings or LoraSettings(rank=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch).logits


def test_at_first_nothing_changes_and_only_the_matrices_can_learn(batch):
    model = make_model(make_config())
    before = logits(model, batch)
    add_lora(model, LoraSettings(rank=4))
    assert torch.equal(logits(model.eval(), batch), before)
    llm = model.parts()["llm"]
    learns = {name for name, p in llm.named_parameters() if p.requires_grad}
    assert learns and all("lora_" in name for name in learns)
    # rank x (inputs + outputs) of seven layers of width 16, MLP 32, key and value 8; two layers
    per_layer = 4 * ((16 + 16) * 2 + (16 + 8) * 2 + (16 + 32) * 3)
    assert sum(p.numel() for p in llm.parameters() if p.requires_grad) == 2 * per_layer
    for part in ("encoders", "connector"):
        assert all(p.requires_grad for p in model.parts()[part].parameters())


def test_merging_gives_an_ordinary_model_with_the_same_answers(batch):
    model = with_random_matrices()
    before = logits(model, batch)
    assert not torch.allclose(before, logits(make_model(make_config()), batch), atol=1e-3)
    merge_lora(model)
    assert not has_lora(model)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == make_model(make_config()).state_dict().keys()


def test_a_16_bit_base_merges_to_what_it_computed_with():
    settings = LoraSettings(rank=4, base="bfloat16")
    model = with_random_matrices(settings)
    layer = model.model.llm.layers[0].mlp.up_proj
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    merge_lora(model)
    assert torch.equal(model.model.llm.layers[0].mlp.up_proj.weight, expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_saved_matrices_come_back_with_the_other_parts(batch, tmp_path):
    model = with_random_matrices()
    nn.init.normal_(model.model.connector.proj[0].weight)
    save_lora(model, tmp_path, ["connector"])
    again = make_model(make_config())
    load_lora(again, tmp_path)
    assert torch.equal(logits(again.eval(), batch), logits(model, batch))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < sum(p.numel() * 4 for p in model.parameters())
    wider = make_model(make_config(tokens_per_clip=8))
    with pytest.raises(ValueError, match="trained from another model"):
        load_lora(wider, tmp_path)


def test_the_files_are_those_that_peft_reads(batch, tmp_path):
    from peft import PeftModel

    model = with_random_matrices()
    save_lora(model, tmp_path, [])
    theirs = PeftModel.from_pretrained(make_model(make_config()), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch))


def test_targets_must_exist():
    with pytest.raises(ValueError, match="no linear layer c_attn; it has .*q_proj"):
        add_lora(make_model(make_config()), LoraSettings(targets=["q_proj", "c_attn"]))
    some = make_model(make_config())
    add_lora(some, LoraSettings(targets=["q_proj", "v_proj"]))
    assert sum(hasattr(module, "lora_A") for module in some.modules()) == 4
    # the connector has a q_proj, too, which is not the LLM's
    assert not any(hasattr(module, "lora_A") for module in some.model.connector.modules())


@pytest.mark.parametrize(("library", "extra"), [("peft", "finetune"), ("bitsandbytes", "qlora")])
def test_a_missing_library_names_its_extra(monkeypatch, library, extra):
    real = importlib.import_module

    def without(name, *args):
        if name == library:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ValueError, match=rf"{library} is needed.*apollo-lmm\[{extra}\]"):
        add_lora(make_model(make_config()), LoraSettings(base="nf4"))


def test_4_bits_learn_and_merge_to_what_they_stand_for(batch, tmp_path):
    """QLoRA for real, where bitsandbytes is installed: it has kernels for CPUs, too."""
    functional = pytest.importorskip("bitsandbytes").functional
    # 4-bit layers are cut into blocks of 64 weights
    llm = make_llm_config(hidden_size=64, intermediate_size=128)
    model = make_model(make_config(text_config=llm))
    add_lora(model, LoraSettings(rank=4, base="nf4"))
    model.to("cpu" if not torch.cuda.is_available() else "cuda")
    device = model.device
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    layer = model.model.llm.layers[0].mlp.up_proj
    weight = layer.get_base_layer().weight
    stands_for = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    inputs = {
        name: [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
        for name, value in batch.items()
    }
    with torch.autocast(device.type, torch.bfloat16):
        model(**inputs).loss.backward()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        before = model.eval()(**inputs).logits
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    save_model(model, str(tmp_path / "checkpoint.safetensors"))  # without the 4-bit weights
    resumed = make_model(make_config(text_config=llm))
    add_lora(resumed, LoraSettings(rank=4, base="nf4"))
    load_model_file(resumed, tmp_path / "checkpoint.safetensors")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(resumed.to(device).eval()(**inputs).logits, before)
    delta = layer.get_delta_weight("default")
    merge_lora(model)
    merged = model.model.llm.layers[0].mlp.up_proj.weight
    # on a CPU, bitsandbytes rounds the scales when it packs the weight for inference
    torch.testing.assert_close(merged, stands_for + delta, atol=1e-3, rtol=0)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        after = model(**inputs).logits
    torch.testing.assert_close(after, before, atol=0.1, rtol=0.1)


# ---- through the whole of `apollo train` and `apollo export`


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> TrainConfig:
    parts = make_parts(tmp_path_factory.mktemp("parts"))
    data = make_data(tmp_path_factory.mktemp("data"))
    config = shrunken(RECIPES["finetune"](), parts, data, tmp_path_factory.mktemp("runs") / "run")
    stage = config.stages[0]
    stage.learning_rates = {"encoders": 0.0, "connector": 1e-3, "llm": 1e-2}
    train(config)
    return config


def test_a_run_leaves_a_merged_model_and_the_matrices(finished, tmp_path):
    merged = AutoModelForImageTextToText.from_pretrained(finished.out_dir / "model").eval()
    AutoProcessor.from_pretrained(finished.out_dir / "model")
    assert not has_lora(merged)
    alone = load_model(finished.model.start)[0]
    load_lora(alone, finished.out_dir / "adapter")
    merge_lora(alone)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), msg=name)


def test_a_stopped_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "plot_curves", lambda run_dir: None)
    config = replace(finished, out_dir=tmp_path / "run", loop=replace(finished.loop, save_every=1))
    real = trainer.save_checkpoint

    def stop(*arguments, **settings):
        real(*arguments, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(trainer, "save_checkpoint", real)
    assert [c.state.step for c in list_checkpoints(config.out_dir)] == [1]
    train(config, resume=True)
    straight = load_model(finished.out_dir / "model")[0].state_dict()
    resumed = load_model(config.out_dir / "model")[0].state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("source", ["", "model", "adapter"])
def test_export_of_a_run_a_model_or_an_adapter(finished, tmp_path, source):
    line = ["export", str(finished.out_dir / source), "--out", str(tmp_path / "out")]
    assert apollo([*line, "--dtype", "float32"]) == 0
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")
    merged = load_model(finished.out_dir / "model")[0]
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, exported.get_parameter(name), msg=name)


def test_export_writes_16_bits_and_refuses_what_is_none(finished, tmp_path):
    export(str(finished.out_dir), tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    for arguments, message in (
        ((str(tmp_path / "nothing"), tmp_path / "a"), "there is no model"),
        ((str(finished.out_dir), tmp_path / "half"), "already holds files"),
        ((str(finished.out_dir), tmp_path / "b", "float32", "micro"), "--base goes with"),
    ):
        with pytest.raises(ValueError, match=message):
            export(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm": 0.0}, "no stage trains the LLM"),
        ({"base": "bfloat16"}, "needs loop.mixed_precision bf16"),
    ],
)
def test_settings_that_cannot_work_are_refused(finished, tmp_path, change, message):
    stage = finished.stages[0]
    rates = stage.learning_rates | {"llm": change.get("llm", 1e-3)}
    config = replace(
        finished,
        out_dir=tmp_path / "run",
        stages=[replace(stage, learning_rates=rates)],
        loop=replace(finished.loop, mixed_precision="no"),
        lora=LoraSettings(base=change.get("base", "float32")),
    )
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not config.out_dir.exists()
