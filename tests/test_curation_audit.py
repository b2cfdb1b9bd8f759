"""Audits: planted shortcuts are found, the paper's table gives its figure, intervals hold."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from apollo.cli import main
from apollo.curation.agreement import agreement, correlation_interval, mean_interval
from apollo.curation.audit import audit, length_bias
from apollo.curation.discrimination import entropy, option_entropy, point_biserial
from apollo.curation.records import NOT_ASKED, RIGHT, WRONG, Labels, Pool
from apollo.curation.redundancy import (
    PAPER,
    against_figure_2,
    read_accuracies,
    redundancy,
)
from apollo.curation.shortcuts import answerable, kinds_of, majority
from apollo.curation.simulate import World, simulate
from apollo.eval.questions import Question
from apollo.eval.scoring import accuracy_interval

KIN = World(lean=0.3)  # blind models guess much alike
OTHER = World(  # a second pool: three options, other classes, harder shortcuts, weaker models
    classes=("who", "when", "how often"),
    families=6,
    questions_per_video=3,
    num_options=3,
    shares=(0.7, 0.2, 0.1),
    ability_sd=0.8,
    shortcut_ease=2.5,
    lean=0.1,
)


def planted(pool, condition):
    """What the condition shows enough for."""
    needs = pool.columns["needs"].values()
    return needs == "text" if condition == "text" else needs != "frames"


@pytest.mark.parametrize("world, seed", [(KIN, 1), (OTHER, 2)])
@pytest.mark.parametrize("condition", ["text", "frame"])
def test_planted_shortcuts_are_found(world, seed, condition):
    pool = simulate(4000, 12, seed, world)
    truth = planted(pool, condition)
    found = answerable(pool, condition, kinds_of(pool)) > 0.5
    assert (found & truth).sum() >= 0.95 * found.sum()  # precision
    assert (found & truth).sum() >= 0.95 * truth.sum()  # recall
    lucky = majority(pool, condition) & ~truth
    assert (found & ~truth).sum() < 0.5 * lucky.sum()  # most of the majority's luck is told apart


def test_wrong_options_that_files_do_not_tell():
    """Tables that say only what is right: models are taken to guess each on its own."""
    pool = simulate(4000, 12, 2, dataclasses.replace(OTHER, lean=0))
    untold = dataclasses.replace(pool, chosen=np.full_like(pool.chosen, -1))
    truth = planted(pool, "text")
    found = answerable(untold, "text", kinds_of(pool)) > 0.5
    assert (found == truth).mean() > 0.99


def test_one_option_leaves_nothing_to_know():
    pool = simulate(300, 8, 0)
    single = np.arange(300) < 20
    pool = dataclasses.replace(pool, num_options=np.where(single, 1, 4).astype(np.int16))
    assert (answerable(pool, "text")[single] == 0).all()
    assert np.isfinite(answerable(pool, "text", kinds_of(pool))).all()


@pytest.mark.parametrize("lean", [0, 0.5])
def test_luck_is_no_shortcut(lean):
    """Where all models guess, the majority's rule finds shortcuts and the estimate finds none."""
    pool = simulate(3000, 10, 3, World(shares=(1, 0, 0), lean=lean, num_options=2))
    assert majority(pool, "text").mean() > 0.3
    assert (answerable(pool, "text") > 0.5).mean() < 0.01


def test_kinds_that_need_no_video():
    """Also where blind models guess much alike, whole families are told apart."""
    pool = simulate(4000, 12, 4, KIN)
    found = audit(pool)
    assert set(found.solved_kinds["text"]) == {
        name for name in found.kinds.names if name.endswith("_5")
    }
    assert set(found.solved_kinds["frame"]) == {
        name for name in found.kinds.names if name.endswith(("_4", "_5"))
    }


def test_the_papers_table():
    table = read_accuracies([PAPER / "benchmark_modalities.csv"])
    assert table.is_papers and table.values.shape == (3, 10, 10)
    found = redundancy(table.benchmarks, table.values[0])
    num_pairs, differ = against_figure_2(found)
    assert num_pairs == 45
    # MLVU's row is known not to agree; of the rest all that differs is in NExT-QA's.
    assert {"MLVU", "NExT-QA"} <= {name for d in differ for name in (d.a, d.b)}
    assert all({"MLVU", "NExT-QA"} & {d.a, d.b} for d in differ)
    assert len(differ) == 13
    short, long = found.names.index("VideoMME-short"), found.names.index("VideoMME-long")
    assert found.pearson[short, long] ** 2 == pytest.approx(0.931, abs=5e-4)  # 0.94 in its text
    # Lengths of Video-MME are next to each other in the tree's order.
    places = [
        found.order.index(found.names.index(f"VideoMME-{x}")) for x in ("short", "medium", "long")
    ]
    assert max(places) - min(places) == 2


