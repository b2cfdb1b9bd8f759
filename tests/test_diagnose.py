"""Diagnosis: duels that nothing wins unseen, probes that read, and verdicts that name the link."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ENCODERS, make_config, make_model, make_processor
from torch import nn

from apollo.chat import VideoChat
from apollo.cli import main
from apollo.eval import diagnose as diagnosing
from apollo.eval.diagnose import Clip, answers, diagnose, eyes_of, eyes_of_encoder, said
from apollo.eval.probes import (
    Facts,
    fight,
    fold,
    fresh_clips,
    patches,
    places,
    probe_scores,
    read_scenes,
    train_probe,
)
from apollo.eval.questions import Question, read_questions
from apollo.eval.verdict import (
    FACTS_OF,
    LINKS,
    MIN_VIDEOS,
    STAGE,
    Answered,
    Duels,
    Resamples,
    judge,
    page_of,
)
from apollo.media import load_video
from apollo.messages import question_prompt
from apollo.model import encoders
from apollo.model.configuration import ENCODER_CONFIGS
from apollo.world import language
from apollo.world.make import make_world
from apollo.world.questions import FAMILIES
from apollo.world.scene import make_scene

NUM_VIDEOS = 4


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("diagnose") / "world"
    make_world(path, NUM_VIDEOS, seed=3, split="test", workers=1)
    return path


@pytest.fixture(scope="module")
def tiny():
    config = make_config()
    return make_model(config), make_processor(config)


def some_facts(seed: int = 0) -> Facts:
    """What is true of the clips of twelve random scenes."""
    told, videos = [], []
    for video in range(12):
        scene = make_scene(seed, video)
        spans_s = language.clip_spans(scene.duration_s)
        for clip in range(len(spans_s)):
            told.append({*language.clip_facts(scene, spans_s, clip), f"{scene.ground} ground"})
            videos.append(video)
    return Facts.of(told, videos)


# ---- duels


def test_rivals_are_clips_of_which_the_fact_could_be_true():
    told = [
        {"red circle", "circle moves left", "grey ground"},
        {"red circle", "grey ground"},
        {"blue circle", "grey ground"},
        {"red ring", "ring moves left", "black ground"},
    ]
    facts = Facts.of(told, [0, 0, 1, 2])
    rivals = {
        phrase: np.flatnonzero(column).tolist()
        for phrase, column in zip(facts.phrases, facts.rivals().T, strict=True)
    }
    assert rivals["circle moves left"] == [1]  # of its own video
    assert rivals["red circle"] == [2]  # where a circle is seen, and is not red
    assert rivals["red ring"] == []
    assert rivals["black ground"] == [0, 1, 2]
    assert not (some_facts().rivals() & some_facts().truth).any()


def test_who_knows_wins_and_who_does_not_look_draws():
    facts = some_facts()
    knows = fight(facts.truth.astype(float), facts)
    assert set(knows) >= {"looks", "ground", "moves", "sign"}
    assert all((duels.values == 1).all() for duels in knows.values())
    for kind, duels in fight(-facts.truth.astype(float), facts).items():
        assert (duels.values == -1).all(), kind
    # Which facts are frequent, and even all that is true somewhere in the video, is no help.
    frequent = np.repeat(facts.truth.mean(0)[None], len(facts.videos), 0)
    assert all((duels.values == 0).all() for duels in fight(frequent, facts).values())
    in_video = np.array([facts.truth[facts.videos == v].any(0) for v in facts.videos], dtype=float)
    for kind, duels in fight(in_video, facts).items():
        if kind not in ("looks", "ground"):
            assert (duels.values == 0).all(), kind


def test_resamples_begin_with_the_mean_itself():
    rng = np.random.default_rng(0)
    videos, values = rng.integers(8, size=50), rng.normal(size=50)
    samples = Resamples(10).mean(videos, values)
    assert samples[0] == pytest.approx(values.mean())
    assert np.nanpercentile(samples, 2.5) < values.mean() < np.nanpercentile(samples, 97.5)
    np.testing.assert_array_equal(samples, Resamples(10).mean(videos, values))
    # A video that is not drawn leaves nothing to average.
    assert np.isnan(Resamples(10).mean(np.array([0]), np.array([1.0]))).any()


# ---- probes


def planted(num_videos: int, seed: int) -> tuple[Facts, torch.Tensor]:
    """Clips with two shapes in view, one of which may move, as one noisy token for each."""
    rng = np.random.default_rng(seed)
    words = "circle ring star left right red blue".split()
    code = dict(zip(words, np.random.default_rng(0).normal(size=(7, 12)), strict=True))
    told, videos, tokens = [], [], []
    for video in range(num_videos):
        shapes = rng.permutation(["circle", "ring", "star"])[:2]
        colours = rng.choice(["red", "blue"], size=2)
        for _ in range(4):
            places_ = rng.normal(size=(4, 12)) * 0.2
            facts = set()
            for place, shape, colour in zip(rng.permutation(4), shapes, colours, strict=False):
                places_[place] += code[shape] + code[colour]
                facts.add(f"{colour} {shape}")
                if rng.random() < 0.4:
                    way = str(rng.choice(["left", "right"]))
                    places_[place] += code[way]
                    facts.add(f"{shape} moves {way}")
            told.append(facts)
            videos.append(video)
            tokens.append(places_)
    return Facts.of(told, videos), torch.tensor(np.array(tokens), dtype=torch.float16)


def test_a_probe_reads_what_is_there_and_nothing_else():
    learnt, learnt_tokens = planted(60, seed=1)
    facts, tokens = planted(30, seed=2)
    probe = train_probe(learnt_tokens, learnt, num_steps=80)

    def read(shown: torch.Tensor) -> dict[str, float]:
        found = fight(probe_scores(probe, shown, facts.phrases), facts)
        return {kind: float(duels.values.mean()) for kind, duels in found.items()}

    assert min(read(tokens).values()) > 0.8
    shuffled = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert all(abs(value) < 0.25 for value in read(tokens[shuffled]).values())
    assert all(value == 0 for value in read(tokens[:1].expand_as(tokens)).values())


def test_training_a_probe_leaves_torch_as_it_was_and_repeats_itself():
    facts, tokens = planted(5, seed=1)
    state = torch.get_rng_state()
    scores = [probe_scores(train_probe(tokens, facts, 3), tokens, facts.phrases) for _ in "ab"]
    np.testing.assert_array_equal(*scores)
    assert torch.equal(state, torch.get_rng_state())
    assert probe_scores(train_probe(tokens, facts, 3), tokens, ["never learnt"]).shape[1] == 1


def test_tokens_are_places_and_wide_ones_are_folded():
    features = torch.randn(2, 4, 9, 9, 300)
    assert places(features).shape == (2, 16, 1024)
    small = torch.randn(2, 1, 3, 3, 5)
    torch.testing.assert_close(places(small), small.flatten(1, 3).half())
    wide = torch.randn(1, 40, 5000)
    lengths = fold(wide).float().norm(dim=-1) / wide.norm(dim=-1)
    assert 0.9 < lengths.mean() < 1.1
    pixels = torch.zeros(1, 1, 3, 64, 64, dtype=torch.uint8)
    pixels[..., :16, 48:] = 255  # the upper right of 4 x 4 places
    lit = patches(pixels).mean(-1)[0, 0]
    assert lit[0, 3] == 1 and lit.sum() == 1


# ---- what is shown


def test_fresh_clips_are_of_one_scene_and_told_as_they_are_seen(tiny):
    eyes = eyes_of(*tiny)
    seen = list(fresh_clips(eyes, 3, seed=0))
    for _, facts, features, pixels in seen:
        assert 2 <= len(facts) == len(features) == len(pixels) <= 3
        assert len({next(f for f in of if f.endswith("ground")) for of in facts}) == 1
    again = list(fresh_clips(eyes, 3, seed=0))
    assert [facts for _, facts, *_ in seen] == [facts for _, facts, *_ in again]


@pytest.mark.parametrize("kind", ["siglip_vision_model", "dinov2", "internvideo2", "videomae"])
def test_a_bare_encoder_is_probed_alone(kind, tmp_path, world):
    config = ENCODER_CONFIGS[kind](**ENCODERS[kind])
    encoders.ENCODERS[kind].model_class(config).save_pretrained(tmp_path)
    eyes = eyes_of_encoder(str(tmp_path))
    assert eyes.single_frames == encoders.ENCODERS[kind].per_frame
    found = diagnose(eyes, world, num_videos=2, num_scenes=4, num_steps=2)
    kinds = {row.name for row in found.kinds}
    assert not found.families and {"ground", "looks"} <= kinds
    if eyes.single_frames:  # a frame tells nothing of what happens
        assert kinds <= {"ground", "looks", "sign"}
    assert all(set(row.estimates) == {"pixels", "encoders"} for row in found.kinds)


def test_an_image_encoder_is_told_the_facts_of_the_frame_it_sees(tmp_path):
    config = ENCODER_CONFIGS["dinov2"](**ENCODERS["dinov2"])
    encoders.ENCODERS["dinov2"].model_class(config).save_pretrained(tmp_path)
    eyes = eyes_of_encoder(str(tmp_path))
    squares = np.arange(4, dtype=np.uint8)[None, :, None, None, None]
    squares = np.broadcast_to(squares, (1, 4, 28, 28, 3)).copy()
    features, pixels = eyes.look([squares])
    assert features.shape[1] == 1 and pixels.flatten().unique().mul(255).round().tolist() == [2]
    scene = make_scene(0, 5)
    times_s = np.array([[0.0, 0.5, 1.0, 1.5]])
    told = eyes.facts(scene, times_s, np.array([[0.0, 2.0]]), 0)
    assert told == set(language.frame_facts(scene, 1.0))


# ---- the LLM


def clip_of(*line: str, video: int = 0, start_s: float = 0.0) -> Clip:
    return Clip(video, np.array([start_s, start_s + 2]), set(), list(line))


def test_sentences_are_as_likely_as_the_model_says(tiny):
    model, processor = tiny
    clips = [clip_of("small red ring left", "ring blinks"), clip_of("ring spins", start_s=2.0)]
    features = torch.randn(2, *model.model.grid, 32)
    with torch.inference_mode():
        tokens = model.connect(features)
    pairs = [(0, 0), (0, 1), (1, 0)]
    found = list(diagnosing._sentence_scores(model, processor, clips, tokens, pairs))
    for (clip, seen), sentences in zip(pairs, found, strict=True):
        content = diagnosing._describe(clips[clip], 4)
        line = ". ".join(clips[clip].line) + "."
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": line}]
        ids = processor([turns], with_pixels=False)["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids, clip_features=features[[seen]]).logits.log_softmax(-1)
        each = logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        prompt = processor([turns[:1]], add_generation_prompt=True, with_pixels=False)["input_ids"]
        start, length = prompt.shape[1] - 1, len(line.encode())  # one token a byte
        assert sum(sentences) == pytest.approx(float(each[start : start + length].sum()), abs=1e-3)
        assert len(sentences) == len(clips[clip].line)


def test_an_llm_that_does_not_look_draws(tiny):
    model, processor = tiny
    clips = [
        clip_of("small red ring left", "ring blinks"),
        clip_of("small red ring left"),
        clip_of("small blue ring left", "ring spins", video=1),
        clip_of("small blue ring left", video=1),
    ]
    blind = said(model, processor, clips, torch.zeros(4, 4, 16))
    assert set(blind) == {"looks", "blinks", "spins"}
    assert all((duels.values == 0).all() for duels in blind.values())
    seeing = said(model, processor, clips, torch.randn(4, 4, 16))
    assert all((duels.values != 0).all() for duels in seeing.values())


def test_answers_are_those_of_a_chat(tiny, world):
    model, processor = tiny
    (path, scene), *_ = read_scenes(world)
    asked = [q for q in read_questions(world / "questions.jsonl") if q.video == path]
    loaded = load_video(path, processor)
    pixels = processor([[{"role": "user", "content": [{"type": "video", "video": loaded}]}]])
    with torch.inference_mode():
        features = model.encode(pixels["pixel_values"])
    told = language.transcript(scene, loaded.spans_s)
    cases = [
        ([{"type": "video", "video": loaded}], features, ""),
        ([{"type": "text", "text": told + "\n"}], None, told + "\n"),
    ]
    for header, clip_features, text in cases:
        expected = []
        for question in asked:
            prompt = text + question_prompt(question.question, question.options)
            media = [part for part in header if part["type"] == "video"]
            turn = {"role": "user", "content": [*media, {"type": "text", "text": prompt}]}
            scores = VideoChat(model, processor).score_options([turn], question.options)
            expected.append(int(np.argmax(scores)) == question.answer)
        assert answers(model, processor, header, asked, clip_features) == expected


def test_a_prompt_beyond_the_context_is_refused(tiny):
    model, processor = tiny
    question = Question("q", Path("v.mp4"), "What?", ("a", "b"), 0)
    header = [{"type": "text", "text": "long " * model.config.text_config.max_position_embeddings}]
    with pytest.raises(ValueError, match="context"):
        answers(model, processor, header, [question])


# ---- verdicts


def wins(strength: float, seed: int, num: int = 200) -> Duels:
    """Duels over forty videos of which about so many are won more than lost."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(num) < (1 + strength) / 2, 1.0, -1.0)
    return Duels(np.arange(num) % 40, values)


