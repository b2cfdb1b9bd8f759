"""The micro parts: what their batches hold, that they learn, stop and go on, and can be joined."""

import itertools
import os
import re
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2ForCausalLM

from apollo.cli import main
from apollo.model.configuration import ConnectorSettings
from apollo.model.encoders import ENCODERS, grid, preprocessing
from apollo.train import encoder_parts, llm_part, parts, self_supervised
from apollo.train.growing import deepen, widen
from apollo.train.joining import join_parts, load_tokenizer
from apollo.train.log import read_log
from apollo.train.recipes import ModelSettings
from apollo.train.trainer import run_stage
from apollo.world import corpus, language
from apollo.world.questions import FAMILIES
from apollo.world.scene import make_scene


@pytest.fixture(scope="module")
def tokenizer():
    return llm_part.train_tokenizer(seed=0, num_texts=300)


def test_a_time_a_word_and_a_sign_are_single_tokens(tokenizer):
    for text in ("00:04", "02:00", " circle", " moves", " owl"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1, text


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Ünïcode 漢字 🎬 and\ttabs\n", "clip from 00:00-00:02: nothing.", "x = 1e-5"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_run_goes_on_with_the_tokenizer_that_it_began_with(tokenizer, tmp_path, monkeypatch):
    made = iter([tokenizer])
    monkeypatch.setattr(parts, "train_tokenizer", lambda seed: next(made))
    began, went_on = (parts.run_tokenizer(tmp_path, seed=0) for _ in range(2))
    assert went_on.get_vocab() == began.get_vocab()
    text = "clip from 00:00-00:02: nothing.<|im_end|>"
    assert went_on.encode(text) == began.encode(text)
    assert (went_on.eos_token_id, went_on.pad_token_id) == (began.eos_token_id, began.pad_token_id)


def test_only_answers_are_supervised(tokenizer):
    messages = corpus.text_sample(seed=0, index=3)
    ids, labels = llm_part.encode_text(tokenizer, messages)
    said = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(said) == "".join(answers)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_text_batches_depend_on_their_number_alone(tokenizer):
    first = llm_part.text_batches(tokenizer, 0, 2, llm_part.LESSONS[1], group=2)
    second = llm_part.text_batches(tokenizer, 0, 2, llm_part.LESSONS[1], group=2)
    expected = [first(i) for i in range(4)]
    for i in (3, 0, 2, 1):
        batch = second(i)
        assert all(torch.equal(batch[name], expected[i][name]) for name in batch)


def test_facts_of_a_clip_name_what_happens_in_it():
    for index in range(200):
        scene = make_scene(0, index)
        spans = language.clip_spans(scene.duration_s)
        for clip, events in enumerate(language.assign(scene, spans)):
            facts = language.clip_facts(scene, spans, clip)
            assert {language.event_text(scene, event) for event in events} <= set(facts)


@pytest.mark.parametrize(
    ("kind", "build", "extra"),
    [("frame", encoder_parts.siglip, 0), ("clip", encoder_parts.internvideo2, 1)],
)
def test_an_encoder_learns_to_name_facts(tokenizer, kind, build, extra):
    torch.manual_seed(0)
    encoder = build(**parts.SMALL)
    width = encoder.config.hidden_size
    model = encoder_parts.FactNaming(encoder, width, llm_part.VOCABULARY, extra)
    batch = encoder_parts.fact_batches(kind, tokenizer, preprocessing(encoder.config), 0, rows=8)(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_every_true_pair_is_marked(tokenizer):
    prepare = preprocessing(encoder_parts.siglip(64, 1).config)
    batch = encoder_parts.fact_batches("frame", tokenizer, prepare, 0, rows=6)(1)
    assert batch["truth"].sum(1).min() >= 1
    assert batch["truth"].shape == (6, len(batch["phrases"]))
    assert np.isfinite(batch["pixel_values"].numpy()).all()


def test_rare_events_are_drawn_often():
    rng = np.random.default_rng(0)
    kinds = Counter()
    for _ in range(200):
        frames, facts = encoder_parts.draw_facts("clip", 0, rng)
        assert frames.shape[0] == 4
        kinds.update({language.kind_of_fact(fact) for fact in facts})
    assert min(kinds[kind] for kind in language.FACT_WORDS - {"ground"}) >= 5
    signs = sum(
        any(fact.startswith("sign ") for fact in encoder_parts.draw_facts("frame", 0, rng)[1])
        for _ in range(200)
    )
    assert signs > 80


class _Answers(torch.nn.Module):
    """Says what `answer` makes of the truth."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.truth = None
        self.nothing = torch.nn.Parameter(torch.zeros(0))

    def scores(self, pixel_values, phrases):
        return self.answer(self.truth)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(lambda t: t - 0.5, 1.0), (lambda t: torch.ones_like(t), 0.0), (lambda t: 0.5 - t, -1.0)],
)
def test_naming_accuracy_of_perfect_blind_and_wrong(tokenizer, answer, expected):
    prepare = preprocessing(encoder_parts.internvideo2(64, 1).config)
    batches = encoder_parts.fact_batches("clip", tokenizer, prepare, 0, rows=6)
    model = _Answers(answer)

    def shown(number):
        batch = batches(number)
        model.truth = batch["truth"]
        return batch

    accuracy = encoder_parts.naming_accuracy(model, shown, 2, tokenizer)
    assert {"naming", "naming looks", "naming moves"} <= set(accuracy)
    assert set(accuracy.values()) == {expected}


# ---- language models: the ladder, and what they answer from transcripts


@pytest.mark.parametrize("name", parts.LADDER)
def test_a_language_model_has_about_the_parameters_of_its_name(tokenizer, name):
    model = llm_part.language_model(tokenizer, **parts.LADDER[name])
    promised = float(re.fullmatch(r"llm-([0-9.]+)m", name)[1])
    assert model.num_parameters() / 1e6 == pytest.approx(promised, rel=0.15)


@pytest.mark.parametrize("name", parts.LADDER)
def test_neighbour_heads_leave_a_head_free(tokenizer, name):
    shape = parts.LADDER[name]
    model = llm_part.language_model(tokenizer, **shape)
    biases = model.model.layers[0].self_attn.q_proj.bias.view(-1, shape["head_dim"])
    taken = biases.abs().sum(1) > 0
    assert taken[0] and not taken[-1]
    assert taken.sum() == min(2, len(biases) - 1)


@pytest.mark.parametrize("name", parts.LADDER)
def test_before_any_training_a_head_looks_where_to_copy_from(tokenizer, name):
    torch.manual_seed(0)
    model = llm_part.language_model(tokenizer, **parts.LADDER[name])
    model.set_attn_implementation("eager")
    once = torch.randperm(800)[:40] + 20
    with torch.no_grad():
        attentions = model(input_ids=once.repeat(2)[None], output_attentions=True).attentions
    before = attentions[0][0, 0].diagonal(-1).mean()  # layer, row, head: (L, L)
    after_the_same = attentions[1][0, 0].diagonal(-39).mean()
    assert before > 0.5
    assert after_the_same > 3 / 60  # three times what looking anywhere would give


@pytest.mark.parametrize("copies", [2, 3])
def test_a_grown_model_says_the_same_and_its_copies_learn_different_things(tokenizer, copies):
    torch.manual_seed(0)
    small = llm_part.language_model(tokenizer, 64, 2, 32).eval()
    for parameter in small.parameters():  # biases and norms are not all zero and one
        parameter.data += 0.1 * torch.randn_like(parameter)
    large = widen(small, copies).eval()
    assert large.config.hidden_size == copies * 64 and large.dtype == torch.float32
    ids = torch.randint(0, 900, (2, 30))
    logits = large(input_ids=ids).logits
    torch.testing.assert_close(logits, small(input_ids=ids).logits, atol=2e-5, rtol=1e-4)
    large(input_ids=ids, labels=ids).loss.backward()
    # What the last matrix writes is read by the head alone, in which the copies are still equal.
    for name, weight in large.model.layers.named_parameters():
        if weight.dim() == 2 and name != "1.mlp.down_proj.weight":
            first, *_, last = weight.grad.chunk(copies)
            assert (first - last).norm() > 0.01 * first.norm(), name


def test_a_deeper_model_says_the_same_and_all_its_layers_learn(tokenizer):
    torch.manual_seed(0)
    small = llm_part.language_model(tokenizer, 64, 2, 32).eval()
    large = deepen(small, 5).eval()
    ids = torch.randint(0, 900, (2, 30))
    assert torch.equal(large(input_ids=ids).logits, small(input_ids=ids).logits)
    large(input_ids=ids, labels=ids).loss.backward()
    for layer in large.model.layers:
        assert layer.self_attn.o_proj.weight.grad.norm() > 0
        assert layer.mlp.down_proj.weight.grad.norm() > 0


@pytest.mark.parametrize("name", parts.GROWN)
def test_a_grown_part_has_about_the_parameters_of_its_name(name):
    shape = dict(parts.GROWN[name].shape)
    small = Qwen2ForCausalLM.from_pretrained(shape.pop("small"))
    model = widen(small, **shape) if "copies" in shape else deepen(small, **shape)
    promised = float(re.fullmatch(r"llm-([0-9.]+)m", name)[1])
    assert model.num_parameters() / 1e6 == pytest.approx(promised, rel=0.15)


def test_a_word_starts_alike_with_and_without_its_space(tokenizer):
    model = llm_part.language_model(tokenizer, **parts.LADDER["llm-1m"])
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (" owl", "owl", " star")]
    assert all(len(one) == 1 for one in ids)
    spaced, bare, other = (model.get_input_embeddings().weight[one[0]] for one in ids)
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(spaced, bare, dim=0) > 0.5 > similarity(spaced, other, dim=0)


@pytest.fixture(scope="module")
def asked(tokenizer):
    return llm_part.transcript_questions(tokenizer, seed=0, per_family=2)


def test_transcript_questions_are_balanced_and_hold_their_answer(tokenizer, asked):
    counts = Counter(question.family for question in asked)
    assert set(counts) == {name for name, info in FAMILIES.items() if info.needs == "frames"}
    assert set(counts.values()) == {2}
    for question in asked:
        prompt = tokenizer.decode(question.prompt)
        assert "clip from 00:00-00:02: " in prompt and prompt.endswith("<|im_start|>assistant\n")
        assert len(question.options) == 4
        for option in map(tokenizer.decode, question.options):
            assert option.removesuffix("<|im_end|>") in prompt
    assert len({question.answer for question in asked}) == 4
    assert asked[:8] == llm_part.transcript_questions(tokenizer, seed=0, per_family=2)[:8]


def test_transcripts_are_those_of_held_out_scenes(monkeypatch, tokenizer):
    splits = set()

    def made(seed, index, split):
        splits.add(split)
        return make_scene(seed, index, split)

    monkeypatch.setattr(llm_part, "make_scene", made)
    monkeypatch.setattr(llm_part, "MOST_SCENES", 5)
    llm_part.transcript_questions(tokenizer, seed=0, per_family=1)
    assert splits == {"test"}


def test_scores_of_options_do_not_depend_on_padding_or_company(tokenizer, asked):
    torch.manual_seed(0)
    model = llm_part.language_model(tokenizer, 64, 2, 32).eval()
    for question in asked[:4]:
        scores = llm_part.option_scores(model, question.prompt, question.options)
        for option, score in zip(question.options, scores, strict=True):
            ids = torch.tensor([question.prompt + option])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(question.prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(option)), option].sum()
            assert score.item() == pytest.approx(expected.item(), rel=0.01)


def test_macro_is_the_mean_over_families_not_over_questions(monkeypatch):
    questions = [
        llm_part.TranscriptQuestion(family, [1], [[2], [3], [4], [5]], answer)
        for family, answer in [("easy", 0), ("easy", 0), ("easy", 0), ("hard", 0), ("hard", 1)]
    ]
    monkeypatch.setattr(llm_part, "option_scores", lambda *_: torch.tensor([2.0, 1.0, 0.0, 0.0]))
    accuracy = llm_part.transcript_accuracy(None, questions)
    assert accuracy == {"macro": 0.75, "transcript easy": 1.0, "transcript hard": 0.5}


# ---- self-supervised encoders


def tiny_distillation() -> self_supervised.SelfDistillation:
    torch.manual_seed(0)
    return self_supervised.SelfDistillation(encoder_parts.dinov2(64, 2))


def views(rows: int = 4) -> dict[str, torch.Tensor]:
    prepare = preprocessing(encoder_parts.dinov2(64, 1).config)
    return encoder_parts.view_batches(prepare, 0, rows)(0)


def test_the_teacher_has_no_gradient_and_follows_the_student_slowly():
    model, batch = tiny_distillation().train(), views()
    model(**batch).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())
    before = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    model.eval()(**batch)
    after = model.teacher.parameters()
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    model.train()(**batch)
    share = 1 - self_supervised.TEACHER_MOMENTUM
    for old, new, student in zip(
        before, model.teacher.parameters(), model.student.parameters(), strict=True
    ):
        torch.testing.assert_close(new, old + share * (student - old))


def test_sorting_is_even_over_prototypes_and_whole_for_each_token():
    torch.manual_seed(0)
    cosines = torch.rand(64, 32) - 0.5
    cosines[:, 0] += 0.9  # by itself it would win nearly everywhere
    shares = self_supervised.sort_evenly(cosines)
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    assert shares.sum(0).max() < 1.2 * 64 / 32
    assert (cosines.argmax(1) == 0).sum() > 32
    alike = self_supervised.sort_evenly(torch.zeros(8, 4))
    torch.testing.assert_close(alike, torch.full((8, 4), 0.25))


def test_self_distillation_learns():
    model, batch = tiny_distillation().train(), views(4)
    optimizer = torch.optim.AdamW(model.student.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_what_the_teacher_says_depends_on_the_picture():
    targets = tiny_distillation().eval()(**views()).targets
    assert targets.shape == (4, 2, self_supervised.NUM_PROTOTYPES)
    torch.testing.assert_close(targets.sum(-1), torch.ones(4, 2))
    assert not torch.allclose(targets[0], targets[1], atol=1e-4)


def test_a_crop_shows_a_square_inside_of_the_picture():
    ramp = torch.linspace(0, 1, 64)
    picture = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.ones(64, 64)])
    pictures = picture.expand(5, 3, 64, 64)
    whole = self_supervised.crop(pictures, np.random.default_rng(0), 2, 64, (1.0, 1.0))
    torch.testing.assert_close(whole, pictures[:, None].expand(5, 2, 3, 64, 64))
    quarter = self_supervised.crop(pictures, np.random.default_rng(0), 6, 32, (0.25, 0.25))
    assert quarter.shape == (5, 6, 3, 32, 32)
    torch.testing.assert_close(quarter[:, :, 2], torch.ones(5, 6, 32, 32))  # no black edges
    width = quarter[:, :, 0, :, -1] - quarter[:, :, 0, :, 0]
    height = quarter[:, :, 1, -1] - quarter[:, :, 1, 0]
    for extent in (width, height):
        torch.testing.assert_close(extent, torch.full_like(extent, 31 / 63), atol=0.01, rtol=0)
    corners = quarter[:, :, :2, 0, 0].flatten(0, 1)
    assert len(corners.unique(dim=0)) == 30


def test_as_many_patches_are_hidden_in_each_row():
    hidden = self_supervised.hide(np.random.default_rng(0), 50, 64, 0.4)
    assert hidden.dtype == torch.bool and (hidden.sum(1) == 26).all()
    assert hidden.any(0).all() and not hidden.all(0).any()


def clips(rows: int = 4) -> dict[str, torch.Tensor]:
    prepare = preprocessing(encoder_parts.videomae(128, 1).config)
    return encoder_parts.masked_batches(prepare, 0, rows)(0)


def test_tubes_are_hidden_at_all_times():
    batch = clips()
    config = encoder_parts.videomae(128, 1).config
    steps, rows, columns = grid(config, encoder_parts.NUM_FRAMES)
    hidden = batch["hidden_patches"].view(-1, steps, rows * columns)
    assert steps > 1 and (hidden == hidden[:, :1]).all()
    assert hidden.float().mean() == self_supervised.MASKED_TUBES


def test_only_hidden_patches_count_in_the_loss():
    model = self_supervised.MaskedAutoencoder(encoder_parts.videomae(128, 2)).eval()
    torch.nn.init.zeros_(model.model.decoder.head.weight)  # paints all patches alike
    batch = clips()
    pixels, hidden = batch["pixel_values"], batch["hidden_patches"]
    side = encoder_parts.IMAGE_SIZE // encoder_parts.PATCH_SIZE
    is_hidden = hidden.view(len(pixels), -1, side, side)
    for scale in (encoder_parts.TUBELET_SIZE, encoder_parts.PATCH_SIZE, encoder_parts.PATCH_SIZE):
        is_hidden = is_hidden.repeat_interleave(scale, 1 + is_hidden.ndim - 4)
        is_hidden = is_hidden.movedim(1, -1)  # next axis
    is_hidden = is_hidden[:, :, None]  # (B, T, 1, S, S)
    before = model(**batch).loss
    seen_changed = torch.where(is_hidden, pixels, pixels + 1)
    assert torch.equal(model(seen_changed, hidden).loss, before)
    hidden_changed = torch.where(is_hidden, pixels + 1, pixels)
    assert not torch.isclose(model(hidden_changed, hidden).loss, before)


def test_two_halves_of_a_batch_of_clips_sum_to_the_whole():
    torch.manual_seed(0)
    model = self_supervised.MaskedAutoencoder(encoder_parts.videomae(128, 2)).eval()
    batch = clips()
    halves = [
        {name: tensor[part] for name, tensor in batch.items()} for part in (slice(2), slice(2, 4))
    ]
    total = sum(model(**half, num_items_in_batch=4).loss for half in halves)
    torch.testing.assert_close(total, model(**batch).loss)


def test_the_loss_of_pictures_is_averaged_over_the_global_step():
    model, batch = tiny_distillation().eval(), views()
    torch.testing.assert_close(model(**batch, num_items_in_batch=8).loss, model(**batch).loss / 2)


@pytest.mark.parametrize("batches", [encoder_parts.view_batches, encoder_parts.masked_batches])
def test_batches_of_pixels_depend_on_their_number_alone(batches):
    prepare = preprocessing(encoder_parts.dinov2(64, 1).config)
    first, second = batches(prepare, 0, 2), batches(prepare, 0, 2)
    expected = {i: first(i) for i in (0, 1, -1, -2)}
    for i in (-2, 1, 0, -1):
        batch = second(i)
        assert all(torch.equal(batch[name], expected[i][name]) for name in batch)
    for one, other in itertools.combinations(expected.values(), 2):
        assert all(not torch.equal(one[name], other[name]) for name in one)


# ---- the parts as they are trained


QUICK = ("llm-0.3m", "siglip", "dinov2", "internvideo2", "videomae")
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in parts.PARTS
]


METRICS = {
    "llm": ["macro"],
    "siglip": ["naming", "naming ground"],
    "internvideo2": ["naming", "naming looks"],
    "dinov2": ["held_out_loss", "finds_other_view"],
    "videomae": ["held_out_loss"],
}
"""What the last line of a part's log must have."""


@pytest.fixture
def small_steps(monkeypatch):
    """Few rows in a step, few questions in an evaluation."""
    for module, name, value in [
        (encoder_parts, "ROWS", 3),
        (encoder_parts, "DISTILLED_ROWS", 3),
        (encoder_parts, "HELD_OUT_BATCHES", 1),
        (llm_part, "ROWS", 2),
        (llm_part, "QUESTIONS_PER_FAMILY", 1),
        (llm_part, "MOST_SCENES", 10),
        (llm_part, "LESSONS", llm_part.LESSONS[1:3]),
    ]:
        monkeypatch.setattr(module, name, value)


def train_part(name, tokenizer, out, resume=False):
    # Of eight steps the language model's second lesson has two, of ten the last of the wider one;
    # the others take two.
    steps = {"llm-9m": 2, "llm-4m": 10}.get(name, 8 if name.startswith("llm") else 2)
    part = parts.PARTS[name]
    part.train(llm_part.PartRun(tokenizer, out, steps, seed=0, resume=resume), **part.shape)


def kill_in_the_first_of_two_steps(model, batches, schedule, *args, **kwargs):
    """Run a stage, but send this process SIGTERM in its first step if it has two."""

    def kill(module, inputs, output):
        os.kill(os.getpid(), signal.SIGTERM)

    hook = model.register_forward_hook(kill) if schedule.steps == 2 else None
    try:
        run_stage(model, batches, schedule, *args, **kwargs)
    finally:
        if hook:
            hook.remove()


def tensors(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_a_part_goes_on_where_it_stopped_and_can_be_joined(
    tmp_path, monkeypatch, small_steps, tokenizer, name
):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train_part(name, tokenizer, straight)
    with monkeypatch.context() as patch:
        for module in (llm_part, encoder_parts):
            patch.setattr(module, "run_stage", kill_in_the_first_of_two_steps)
        with pytest.raises(SystemExit, match="143"):
            train_part(name, tokenizer, killed)
    assert not (killed / "model").exists()
    train_part(name, tokenizer, killed, resume=True)
    assert tensors(straight / "model") and tensors(straight / "model") == tensors(killed / "model")
    logs = read_log(straight), read_log(killed)
    timed = {"elapsed_s", "tokens_per_s", "data_wait", "peak_memory_gib"}
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    assert set(METRICS[name.split("-")[0]]) <= set(logs[0][-1])
    join(name, straight / "model", tokenizer, tmp_path / "other")


def join(name, folder, tokenizer, other):
    """Join the part with one that has learnt nothing, and look at a picture of noise."""
    if name.startswith("llm"):
        encoder_parts.siglip(64, 2).save_pretrained(other)
        encoder, llm = other, folder
        assert load_tokenizer(str(folder)).eos_token == "<|im_end|>"
    else:
        llm_part.language_model(tokenizer, 64, 2, 32).save_pretrained(other)
        tokenizer.save_pretrained(other)
        encoder, llm = folder, other
    settings = ModelSettings(
        encoders=[str(encoder)],
        llm=str(llm),
        connector=ConnectorSettings(num_heads=2, head_dim=16, num_key_value_heads=1),
        tokens_per_clip=4,
    )
    model, processor = join_parts(settings, max_clips=8)
    kind = ENCODERS[model.config.encoders[0].model_type]
    assert isinstance(model.model.encoders[0], kind.model_class)
    model.save_pretrained(other.with_name("joined"))
    processor.save_pretrained(other.with_name("joined"))
    text = "00:04-00:06: heart moves up. 00:12"
    taught = tokenizer.encode(text)
    assert [tokenizer.decode(i) for i in (taught[0], taught[-1])] == ["00:04", "00:12"]
    saved = AutoProcessor.from_pretrained(other.with_name("joined")).tokenizer
    for found in (
        processor.tokenizer,
        saved,
        AutoTokenizer.from_pretrained(other.with_name("joined")),
    ):
        assert found.encode(text) == taught
    frames = torch.randint(0, 256, (1, 4, 3, 64, 64), dtype=torch.uint8)
    tokens = model.model.connect(model.model.encode([frames]))
    assert tokens.shape == (1, 4, model.config.text_config.hidden_size)
    assert torch.isfinite(tokens).all()


@pytest.mark.slow
def test_the_command_leaves_a_part(tmp_path, capsys):
    out = tmp_path / "part"
    assert main(["part", "videomae", "--out", str(out), "--steps", "1"]) == 0
    assert (out / "model" / "config.json").is_file()
    assert "trained part" in capsys.readouterr().out


def test_an_unknown_part_is_one_clear_line(tmp_path, capsys):
    assert main(["part", "nose", "--out", str(tmp_path / "x")]) == 2
    assert "no part 'nose'; there are: llm-0.3m, " in capsys.readouterr().err