def test_the_command_on_the_papers_table(tmp_path, capsys):
    assert (
        main(["audit", str(PAPER / "benchmark_modalities.csv"), "--out", str(tmp_path / "a")]) == 0
    )
    text = capsys.readouterr().out
    assert "InternVL2 2B / NExT-QA" in text and "32 agree, 13 do not" in text and "0.504" in text
    assert (
        json.loads((tmp_path / "a/audit.json").read_text())["figure_2_differs"][0]["printed"] == 0.7
    )
    assert "Figure 2" in (tmp_path / "a/audit.html").read_text()


@pytest.mark.parametrize(
    "rows", ["m,b,x,1,1", "m,b,1,1,1\nm,b,1,1,1", "m,b,101,1,1", "m,,1,1,1", "m,b,-1,1,1"]
)
def test_tables_that_are_none(tmp_path, rows, capsys):
    (tmp_path / "t.csv").write_text(f"model,benchmark,video,image,text\n{rows}\n")
    assert main(["audit", str(tmp_path / "t.csv")]) == 2
    assert "t.csv" in capsys.readouterr().err


def test_agreement_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(5, size=(20, 9)) / 4, rng.random(9)
    found = agreement(a, b)
    for row, *values in zip(a, found.pearson, found.spearman, found.kendall, strict=True):
        expected = (
            stats.pearsonr(row, b)[0],
            stats.spearmanr(row, b)[0],
            stats.kendalltau(row, b)[0],
        )
        assert values == pytest.approx(expected)
    same = agreement(b, b)
    assert (same.r2, same.swapped) == (pytest.approx(1), 0)
    assert agreement(-b, b).swapped == 1
    assert np.isnan(agreement(np.ones(9), b).r2) and np.isnan(agreement(b[:2], b[:2]).r2)