def answered(words: float, whole: float, family: str = "move_direction") -> list[Answered]:
    rng = np.random.default_rng(7)
    question = Question("q", Path("v"), "?", tuple("abcd"), 0, family=family, needs="frames")
    return [
        Answered(question, i % 40, bool(rng.random() < words), bool(rng.random() < whole))
        for i in range(200)
    ]


def diagnosis_of(pixels, encoders_, connector, reading, words=0.95, whole=0.9):
    strengths = dict(pixels=pixels, encoders=encoders_, connector=connector, reading=reading)
    duels = {
        link: {kind: wins(strength, seed) for seed, kind in enumerate(("moves", "looks", "sign"))}
        for link, strength in strengths.items()
    }
    return judge(duels, answered(words, whole), 40)


@pytest.mark.parametrize(
    ("measured", "link"),
    [
        ((0.3, 0.9, 0.85, 0.8), None),
        ((0.3, 0.0, 0.0, 0.0, 0.95, 0.3), "encoders"),
        ((0.5, 0.5, 0.2, 0.0, 0.95, 0.3), "encoders"),  # untrained: no more than the pixels give
        ((0.3, 0.9, 0.1, 0.0, 0.95, 0.3), "connector"),
        ((0.3, 0.9, 0.85, 0.0, 0.95, 0.3), "reading"),
        ((0.3, 0.9, 0.85, 0.0, 0.25, 0.25), "words"),  # an LLM of random weights
        ((0.3, 0.9, 0.85, 0.8, 0.95, 0.3), "whole"),
        ((0.3, 0.1, 0.1, 0.9), None),  # what the LLM says must have come through
    ],
)
def test_the_first_broken_link_is_named(measured, link):
    found = diagnosis_of(*measured)
    assert (found.overall.broken, found.overall.sure) == (link, True)
    if link is None:
        assert found.overall.verdict.startswith("no link is broken; the weakest is")
    else:
        assert LINKS[link].split(" {}")[0] in found.overall.verdict
    kinds = {row.broken for row in found.kinds}
    if link in ("encoders", "connector", "reading"):
        assert kinds == {link}
    if link in ("whole", None):
        assert kinds == {None}


