"""Choosing questions: the steps and their reasons, files that go round, honest validation."""

import csv
import json
import os

import numpy as np
import pytest

from apollo.cli import main
from apollo.curation import validate as validation_module
from apollo.curation.agreement import agreement
from apollo.curation.classes import CLASSES, labelling_questions, read_classes
from apollo.curation.curate import (
    FRAME,
    KEPT,
    NO_CLASS,
    RANK,
    REASONS,
    REVIEW,
    TEXT,
    VIDEO,
    Settings,
    choose,
)
from apollo.curation.discrimination import RANKINGS, entropy
from apollo.curation.irt import fit, mean_information
from apollo.curation.outputs import apply_review, read_review, write_review
from apollo.curation.records import Labels, MalformedError
from apollo.curation.shortcuts import majority
from apollo.curation.simulate import World, simulate
from apollo.curation.validate import MEASURES, cost_ratio, validate
from apollo.eval.answerers import Answer
from apollo.eval.benchmarks import read_benchmark
from apollo.eval.questions import read_questions
from apollo.eval.scoring import Prediction
from apollo.world.make import make_world

POOL = simulate(2000, 10, 1)


def test_every_question_has_a_reason():
    choice = choose(POOL, Settings(size=60))
    assert set(choice.reasons) == {KEPT, TEXT, FRAME, RANK} and len(choice.rows) == 60
    assert sorted(choice.rows) == np.flatnonzero(choice.reasons == KEPT).tolist()
    np.testing.assert_array_equal(choice.reasons == TEXT, majority(POOL, "text"))
    np.testing.assert_array_equal(
        choice.reasons == FRAME, majority(POOL, "frame") & ~majority(POOL, "text")
    )
    # Within each class nothing that was passed over has a higher entropy than what was kept.
    values, classes = entropy(POOL), POOL.columns["class"].codes
    for code in range(5):
        of_class = classes == code
        worst = values[of_class & (choice.reasons == KEPT)].min()
        assert values[of_class & (choice.reasons == RANK)].max() <= worst
    assert set(REASONS) == set(range(len(REASONS)))


def test_the_likely_rule_drops_fewer_by_luck():
    needs = POOL.columns["needs"].values()
    dropped = {
        rule: ((choose(POOL, Settings(60, rule=rule)).reasons == TEXT) & (needs != "text")).sum()
        for rule in ("majority", "likely")
    }
    assert dropped["likely"] < 0.3 * dropped["majority"]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_rankings(ranking):
    choice = choose(POOL, Settings(50, ranking=ranking))
    again = choose(POOL, Settings(50, ranking=ranking))
    assert len(set(choice.rows)) == 50 and choice.rows.tolist() == again.rows.tolist()


def test_balance_and_videos():
    classes = POOL.columns["class"].codes
    equal = np.bincount(classes[choose(POOL, Settings(50, shares="equal")).rows])
    assert equal.tolist() == [10] * 5
    skewed = POOL.with_classes(Labels(np.minimum(classes, 1).astype(np.int32), ("a", "b")))
    clean = choose(skewed, Settings(50)).reasons
    share = (skewed.columns["class"].codes[(clean == KEPT) | (clean == RANK)] == 0).mean()
    rows = choose(skewed, Settings(50)).rows
    assert (skewed.columns["class"].codes[rows] == 0).sum() == pytest.approx(50 * share, abs=1)
    single = choose(POOL, Settings(300, per_video=1))
    videos = POOL.columns["video"].codes[single.rows]
    assert len(set(videos)) == len(videos) and VIDEO in single.reasons
    few = POOL.of_models(np.arange(6))
    by_answers = choose(few, Settings(200, balance="answers"))
    clean = np.isin(by_answers.reasons, (KEPT, RANK))
    right = few.right("video")
    gaps = right[:, by_answers.rows].mean(axis=1) - right[:, clean].mean(axis=1)
    assert np.abs(gaps).max() < 0.03  # each model scores as in the pool
    everything = choose(POOL, Settings(5000, balance="none"))
    assert RANK not in everything.reasons and len(everything.rows) < 5000


