"""The model's contract, for every encoder and pair with every connector; then one model closely."""

import copy

import pytest
import torch
from tiny_models import (
    ENCODERS,
    IMAGE_ENCODERS,
    TOKENIZER,
    TOKENS_PER_CLIP,
    VIDEO_ENCODERS,
    assistant,
    make_config,
    make_image,
    make_llm_config,
    make_model,
    make_processor,
    make_video,
    mixed_conversations,
    user,
)
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, pipeline

from apollo.model import ApolloConfig
from apollo.model.connector import RESAMPLERS
from apollo.model.encoders import preprocessing
from apollo.model.modeling import CACHE

ALONE = [(kind,) for kind in ENCODERS]
PAIRS = [(image, video) for image in IMAGE_ENCODERS for video in VIDEO_ENCODERS]


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def model(config):
    return make_model(config)


@pytest.fixture(scope="module")
def processor(config):
    return make_processor(config)


@pytest.fixture(scope="module")
def batch(processor):
    return processor(mixed_conversations(), with_labels=True)


def logits_of(model, batch, **inputs):
    with torch.no_grad():
        return model(**{**batch, **inputs}).logits


def no_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


# ---- the contract


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("kinds", ALONE + PAIRS, ids="+".join)
def test_contract(kinds, resampler, tmp_path):
    """A mixed batch trains everything, and what is saved is what is loaded."""
    config = make_config(kinds, resampler)
    model = make_model(config)
    batch = make_processor(config)(mixed_conversations(), with_labels=True)
    features = model.encode(batch["pixel_values"])
    assert features.shape[0] == 6  # one image, two images, three clips
    assert model.connect(features).shape == (6, TOKENS_PER_CLIP, 16)
    out = model.train()(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, len(TOKENIZER))
    out.loss.backward()
    assert no_gradient(model) == []
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))


@pytest.mark.parametrize("kinds", ALONE + PAIRS, ids="+".join)
def test_text_alone_leaves_no_parameter_without_gradient(kinds):
    config = make_config(kinds)
    model = make_model(config).train()
    batch = make_processor(config)([[user("hi"), assistant("yes")]], with_labels=True)
    for pixel_values in (batch.pop("pixel_values"), None):
        model.zero_grad()
        model(**batch, pixel_values=pixel_values).loss.backward()
        assert no_gradient(model) == []
        for part in ("encoders", "connector"):
            assert not any(p.grad.any() for p in model.parts()[part].parameters())


# ---- saving


def test_auto_classes_and_config_round_trip(model, tmp_path):
    config = make_config(note="knows nothing", selected_layers=[-1, -2])
    make_model(config).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, ApolloConfig)
    for name in ("encoders", "selected_layers", "connector", "tokens_per_clip", "note"):
        assert again.to_dict()[name] == config.to_dict()[name]
    assert again.get_text_config().hidden_size == 16
    body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert len(body.encoders[0].encoder.layers) == 2 and len(body.encoders[1].blocks) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_saved_once_and_stay_tied(tied, tmp_path):
    config = make_config(text_config=make_llm_config(tie_word_embeddings=tied))
    model = make_model(config)
    assert config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for each in (model, again):
        assert (each.lm_head.weight is each.model.llm.embed_tokens.weight) == tied
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_loading_says_nothing_is_missing_or_left_over(model, tmp_path):
    model.save_pretrained(tmp_path)
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report


# ---- forward


def test_one_by_one_equals_batch(model, processor, batch):
    logits = logits_of(model, batch)
    for row, conversation in enumerate(mixed_conversations()):
        single = processor([conversation])
        length = single["input_ids"].shape[1]
        expected = logits_of(model, single)[0]
        torch.testing.assert_close(logits[row, :length], expected, atol=1e-5, rtol=0)


def test_left_and_right_padding_give_equal_logits(model, processor, batch):
    left = processor(mixed_conversations(), with_labels=True, padding_side="left")
    a = logits_of(model, batch)[batch["attention_mask"].bool()]
    b = logits_of(model, left)[left["attention_mask"].bool()]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_clip_features_stand_in_for_pixels(model, batch):
    with torch.no_grad():
        features = model.encode(batch["pixel_values"])
    expected = logits_of(model, batch)
    assert torch.equal(logits_of(model, batch, pixel_values=None, clip_features=features), expected)


@pytest.mark.parametrize("encode_batch_size", [1, 4, 100])
def test_chunked_encoding_changes_nothing(model, batch, encode_batch_size, monkeypatch):
    expected = model.encode(batch["pixel_values"])
    monkeypatch.setattr(model.config, "encode_batch_size", encode_batch_size)
    with torch.no_grad():
        chunked = model.encode(batch["pixel_values"])
    torch.testing.assert_close(chunked, expected, atol=1e-6, rtol=0)


def test_the_model_normalises_what_the_processor_leaves_as_it_is(model, batch):
    assert all(pixels.dtype == torch.uint8 for pixels in batch["pixel_values"])
    normalised = [
        preprocessing(encoder).normalise(pixels)
        for encoder, pixels in zip(model.config.encoders, batch["pixel_values"], strict=True)
    ]
    assert min(float(pixels.min()) for pixels in normalised) < 0
    assert torch.equal(model.encode(normalised), model.encode(batch["pixel_values"]))