def test_an_encoder_alone_is_said_to_name_what_it_names():
    duels = {"pixels": {"moves": wins(0.2, 0), "looks": wins(0.2, 1)}}
    named = {"moves": wins(0.9, 2), "looks": wins(0.9, 3)}
    assert judge(duels | {"encoders": named}, [], 40).overall.verdict.endswith("every kind of fact")
    named["spins"] = wins(0.1, 4)
    duels["pixels"]["spins"] = wins(0.1, 5)
    overall = judge(duels | {"encoders": named}, [], 40).overall
    assert overall.verdict == "the encoders name every kind of fact except spins"
    assert set(overall.estimates) == {"pixels", "encoders"}


def test_a_family_is_led_back_to_the_fact_that_does_not_arrive():
    [family] = diagnosis_of(0.3, 0.9, 0.1, 0.0, 0.95, 0.3).families
    assert (family.broken, family.sure) == ("connector", True)
    assert family.verdict == "the connector loses moves, which move_direction needs"
    [family] = diagnosis_of(0.3, 0.9, 0.85, 0.8, 0.95, 0.3).families
    assert family.broken == "whole"
    [family] = diagnosis_of(0.3, 0.9, 0.85, 0.8, 0.3, 0.25).families
    assert family.verdict == "the LLM cannot answer move_direction even from words"