def test_review_and_classes_come_before_the_ranking():
    refused, known = np.zeros(2000, bool), np.ones(2000, bool)
    first = choose(POOL, Settings(20)).rows
    refused[first[:3]], known[first[3:5]] = True, False
    choice = choose(POOL, Settings(20), refused, known)
    assert (choice.reasons[first[:3]] == REVIEW).all()
    assert (choice.reasons[first[3:5]] == NO_CLASS).all()
    assert len(choice.rows) == 20 and not set(choice.rows) & set(first[:5])


@pytest.mark.parametrize(
    "setting", [{"ranking": "x"}, {"rule": "x"}, {"balance": "x"}, {"shares": "x"}, {"size": 0}]
)
def test_settings_that_are_none(setting):
    with pytest.raises(ValueError, match="allowed|at least"):
        Settings(**setting)


def test_item_response_theory_finds_what_made_the_answers():
    rng = np.random.default_rng(0)
    ability = rng.normal(size=25)
    slope, ease = rng.lognormal(0, 0.4, 3000), rng.normal(size=3000)
    right = rng.random((25, 3000)) < 1 / (1 + np.exp(-(ability[:, None] * slope + ease)))
    found_ability, found_slope, found_ease = fit(right)
    assert agreement(found_ability, ability).pearson > 0.98
    assert agreement(found_ease, ease).pearson > 0.85
    assert agreement(found_slope, slope).spearman > 0.4  # 25 answers tell a slope roughly
    assert np.isfinite(mean_information(found_ability, found_slope, found_ease)).all()
    # Half of the answers unknown: the abilities stay.
    known = rng.random(right.shape) < 0.5
    assert agreement(fit(right & known, known)[0], ability).pearson > 0.97
    constant = fit(np.ones((4, 10), bool))
    assert all(np.isfinite(part).all() for part in constant)