def test_every_clip_reaches_its_own_placeholders(model, batch):
    """Change the last clip: nothing before its placeholders may change, something after must."""
    pixels = [p.clone() for p in batch["pixel_values"]]
    for p in pixels:
        p[-1] = 0
    before, after = logits_of(model, batch), logits_of(model, batch, pixel_values=pixels)
    assert torch.equal(before[:3], after[:3])
    is_video = batch["input_ids"][3] == model.config.video_token_id
    first = int(is_video.nonzero()[2 * TOKENS_PER_CLIP])
    torch.testing.assert_close(before[3, :first], after[3, :first], atol=1e-6, rtol=0)
    assert not torch.allclose(before[3, first], after[3, first], atol=1e-6)


def test_placeholders_must_match_the_clips(model, batch):
    fewer = [p[:-1] for p in batch["pixel_values"]]
    with pytest.raises(ValueError, match="24 placeholders, the clips give 20 tokens"):
        model(**{**batch, "pixel_values": fewer})
    with pytest.raises(ValueError, match="24 placeholders, the clips give 0 tokens"):
        model(**{**batch, "pixel_values": None})


def test_wrong_pixels_are_refused(model, batch):
    image, video = batch["pixel_values"]
    for pixels, message in (
        ([image], "one tensor per encoder is needed, got 1 for 2"),
        (
            [image, video[:-1]],
            r"internvideo2 takes .* \(6, 4, 3, 24, 24\), got \(5, 4, 3, 24, 24\)",
        ),
        ([image, video[:, :2]], r"got \(6, 2, 3, 24, 24\)"),
        ([video, image], r"siglip_vision_model takes .* got \(6, 4, 3, 24, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, "pixel_values": pixels})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_loss_is_a_sum_over_the_given_number_of_tokens(model, batch):
    """So that accumulation adds up: two halves with the whole's count make the whole's mean."""
    with torch.no_grad():
        mean = model(**batch).loss
        count = int((batch["labels"][:, 1:] != -100).sum())
        torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, mean)
        clips = (slice(0, 3), slice(3, 6))  # of the first three rows, and of the last
        halves = [
            model(
                **{k: v[rows] for k, v in batch.items() if k != "pixel_values"},
                pixel_values=[p[c] for p in batch["pixel_values"]],
                num_items_in_batch=torch.tensor(count),
            ).loss
            for rows, c in zip((slice(0, 3), slice(3, 4)), clips, strict=True)
        ]
    torch.testing.assert_close(sum(halves), mean)


def test_logits_to_keep(model, batch):
    batch = {name: value for name, value in batch.items() if name != "labels"}
    full = logits_of(model, batch)
    torch.testing.assert_close(logits_of(model, batch, logits_to_keep=2), full[:, -2:])
    index = torch.tensor([0, 5])
    torch.testing.assert_close(logits_of(model, batch, logits_to_keep=index), full[:, index])


def test_parts_are_everything_and_each_can_be_frozen(config, batch):
    model = make_model(config).train()
    parts = model.parts()
    assert list(parts) == ["encoders", "connector", "llm"]
    ids = [{id(p) for p in part.parameters()} for part in parts.values()]
    assert set.union(*ids) == {id(p) for p in model.parameters()}
    assert sum(len(i) for i in ids) == len(set.union(*ids))
    for name in parts:
        model.zero_grad()
        for other, part in parts.items():
            part.requires_grad_(other == name)
        model(**batch).loss.backward()
        for other, part in parts.items():
            assert all((p.grad is not None) == (other == name) for p in part.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient(config, batch):
    plain, checkpointed = make_model(config).train(), make_model(config).train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**batch).loss.backward()
    assert checkpointed.model.encoders[1].blocks[0].gradient_checkpointing
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bfloat16_runs_and_is_close(model, batch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    logits = logits_of(half, batch)
    assert logits.dtype == torch.bfloat16
    expected = logits_of(model, batch)
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_trains(config, batch):
    model = make_model(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()
    assert no_gradient(model) == []
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_attention_implementations_agree(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.model.encoders[0].config._attn_implementation == "eager"
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(
        logits_of(eager, batch)[mask], logits_of(model, batch)[mask], atol=1e-5, rtol=0
    )


# ---- generation


def greedy(model, inputs, num_tokens: int, **options):
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, **options
        )


QUESTIONS = [
    [user(make_video(2), "what moves?")],
    [user("no picture here")],
    [user(make_image(4), make_image(5), "which is larger?")],
]


def test_cache_equals_no_cache_and_batch_equals_one_by_one(model, processor):
    inputs = processor(QUESTIONS, add_generation_prompt=True)
    answers = greedy(model, inputs, 6)
    assert torch.equal(answers, greedy(model, inputs, 6, use_cache=False))
    for row, question in enumerate(QUESTIONS):
        single = processor([question], add_generation_prompt=True)
        alone = greedy(model, single, 6)[0, single["input_ids"].shape[1] :]
        assert torch.equal(answers[row, inputs["input_ids"].shape[1] :], alone)


def test_step_by_step_equals_one_forward(model, processor):
    inputs = processor([QUESTIONS[0]], add_generation_prompt=True)
    answer = greedy(model, inputs, 5)
    full = logits_of(model, inputs, input_ids=answer, attention_mask=torch.ones_like(answer))
    cache, start, steps = None, 0, []
    pixel_values = inputs["pixel_values"]
    for end in range(inputs["input_ids"].shape[1], answer.shape[1] + 1):
        with torch.no_grad():
            out = model(
                answer[:, start:end],
                pixel_values=pixel_values,
                use_cache=True,
                **{CACHE: cache},
            )
        cache, start, pixel_values = out[CACHE], end, None
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=0)


def test_generate_from_clip_features(model, processor):
    inputs = processor(QUESTIONS, add_generation_prompt=True)
    expected = greedy(model, inputs, 4)
    with torch.no_grad():
        features = model.encode(inputs.pop("pixel_values"))
    assert torch.equal(greedy(model, {**inputs, "clip_features": features}, 4), expected)


@pytest.mark.parametrize("as_features", [False, True])
@pytest.mark.parametrize("new_clips", [False, True])
def test_a_later_turn_goes_on_from_the_cache(model, processor, new_clips, as_features):
    """The cache holds the first turn's clips; only clips of the new turn are read again."""
    conversation = list(QUESTIONS[0])
    first = processor([conversation], add_generation_prompt=True)
    answered = greedy(model, first, 4, return_dict_in_generate=True)
    cache = answered[CACHE]
    cache.crop(first["input_ids"].shape[1] - cache.get_seq_length())
    # An answer whose ids are known, in place of what an untrained model says.
    question = user(make_video(1, seed=9), "and here?") if new_clips else user("and then?")
    conversation += [assistant("aa"), question]
    inputs = dict(processor([conversation], add_generation_prompt=True))
    expected = greedy(model, inputs, 4)
    if as_features:
        with torch.no_grad():
            inputs["clip_features"] = model.encode(inputs.pop("pixel_values"))
    assert torch.equal(greedy(model, inputs, 4, **{CACHE: cache}), expected)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)])