def test_what_is_not_sure_is_said_so_and_too_little_is_not_judged():
    duels = {link: {"moves": wins(0.9, 0)} for link in ("encoders", "connector")}
    duels["pixels"] = {"moves": wins(0.3, 1)}
    some = Duels(np.arange(10), np.array([1.0] * 7 + [-1.0] * 3))  # 0.4, and 0.45 is the least
    [row] = judge(duels | {"reading": {"moves": some}}, [], 40).kinds
    assert (row.broken, row.sure) == ("reading", False)
    assert row.verdict.startswith("perhaps the LLM does not read moves")
    few = Duels(np.arange(MIN_VIDEOS - 1), np.full(MIN_VIDEOS - 1, -1.0))
    found = judge({link: {"moves": few} for link in duels}, [], 40)
    assert found.kinds[0].verdict == "too few to judge" and found.kinds[0].broken is None
    assert found.overall.verdict.startswith("too few facts to judge")


def test_families_ask_of_kinds_that_there_are():
    kinds = set(some_facts().kinds) | set(some_facts(1).kinds) | set(some_facts(2).kinds)
    assert set(FACTS_OF) <= set(FAMILIES)
    assert {kind for of in FACTS_OF.values() for kind in of} | set(STAGE) <= kinds


# ---- the whole