def test_intervals_of_correlations():
    """About 95 of 100 hold the truth, of both kinds, over ten models."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1500, 10))
    y = 0.8 * x + 0.6 * rng.normal(size=(1500, 10))
    found = agreement(x, y)
    low, high = correlation_interval(found.pearson, 10)
    assert 0.93 < ((low < 0.8) & (0.8 < high)).mean() < 0.97
    low, high = correlation_interval(found.spearman, 10, of_ranks=True)
    truth = 6 / np.pi * np.arcsin(0.8 / 2)  # of ranks of a normal pair
    assert 0.9 < ((low < truth) & (truth < high)).mean() <= 1
    assert correlation_interval(np.array(0.9), 3) == (-1, 1)
    mean, low, high = mean_interval(np.array([1.0, np.nan, 3.0]))
    assert (mean, low, high) == pytest.approx((2, 2 - 12.706, 2 + 12.706), abs=1e-3)


def test_intervals_over_videos_are_the_bootstraps():
    pool = simulate(1500, 1, 5)
    [overall] = audit(pool).groups["overall"]
    estimate = overall.accuracy["video"]
    low, high = accuracy_interval(pool.right("video")[0], pool.columns["video"].codes)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.006)
    assert np.isnan(estimate.models_low)  # of one model nothing is known of others
    gap = overall.gaps["video - text"]
    assert gap.value == pytest.approx(estimate.value - overall.accuracy["text"].value)


def tiny(states, **columns):
    """A pool of one condition from rows of models."""
    states = np.array([states], dtype=np.uint8)
    num = states.shape[-1]
    nothing = Labels(np.zeros(num, np.int32), ("",))
    names = ("benchmark", "video", "class", "family", "needs", "duration", "source")
    given = {name: Labels.of(columns[name]) if name in columns else nothing for name in names}
    unknown = np.full(num, -1, np.int16)
    return Pool(
        tuple(f"m{n}" for n in range(states.shape[1])),
        ("video",),
        np.array([f"q{n}" for n in range(num)], dtype=object),
        given,
        np.zeros(num, np.int16),
        unknown,
        np.full(num, np.nan, np.float32),
        states,
        np.full(states.shape, -1, np.int8),
    )


def test_discrimination():
    pool = tiny([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 0, 1, 1, 0], [1, 1, 0, 0, 1]])
    assert entropy(pool).tolist() == pytest.approx([0, 1, 0.8113, 0.8113, 1], abs=1e-4)
    right = pool.right("video").astype(float)
    found = point_biserial(pool)
    for row in range(1, 5):
        rest = right.sum(axis=1) - right[:, row]
        assert found[row] == pytest.approx(np.corrcoef(right[:, row], rest)[0, 1], abs=1e-6)
    assert np.isnan(found[0])
    pool = dataclasses.replace(
        pool, chosen=np.array([[[0] * 5, [1] * 5, [0] * 5, [-1] * 5]], np.int8)
    )
    assert option_entropy(pool) == pytest.approx([0.9183] * 5, abs=1e-4)


def test_models_that_ran_on_some_benchmarks():
    """A score of a benchmark is of those that ran; what reaches over both is of who ran on both."""
    states = [[1, 1, 1, 0], [1, 0, 3, 3], [0, 0, 1, 1]]
    pool = tiny(states, benchmark=["x", "x", "y", "y"])
    assert pool.ran[0].tolist() == [[True, True], [True, False], [True, True]]
    scores = pool.accuracies("video", pool.columns["benchmark"])
    np.testing.assert_array_equal(scores, [[1, 0.5], [0.5, np.nan], [0, 1]])
    found = audit(pool)
    [x, y] = found.groups["benchmark"]
    assert (x.accuracy["video"].value, y.accuracy["video"].value) == (0.5, 0.75)
    right, ran = pool.counts("video")
    assert right.tolist() == [2, 1, 2, 1] and ran.tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    "states",
    [[[1]], [[0]], [[1, 1], [1, 1]], [[0, 0], [0, 0], [0, 0]], [[3, 1], [1, 3]], [[2, 2], [2, 2]]],
)
def test_small_and_constant_pools(states):
    with np.errstate(all="raise"):
        found = audit(tiny(states))
    [overall] = found.groups["overall"]
    assert 0 <= overall.accuracy["video"].low <= overall.accuracy["video"].high <= 1


def test_biases():
    pool = simulate(2000, 6, 7)
    found = audit(pool)
    assert found.positions["p"] > 0.001 and sum(found.positions["right"]) == pytest.approx(1)
    skewed = dataclasses.replace(pool, answer=np.where(pool.answer == 3, 0, pool.answer))
    assert audit(skewed).positions["p"] < 1e-6
    questions = [
        Question(name, Path("v"), "?", ("a", "bb", "c", "d"), 1, benchmark="world")
        for name in pool.question_ids[:50]
    ]
    bias = length_bias(pool, questions)
    assert bias["longest"].value == 1 and bias["shortest"].value == 0
    assert bias["chance"].value == 0.25 and bias["longest"].low < 1


def test_the_curve_rises():
    curve = audit(simulate(2000, 12, 8)).curve
    assert [point.size for point in curve] == [10, 20, 50, 100, 200, 400, 800]
    assert curve[0].kendall[0] < curve[2].kendall[0] < curve[-1].kendall[0]
    assert all(low <= mean <= high for point in curve for mean, low, high in [point.r2])


def test_redundant_groups_stand_together():
    rng = np.random.default_rng(0)
    ability = rng.normal(size=(12, 2))
    scores = np.stack([ability[:, n % 2] + 0.1 * rng.normal(size=12) for n in range(6)], axis=1)
    scores[0, 3] = np.nan  # one model has no score there
    found = redundancy([f"g{n}" for n in range(6)], scores)
    assert {n % 2 for n in found.order[:3]} in ({0}, {1})
    assert found.num_models[3, 1] == 11 and found.num_models[0, 1] == 12
    pairs = {(pair["a"], pair["b"]): pair for pair in found.pairs()}
    assert pairs["g0", "g2"]["r2_low"] > 0.8 and pairs["g0", "g1"]["r2_low"] < 0.3
    assert redundancy(["a"], scores[:, :1]).order == [0]


def test_states_are_disjoint():
    assert len({RIGHT, WRONG, NOT_ASKED}) == 3
