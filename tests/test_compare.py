"""Two runs on the same questions: planted differences, coverage, exact tests, and misuse."""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from test_scoring import make_questions, predict

from apollo.eval import compare as module
from apollo.eval.compare import (
    compare,
    comparison_page,
    difference_interval,
    difference_of,
    mcnemar,
    verdict,
)
from apollo.eval.scoring import Prediction

APART = np.arange(1000)  # a video for each question


def runs(right_a, right_b, per_video: int = 4) -> tuple[list[Prediction], list[Prediction]]:
    questions = make_questions(len(right_a), per_video)
    return tuple(
        [
            predict(question, bool(is_right))
            for question, is_right in zip(questions, right, strict=True)
        ]
        for right in (right_a, right_b)
    )


# ---- statistics ----


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (0, 10, 2 / 1024),
        (3, 4, 1.0),
        (0, 3000, 0.0),
    ],
)
def test_mcnemar_against_hand_computed_values(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-9)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_mcnemar_against_the_whole_sum():
    for total in (7, 40, 333):
        for fewer in range(total // 2 + 1):
            exact = sum(math.comb(total, k) for k in range(fewer + 1)) * 2 / 2**total
            assert mcnemar(fewer, total - fewer) == pytest.approx(min(1.0, exact), rel=1e-9)
    # A normal approximation is good to a per mille where there are a million.
    z = (501000 - 499000 - 1) / 1000
    assert mcnemar(499000, 501000) == pytest.approx(math.erfc(z / 2**0.5), rel=2e-3)


@pytest.mark.parametrize(("won", "lost"), [(90, 40), (40, 90), (60, 60), (5, 0)])
def test_planted_differences_are_recovered(won, lost):
    rng = np.random.default_rng(0)
    right_a = rng.random(1000) < 0.6
    right_b = right_a.copy()
    right_b[rng.choice(np.flatnonzero(~right_a), won, replace=False)] = True
    right_b[rng.choice(np.flatnonzero(right_a), lost, replace=False)] = False
    result = difference_of(right_a, right_b, APART)
    assert result.difference == pytest.approx((won - lost) / 1000)
    assert (result.only_b, result.only_a) == (won, lost)
    assert (result.accuracy_a, result.accuracy_b) == (right_a.mean(), right_b.mean())
    reach = 1.96 * ((won + lost - (won - lost) ** 2 / 1000) / 1000**2) ** 0.5  # Wald's interval
    assert result.low == pytest.approx(result.difference - reach, abs=0.002)
    assert result.high == pytest.approx(result.difference + reach, abs=0.002)
    said = "B is better" if won > lost else "A is better" if won < lost else "no difference"
    assert said in verdict(result)


def test_interval_holds_the_truth_about_95_times_in_100():
    """Skills go together within a video, and B answers 5 points of the questions better."""
    rng = np.random.default_rng(1)
    videos = np.repeat(np.arange(80), 5)
    inside = 0
    for trial in range(120):
        skill = np.repeat(rng.beta(2, 2, size=80), 5) * 0.9
        gain = np.repeat(rng.normal(0.05, 0.1, size=80), 5)
        hardness = rng.random(400)  # the same question is as hard for both
        low, high = difference_interval(
            hardness < skill, hardness < skill + gain, videos, seed=trial
        )
        truth = 0.05  # but for skills clipped at 0 and 1, less than 0.005
        inside += low <= truth <= high
    assert 104 <= inside <= 120


def test_it_is_the_mirror_image_if_the_runs_are_swapped():
    rng = np.random.default_rng(2)
    right_a, right_b = rng.random(300) < 0.5, rng.random(300) < 0.6
    there = difference_of(right_a, right_b, np.arange(300) // 3)
    back = difference_of(right_b, right_a, np.arange(300) // 3)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert (there.only_a, there.only_b, there.p) == (back.only_b, back.only_a, back.p)
    assert there.difference == -back.difference


def test_pairing_is_worth_its_name():
    """Nearly the same answers tell a small difference; unrelated ones of that accuracy do not."""
    rng = np.random.default_rng(3)
    right_a = rng.random(1000) < 0.5
    right_b = right_a | (rng.random(1000) < 0.04)
    paired = difference_of(right_a, right_b, APART)
    unrelated = difference_of(right_a, rng.permutation(right_b), APART)
    assert paired.low > 0 and paired.p < 0.001
    assert unrelated.low < 0 < unrelated.high
    assert paired.difference == unrelated.difference


@pytest.mark.parametrize("num_videos", [1, 10])
def test_equal_runs_are_not_certainly_equal(num_videos):
    right = np.ones(20, dtype=bool)
    low, high = difference_interval(right, right, np.arange(20) % num_videos)
    reach = 1.96**2 / (num_videos + 1.96**2)
    assert (low, high) == pytest.approx((-reach, reach))
    low, high = difference_interval(right, ~right, np.arange(20) % num_videos)
    assert (low, high) == pytest.approx((-1, -1 + 2 * reach))


# ---- two runs ----


def test_groups_add_up_and_list_who_won():
    rng = np.random.default_rng(4)
    right_a, right_b = rng.random(60) < 0.5, rng.random(60) < 0.7
    result = compare(*runs(right_a, right_b))
    assert list(result.groups) == ["overall", "benchmark", "class", "family", "needs", "duration"]
    for groups in result.groups.values():
        assert sum(d.num_questions for d in groups.values()) == 60
        assert sum(d.only_a for d in groups.values()) == (right_a & ~right_b).sum()
        assert sum(d.both_right for d in groups.values()) == (right_a & right_b).sum()
        assert sum(d.both_wrong for d in groups.values()) == (~right_a & ~right_b).sum()
    won = {f"questions / q{i}" for i in np.flatnonzero(right_b & ~right_a)}
    assert set(result.won) == won and len(result.won) == len(won)


def test_order_does_not_matter():
    a, b = runs(np.arange(40) % 3 == 0, np.arange(40) % 2 == 0)
    assert compare(a, b) == compare(a[::-1], b[7:] + b[:7])


def test_other_questions_are_refused_or_left_out():
    a, b = runs(np.ones(12), np.zeros(12))
    with pytest.raises(ValueError, match=r"2 in A alone \(questions / q0, questions / q1\)"):
        compare(a, b[2:])
    with pytest.raises(ValueError, match=r"12 in B alone \(.* and 7 more\).*--common"):
        compare([replace(p, benchmark="other") for p in a], b)
    result = compare(a[1:], b[:-3], common=True)
    assert result.groups["overall"]["all"].num_questions == 8
    assert result.only_in_b == ["questions / q0"] and len(result.only_in_a) == 3
    with pytest.raises(ValueError, match="no question in common"):
        compare(a[:3], b[3:], common=True)


@pytest.mark.parametrize(
    "change", [{"answer": 2, "correct": False}, {"video": "x.mp4"}, {"num_options": 5}]
)
def test_a_benchmark_that_was_changed_is_noticed(change):
    a, b = runs(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="1 questions have another .* q1"):
        compare(a, [b[0], replace(b[1], **change), *b[2:]])


def test_conditions_are_kept_apart():
    a, b = runs(np.ones(4), np.zeros(4))
    blind = [replace(p, condition="text", prediction=None, correct=False) for p in a]
    assert compare(a + blind, b).groups["overall"]["all"].only_a == 4
    with pytest.raises(
        ValueError, match="run B has no predictions under 'text', only under: video"
    ):
        compare(a + blind, b, "text")
    with pytest.raises(ValueError, match="only under: nothing"):
        compare([], b)
    with pytest.raises(ValueError, match="run A has two predictions for questions / q0"):
        compare([*a, a[0]], b)


# ---- the command ----


def write_run(folder, predictions):
    folder.mkdir()
    lines = "".join(json.dumps(prediction.to_json()) + "\n" for prediction in predictions)
    (folder / "predictions.jsonl").write_text(lines)
    return folder


def command(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"condition": "video", "common": False, "out": None} | changes)


def test_the_command_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    a, b = runs(np.arange(80) % 4 == 0, np.arange(80) % 4 < 3)
    paths = {
        "run_a": write_run(tmp_path / "a", a),
        "run_b": write_run(tmp_path / "b", b[:-1]) / "predictions.jsonl",
    }
    with pytest.raises(ValueError, match="1 in A alone"):
        module.main(command(**paths))
    out = tmp_path / "page.html"
    assert module.main(command(**paths, common=True, out=str(out))) == 0
    printed = capsys.readouterr().out
    assert "B is better than A" in printed and "p < 0.001" in printed
    assert "Left out: 1 questions of run A alone (questions / q79)" in printed
    assert "spatial" in printed and "reasoning" in printed and str(out) in printed
    page = out.read_text()
    assert "B is better than A" in page and "questions / q2\n" in page
    with pytest.raises(ValueError, match="cannot write"):
        module.main(command(**paths, common=True, out=str(tmp_path / "no" / "page.html")))


def test_a_run_that_is_not_there(tmp_path):
    run = write_run(tmp_path / "a", runs([1], [1])[0])
    (tmp_path / "stopped").mkdir()
    for path, message in ((tmp_path / "stopped", "no predictions.jsonl"), (tmp_path / "no", "no")):
        with pytest.raises(ValueError, match=message):
            module.main(command(run_a=run, run_b=path))


def test_the_page_shows_hostile_text_and_runs_none_of_it():
    attack = '<script>alert(1)</script>"{0}%s'
    a, b = runs(np.ones(4), np.zeros(4))
    a, b = (
        [replace(p, family=attack, question_id=attack + p.question_id) for p in r] for r in (a, b)
    )
    page = comparison_page(compare(a, b), attack, attack)
    assert "<script" not in page
    assert "http" not in page
    assert page.count("&lt;script&gt;") >= 6