def small(function):
    return functools.partial(function, num_scenes=4, num_steps=2)


def test_a_whole_model_from_the_command_line(tiny, world, tmp_path, monkeypatch, capsys):
    model, processor = tiny
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(diagnosing, "diagnose", small(diagnose))
    out = tmp_path / "out"
    command = ["diagnose", str(tmp_path / "model"), "--data", str(world), "--out", str(out)]
    assert main([*command, "--num-videos", "3"]) == 0
    assert "Verdict: too few facts to judge" in capsys.readouterr().out
    found = json.loads((out / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert found["num_videos"] == 3
    asked = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    number = sum(row["video"] < "videos/000003" for row in asked)
    assert sum(row["number"] for row in found["families"]) == number
    page = (out / "diagnosis.html").read_text()
    assert "<title>Diagnosis of" in page and "http" not in page.replace(str(tmp_path), "")
    assert all(row["name"] in page for row in (*found["kinds"], *found["families"]))


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"video": 1}\n', "[]\n", "not json\n"])
def test_what_is_no_world_is_refused_in_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "scenes.jsonl").write_text(content)
    assert main(["diagnose", "micro", "--data", str(tmp_path)]) == 2
    assert "scenes.jsonl" in capsys.readouterr().err


def test_what_is_no_model_is_refused_in_one_line(world, tmp_path, capsys):
    for name in ("nowhere", str(tmp_path)):
        assert main(["diagnose", name, "--data", str(world)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_names_with_markup_are_shown_as_they_are(capsys):
    found = diagnosis_of(0.3, 0.9, 0.85, 0.8)
    row = dataclasses.replace(found.kinds[0], name="[red]<b>moves</b>")
    page = page_of(dataclasses.replace(found, kinds=[row]), "<i>model</i>")
    assert "<b>moves" not in page and "<i>model" not in page and "[red]" in page


# ---- the shipped model, whole and broken at each link


class Shuffled(nn.Module):
    """A connector whose clips change places."""

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.connector(features)
        return tokens[torch.randperm(len(tokens), generator=self.generator)]


def randomise(part: nn.Module) -> None:
    """Give all matrices of a part random weights, of a size at which signals do not die."""
    torch.manual_seed(0)
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def break_link(model: nn.Module, link: str) -> None:
    if link == "encoders":
        randomise(model.model.encoders)
    elif link == "connector":
        model.model.connector = Shuffled(model.model.connector)
    elif link == "words":
        randomise(model.model.llm)


@pytest.mark.slow
def test_the_shipped_model_and_each_of_its_broken_versions(tmp_path):
    make_world(tmp_path / "world", 90, seed=11, split="test")
    found = {}
    for link in ("", "encoders", "connector", "words"):
        chat = VideoChat.load("micro")
        break_link(chat.model, link)
        eyes = eyes_of(chat.model, chat.processor)
        found[link] = diagnose(eyes, tmp_path / "world", chat.model, chat.processor).overall
    assert {link: row.broken for link, row in found.items() if link} == {
        link: link for link in ("encoders", "connector", "words")
    }
    whole = found[""].estimates
    assert found[""].broken not in ("encoders", "words")
    for link in ("encoders", "connector", "words"):
        assert whole[link].low > found[link].estimates[link].high
