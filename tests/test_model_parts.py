"""Joining pre-trained parts: their weights arrive, new tokens get rows, the whole can be saved."""

import pytest
import torch
from tiny_models import (
    ENCODERS,
    assistant,
    make_llm_config,
    make_tokenizer,
    mixed_conversations,
    user,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from apollo.model import (
    ApolloForConditionalGeneration,
    ApolloProcessor,
    InternVideo2Config,
    InternVideo2Model,
)
from apollo.model.processing import SPECIAL_TOKENS

CONNECTOR = dict(num_heads=4, head_dim=4, num_key_value_heads=2)


def old_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as an LLM brings it along: it knows turns but no clips."""
    backend = make_tokenizer().backend_tokenizer.to_str()
    for i, token in enumerate(t for t in SPECIAL_TOKENS if not t.startswith("<|im_")):
        backend = backend.replace(f'"{token}"', f'"<unused{i}>"')
    return PreTrainedTokenizerFast(
        tokenizer_object=type(make_tokenizer().backend_tokenizer).from_str(backend),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )


@pytest.fixture(scope="module")
def part_dirs(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    siglip = SiglipVisionModel(SiglipVisionConfig(**ENCODERS["siglip_vision_model"]))
    video = InternVideo2Model(InternVideo2Config(**ENCODERS["internvideo2"]))
    llm = Qwen2ForCausalLM(make_llm_config(vocab_size=len(old_tokenizer())))
    for name, part in (("siglip", siglip), ("video", video), ("llm", llm)):
        part.save_pretrained(folder / name)
    return folder


def join(part_dirs, tokenizer, **settings):
    return ApolloForConditionalGeneration.from_parts(
        [part_dirs / "siglip", part_dirs / "video"],
        part_dirs / "llm",
        tokenizer,
        connector=CONNECTOR,
        **{"tokens_per_clip": 4, **settings},
    )


@pytest.mark.parametrize("vocabulary", ["grows", "has room"])
def test_from_parts(part_dirs, tmp_path, vocabulary):
    tokenizer = old_tokenizer()
    num_old = len(tokenizer)
    if vocabulary == "has room":
        llm = Qwen2ForCausalLM.from_pretrained(part_dirs / "llm")
        llm.resize_token_embeddings(num_old + 100)
        llm.save_pretrained(tmp_path / "llm")
        llm_dir = tmp_path / "llm"
    else:
        llm_dir = part_dirs / "llm"
    model = ApolloForConditionalGeneration.from_parts(
        [part_dirs / "siglip", part_dirs / "video"],
        llm_dir,
        tokenizer,
        connector=CONNECTOR,
        tokens_per_clip=4,
        note="a test",
    )
    num_rows = model.get_input_embeddings().num_embeddings
    assert num_rows == (num_old + 100 if vocabulary == "has room" else len(tokenizer))
    assert model.config.text_config.vocab_size == model.lm_head.out_features == num_rows
    assert all(tokenizer.convert_tokens_to_ids(t) < num_rows for t in SPECIAL_TOKENS)

    llm = Qwen2ForCausalLM.from_pretrained(part_dirs / "llm")
    old_rows = llm.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:num_old], old_rows)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    siglip = SiglipVisionModel.from_pretrained(part_dirs / "siglip")
    kept = model.model.encoders[0].state_dict()
    assert kept and all(torch.equal(v, siglip.state_dict()[k]) for k, v in kept.items())
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert torch.pdist(model.model.connector.resampler.latents).min() > 1e-3

    processor = ApolloProcessor.from_config(model.config, tokenizer)
    batch = processor(mixed_conversations(), with_labels=True)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for part in (model.eval(), processor):
        part.save_pretrained(tmp_path / "joined")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined")
    batch = AutoProcessor.from_pretrained(tmp_path / "joined")(mixed_conversations())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.config.note == "a test"
    assert again.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_text_is_read_as_the_llm_read_it_before(part_dirs):
    """Without clips, the joined model is its LLM."""
    tokenizer = old_tokenizer()
    model = join(part_dirs, tokenizer)
    batch = ApolloProcessor.from_config(model.config, tokenizer)([[user("hi"), assistant("yes")]])
    llm = Qwen2ForCausalLM.from_pretrained(part_dirs / "llm")
    with torch.no_grad():
        logits = model(**batch).logits
        expected = llm(batch["input_ids"]).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)


def test_a_checkpoint_with_a_text_half_gives_its_vision_half(part_dirs, tmp_path):
    vision = SiglipVisionConfig(**ENCODERS["siglip_vision_model"])
    text = SiglipTextConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    whole = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    whole.save_pretrained(tmp_path)
    model = ApolloForConditionalGeneration.from_parts(
        [tmp_path], part_dirs / "llm", old_tokenizer(), connector=CONNECTOR, tokens_per_clip=4
    )
    expected = whole.vision_model.embeddings.patch_embedding.weight
    assert torch.equal(model.model.encoders[0].embeddings.patch_embedding.weight, expected)


def test_wrong_parts_and_settings_are_refused(part_dirs):
    with pytest.raises(
        ValueError, match="unknown encoder 'qwen2'; choose from siglip_vision_model"
    ):
        ApolloForConditionalGeneration.from_parts(
            [part_dirs / "llm"], part_dirs / "llm", old_tokenizer()
        )
    with pytest.raises(ValueError, match="ApolloConfig has no setting tokens_per_frame"):
        join(part_dirs, old_tokenizer(), tokens_per_frame=32)