WORLDS = {
    "five classes": World(ability_sd=0.8),
    "another pool": World(
        classes=("who", "when", "how often"), num_options=3, questions_per_video=3, lean=0.02
    ),
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_small_set_ranks_models_that_did_not_choose(world):
    pool = simulate(8200, 16, 11, world)
    found = validate(pool, Settings(200, rule="likely"), num_splits=20)
    assert 8200 / found.size >= 41
    methods = {name: measures["r2"].mean for name, measures in found.methods.items()}
    assert methods["entropy"] >= 0.9
    assert methods["entropy"] > methods["random"] and found.gain["entropy"].mean > 0
    assert all(set(measures) == set(MEASURES) for measures in found.methods.values())


def test_models_that_do_not_differ_are_not_ranked():
    """Chosen and validated on the same models this looks well; it must not."""
    pool = simulate(4000, 12, 3, World(ability_sd=0, class_sd=0))
    rows = choose(pool, Settings(100)).rows
    right = pool.right("video")
    flattering = agreement(right[:, rows].mean(axis=1), right.mean(axis=1)).r2
    found = validate(pool, Settings(100), num_splits=20).methods["entropy"]["r2"].mean
    assert found < 0.35 and flattering > found


def test_who_chooses_is_not_ranked(monkeypatch):
    chosen_by, real = [], validation_module.choose

    def spy(pool, settings):
        chosen_by.append(set(pool.models))
        return real(pool, settings)

    monkeypatch.setattr(validation_module, "choose", spy)
    ranked, reference = [], validation_module.agreement
    scores = {tuple(row): m for m, row in zip(POOL.models, POOL.right("video"), strict=True)}
    assert len(scores) == 10

    def count(small, full):
        ranked.append(np.shape(full)[-1])
        return reference(small, full)

    monkeypatch.setattr(validation_module, "agreement", count)
    validate(POOL, Settings(40), num_splits=3)
    assert {len(models) for models in chosen_by} == {5} and set(ranked) == {5}


def test_validation_needs_models_and_questions():
    with pytest.raises(ValueError, match="6 models"):
        validate(simulate(300, 5, 1), Settings(10))
    with pytest.raises(ValueError, match="smaller --size"):
        validate(simulate(300, 8, 1), Settings(290))


def test_cost():
    rows = np.arange(0, 2000, 40)  # one question of every eighth video
    cost = cost_ratio(POOL, rows)
    assert (cost.questions, cost.videos) == (40, 8)
    seconds = POOL.duration_s[::5].sum() / POOL.duration_s[rows].sum()
    assert cost.video_s == pytest.approx(seconds)


# ---- files, with a real world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A micro world, and runs of eight simulated models on it."""
    folder = tmp_path_factory.mktemp("curation")
    make_world(folder / "world", 8, seed=3, split="test", workers=1)
    questions = read_benchmark("world", folder / "world")
    rng = np.random.default_rng(0)
    ease = rng.normal(size=len(questions))
    sees = {"video": ("frames", "frame", "text"), "frame": ("frame", "text"), "text": ("text",)}
    for model in range(8):
        lines = []
        for condition, needs in sees.items():
            for question, easy in zip(questions, ease, strict=True):
                knows = question.needs in needs and rng.random() < 1 / (
                    1 + np.exp(3 - model - easy)
                )
                option = question.answer if knows else int(rng.integers(4))
                made = Prediction.of(question, condition, Answer(option, "ok", [0.0] * 4))
                lines.append(json.dumps(made.to_json()))
        run = folder / f"runs/m{model}"
        run.mkdir(parents=True)
        (run / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def runs_of(world):
    return [str(run) for run in sorted((world / "runs").iterdir())]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_predictions_to_a_benchmark_that_runs(world, tmp_path, capsys):
    out = tmp_path / "small"
    line = ["curate", *runs_of(world), "--data", str(world / "world"), "--size", "8"]
    assert main([*line, "--splits", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "better R2 than" in text and "times as many questions" in text
    kept = read_benchmark("curated", out)
    pool = read_questions(world / "world")
    assert len(kept) == 8 and all(question.video.is_file() for question in kept)
    by_id = {f"world/{question.question_id}": question for question in pool}
    for question in kept:
        original = by_id[question.question_id]
        assert (question.options, question.answer) == (original.options, original.answer)
        assert os.path.samefile(question.video, original.video)
    decisions = read_csv(out / "decisions.csv")
    assert len(decisions) == len(pool) and {row["reason"] for row in decisions} <= set(
        REASONS.values()
    )
    assert sum(row["reason"] == "kept" for row in decisions) == 8
    page = (out / "curation.html").read_text()
    assert page.count("data:image/jpeg") > 10 and "http" not in page.replace("http-equiv", "")
    assert main(["eval", "oracle", "--data", str(out), "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["scores"]["overall"]["all"]["video"]["accuracy"] == 1
    assert main([*line, "--out", str(out)]) == 2  # not over what is there


def test_the_review_goes_round(world, tmp_path, capsys):
    line = ["curate", *runs_of(world), "--data", str(world / "world"), "--size", "8"]
    line += ["--splits", "0"]
    assert main([*line, "--out", str(tmp_path / "a")]) == 0
    sheet = read_csv(tmp_path / "a/review.csv")
    assert len(sheet) == 8 and all(row["question"] and row["answer"] for row in sheet)
    sheet[0].update(verdict="drop", note="two are right")
    sheet[1].update(verdict="Keep", **{"class": "reasoning"})
    with (tmp_path / "filled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sheet[0])
        writer.writeheader()
        writer.writerows(sheet)
    again = [*line, "--review", str(tmp_path / "filled.csv"), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    reasons = {row["question_id"]: row for row in read_csv(tmp_path / "b/decisions.csv")}
    assert reasons[sheet[0]["question_id"]]["reason"] == REASONS[REVIEW]
    assert reasons[sheet[1]["question_id"]]["class"] == "reasoning"
    second = {row["question_id"]: row for row in read_csv(tmp_path / "b/review.csv")}
    assert second[sheet[0]["question_id"]]["note"] == "two are right"
    assert len(second) == 9  # eight kept, and the one that was dropped
    assert json.loads((tmp_path / "b/manifest.json").read_text())["num_reviewed"] == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    "rows, message",
    [
        ("world,q0000001,maybe,,", "maybe"),
        ("world,nothing,keep,,", "not in the pool"),
        ("world,q0000001,keep,,\nworld,q0000001,drop,,", "twice"),
    ],
)
def test_reviews_that_are_none(tmp_path, rows, message):
    path = tmp_path / "r.csv"
    path.write_text(f"benchmark,question_id,verdict,class,note\n{rows}\n")
    with pytest.raises(MalformedError, match=message):
        read_review(path, POOL)


def test_a_review_without_texts(tmp_path):
    write_review(POOL, np.array([3, 5]), [], {}, tmp_path / "r.csv")
    refused, classes = apply_review(read_review(tmp_path / "r.csv", POOL), POOL)
    assert not refused.any()
    assert classes.values().tolist() == POOL.columns["class"].values().tolist()


def test_classes_by_mapping_rule_and_table(world, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("by: class\nmap: {spatial: where}\nelse: ''\n")
    found = read_classes(path, POOL).values()
    np.testing.assert_array_equal(found == "where", POOL.columns["class"].values() == "spatial")
    path.write_text("by: class\nmap: {spatial: where}\n")
    with pytest.raises(MalformedError, match="egocentric"):
        read_classes(path, POOL)
    pool = read_runs(world)
    questions = read_benchmark("world", world / "world")
    path.write_text("rules:\n- {match: '^how many', class: count}\nelse: other\n")
    found = dict(zip(pool.question_ids, read_classes(path, pool, questions).values(), strict=True))
    for question in questions:
        name = "count" if question.question.startswith("How many") else "other"
        assert found[question.question_id] == name
    assert set(found.values()) == {"count", "other"}
    with pytest.raises(ValueError, match="--data"):
        read_classes(path, pool)
    table = tmp_path / "c.csv"
    table.write_text(f"question_id,class\n{pool.question_ids[0]},mine\n")
    assert read_classes(table, pool).values().tolist() == ["mine"] + [""] * (pool.num_questions - 1)
    table.write_text("question_id,class\nnobody,mine\n")
    with pytest.raises(MalformedError, match="nobody"):
        read_classes(table, pool)
    for text in ("[1]", "by: x\nmap: {}\n", "rules: [{match: '('}]\n", "{"):
        path.write_text(text)
        with pytest.raises(MalformedError, match="c.yaml"):
            read_classes(path, pool, questions)


def read_runs(world):
    from apollo.curation.readers import parse_sources, read_pool

    return read_pool(parse_sources(runs_of(world)))


def test_an_answerer_sorts_into_classes(world, tmp_path, capsys):
    line = ["curate", *runs_of(world), "--data", str(world / "world")]
    assert main([*line, "--ask-classes", "--out", str(tmp_path / "ask")]) == 0
    ask = ["eval", "random", "--data", str(tmp_path / "ask"), "--condition", "text"]
    assert main([*ask, "--out", str(tmp_path / "labels")]) == 0
    pool, questions = read_runs(world), read_benchmark("world", world / "world")
    found = read_classes(tmp_path / "labels", pool)
    assert set(found.names) <= set(CLASSES) and len(set(found.names)) > 2
    assert len(labelling_questions(pool, questions)) == pool.num_questions
    labels = ["--classes", str(tmp_path / "labels"), "--size", "5", "--splits", "0"]
    assert main([*line, *labels, "--out", str(tmp_path / "out")]) == 0
    with pytest.raises(MalformedError, match="ask-classes"):
        read_classes(runs_of(world)[0], pool)
    capsys.readouterr()


def test_mistakes_are_one_line(world, tmp_path, capsys):
    runs = runs_of(world)
    for number, more in enumerate(
        (
            ["--rank", "x"],
            ["--data", str(tmp_path)],
            ["--data", str(world / "none")],
            ["--review", str(tmp_path / "none.csv")],
            ["--ask-classes"],
        )
    ):
        assert main(["curate", *runs, *more, "--out", str(tmp_path / str(number))]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "error" in error


def test_too_few_models_are_said(world, tmp_path, capsys):
    line = ["curate", *runs_of(world)[:4], "--size", "5", "--out", str(tmp_path / "few")]
    assert main(line) == 0
    assert "Not validated" in capsys.readouterr().out
    assert json.loads((tmp_path / "few/curation.json").read_text())["validation"] is None


def test_the_audit_of_runs(world, tmp_path, capsys):
    out = tmp_path / "audit"
    line = ["audit", *runs_of(world), "--data", str(world / "world"), "--out", str(out)]
    assert main([*line, "--save", str(tmp_path / "all.parquet")]) == 0
    first = capsys.readouterr().out
    assert "video - text" in first and "longest option" in first
    assert main(["audit", str(tmp_path / "all.parquet")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]
    rows = read_csv(out / "questions.csv")
    assert len(rows) == 40 and {"right_text", "entropy", "answerable_frame"} <= rows[0].keys()
    json.loads((out / "audit.json").read_text())
    assert "<h2>" in (out / "audit.html").read_text()