def test_beams_keep_each_rows_clips(model, processor, options):
    inputs = processor(QUESTIONS, add_generation_prompt=True)
    copies = options.get("num_return_sequences", 1)
    answers = greedy(model, inputs, 4, **options)
    for row, question in enumerate(QUESTIONS):
        single = processor([question], add_generation_prompt=True)
        alone = greedy(model, single, 4, **options)[:, -4:]
        assert torch.equal(answers[row * copies : (row + 1) * copies, -4:], alone)


def test_transformers_pipeline(model, processor, tmp_path):
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    messages = [user(make_image(), "what?")]
    expected = greedy(model, processor([messages], add_generation_prompt=True), 3)[0, -3:]
    describe = pipeline("image-text-to-text", model=str(tmp_path))
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    answer = describe(text=messages, return_full_text=False, generate_kwargs=options)
    assert answer[0]["generated_text"] == TOKENIZER.decode(expected, skip_special_tokens=True)


# ---- configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(encoders=[]), "one or two are supported, got 0"),
        (dict(encoders=[{"model_type": "clip"}]), "unknown encoder 'clip'; choose from siglip"),
        (dict(encoders=[{}]), "unknown encoder None"),
        (dict(selected_layers=[-2]), "one per encoder is needed, got 1 for 2"),
        (dict(selected_layers=[-2, -3]), "internvideo2 has 2 layers, got -3"),
        (dict(selected_layers=[0, -2]), "siglip_vision_model has 2 layers, got 0"),
        (dict(frames_per_clip=0), "frames_per_clip must be positive"),
        (dict(tokens_per_clip=-1), "tokens_per_clip must be positive"),
        (dict(connector={"resampler": "mean"}), "unknown resampler 'mean'"),
        (dict(text_config={"model_type": "nothing"}), "knows no model_type 'nothing'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


def test_clips_must_be_whole_tubelets():
    with pytest.raises(ValueError, match="videomae takes a multiple of 2, got 3"):
        make_config(("videomae",), frames_per_clip=3)


def test_default_is_the_released_model():
    config = ApolloConfig()
    assert [e.model_type for e in config.encoders] == ["siglip_vision_model", "internvideo2"]
    assert [e.hidden_size for e in config.encoders] == [1152, 1408]
    assert (config.tokens_per_clip, config.frames_per_clip, config.selected_layers) == (
        128,
        4,
        [-2, -2],
    )


def test_single_frame_clips_use_the_image_position_table():
    config = make_config(("internvideo2",), frames_per_clip=1)
    model = make_model(config)
    assert model.model.encoders[0].pos_embed is None
    batch = make_processor(config)([[user(make_image(), "?"), assistant("!")]], with_labels=True)
    model.train()(**batch).loss.backward()
    assert no_gradient(model) == []
