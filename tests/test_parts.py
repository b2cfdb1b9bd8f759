"""The micro parts: what their batches hold, that they learn, that the command leaves a part."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from apollo.cli import main
from apollo.model.encoders import preprocessing
from apollo.train import parts
from apollo.world import corpus, language
from apollo.world.scene import make_scene


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(seed=0, num_texts=300)


def test_a_time_a_word_and_a_sign_are_single_tokens(tokenizer):
    for text in ("00:04", "02:00", " circle", " moves", " owl"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1, text


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Ünïcode 漢字 🎬 and\ttabs\n", "clip from 00:00-00:02: nothing.", "x = 1e-5"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_only_answers_are_supervised(tokenizer):
    messages = corpus.text_sample(seed=0, index=3)
    ids, labels = parts.encode_text(tokenizer, messages)
    said = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(said) == "".join(answers)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_text_batches_depend_on_their_number_alone(tokenizer):
    first = parts.text_batches(tokenizer, 0, 2, parts.LESSONS[1], group=2)
    second = parts.text_batches(tokenizer, 0, 2, parts.LESSONS[1], group=2)
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
    [("frame", parts.image_encoder, 0), ("clip", parts.video_encoder, 1)],
)
def test_an_encoder_learns_to_name_facts(tokenizer, kind, build, extra):
    torch.manual_seed(0)
    encoder = build()
    model = parts.FactNaming(encoder, parts.WIDTH, parts.VOCABULARY, extra)
    batch = parts.fact_batches(kind, tokenizer, preprocessing(encoder.config), 0, rows=8)(0)
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
    prepare = preprocessing(parts.image_encoder().config)
    batch = parts.fact_batches("frame", tokenizer, prepare, 0, rows=6)(1)
    assert batch["truth"].sum(1).min() >= 1
    assert batch["truth"].shape == (6, len(batch["phrases"]))
    assert np.isfinite(batch["pixel_values"].numpy()).all()


def test_rare_events_are_drawn_often():
    rng = np.random.default_rng(0)
    kinds = Counter()
    for _ in range(200):
        frames, facts = parts.draw_facts("clip", 0, rng)
        assert frames.shape[0] == 4
        kinds.update({language.kind_of_fact(fact) for fact in facts})
    assert min(kinds[kind] for kind in language.FACT_WORDS - {"ground"}) >= 5
    signs = sum(
        any(fact.startswith("sign ") for fact in parts.draw_facts("frame", 0, rng)[1])
        for _ in range(200)
    )
    assert signs > 80


class _Answers(torch.nn.Module):
    """Says what `answer` makes of the truth."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.truth = None

    def scores(self, pixel_values, phrases):
        return self.answer(self.truth)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(lambda t: t - 0.5, 1.0), (lambda t: torch.ones_like(t), 0.0), (lambda t: 0.5 - t, -1.0)],
)
def test_naming_accuracy_of_perfect_blind_and_wrong(tokenizer, answer, expected):
    prepare = preprocessing(parts.video_encoder().config)
    batches = parts.fact_batches("clip", tokenizer, prepare, 0, rows=6)
    model = _Answers(answer)

    def shown(number):
        batch = batches(number)
        model.truth = batch["truth"]
        return batch

    accuracy = parts.naming_accuracy(model, shown, 2, tokenizer)
    assert {"naming", "naming looks", "naming moves"} <= set(accuracy)
    assert set(accuracy.values()) == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("name", parts.PARTS)
def test_the_command_leaves_a_part_that_loads(tmp_path, name):
    out = tmp_path / name
    assert main(["part", name, "--out", str(out), "--steps", "4"]) == 0
    if name == "llm":
        AutoModelForCausalLM.from_pretrained(out / "model")
        assert AutoTokenizer.from_pretrained(out / "model").eos_token == "<|im_end|>"
    else:
        AutoModel.from_pretrained(out / "model")


def test_an_unknown_part_is_one_clear_line(tmp_path, capsys):
    assert main(["part", "nose", "--out", str(tmp_path / "x")]) == 2
    assert "no part 'nose'; there are: llm, siglip, internvideo2" in capsys.readouterr().err
