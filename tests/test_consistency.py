"""Do small models choose as large ones: the paper's numbers, planted truths, honest intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from apollo import cli
from apollo.lab import scaling
from apollo.lab.scaling import (
    analyse,
    by_fisher,
    by_percentiles,
    kendall,
    pearson,
    spearman,
    within,
)
from apollo.lab.tables import Columns, ScoreTable, make_table, parse_size, read_table

PAPER = Path(__file__).parent.parent / "apollo" / "lab" / "paper" / "scaling_consistency.csv"


def made_table(scores: np.ndarray, factors: dict[str, list[str]] | None = None) -> ScoreTable:
    num_variants, num_sizes = scores.shape
    sizes = [float(2**size) for size in range(num_sizes)]
    names = [f"v{number}" for number in range(num_variants)]
    return ScoreTable(names, sizes, [f"{s:g}B" for s in sizes], scores, ("name",), factors or {})


def two_sizes(rng, num_variants: int, correlation: float) -> np.ndarray:
    first, second = rng.standard_normal((2, num_variants))
    return np.stack([first, correlation * first + math.sqrt(1 - correlation**2) * second], axis=1)


# ---- the paper ----


@pytest.fixture(scope="module")
def paper():
    return analyse(read_table(PAPER), targets=[32.0, 72.0])


def test_r2_of_the_papers_84_rows(paper):
    table = read_table(PAPER)
    r2 = {(table.size_names[p.small], table.size_names[p.large]): p.r2.value for p in paper.pairs}
    expected = {
        ("4B", "7B"): 0.938,
        ("1.5B", "7B"): 0.831,
        ("0.5B", "7B"): 0.694,
        ("1.5B", "4B"): 0.902,
        ("0.5B", "4B"): 0.772,
        ("0.5B", "1.5B"): 0.736,
    }
    assert r2 == pytest.approx(expected, abs=1e-3)


def test_what_the_papers_r2_rests_on(paper):
    factor, out = paper.factors[0], paper.left_out[0]
    assert factor.name == "data_mixture"  # found, not told
    assert [r2.value for r2 in factor.r2_within] == pytest.approx([0.517, 0.686, 0.900], abs=1e-3)
    assert (out.name, out.num_variants) == ("config g", 3)
    assert out.r2_within == pytest.approx([0.037, 0.021, 0.455], abs=1e-3)
    assert paper.line.slope.value == pytest.approx(0.12, abs=0.005)  # Fig. 3, left
    assert paper.line.intercept.value == pytest.approx(0.78, abs=0.005)
    assert paper.reliable == 2 and paper.surely_reliable is None


def test_the_command_prints_and_writes_them(tmp_path, capsys):
    assert cli.main(["consistency", str(PAPER), "--to", "32B", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    pages = [(tmp_path / f"consistency.{kind}").read_text() for kind in ("md", "html")]
    for text in (printed, *pages):
        assert "0.938, 0.831 and 0.694" in text
        assert "0.900, 0.686 and 0.517" in text
        assert "Without config g (3 variants)" in text and "0.455, 0.021 and 0.037" in text
        assert "0.902" in text and "0.772" in text and "0.736" in text
    assert pages[1].count("<img ") == 2 and "&lt;img" not in pages[1]
    found = json.loads((tmp_path / "consistency.json").read_text())
    assert len(found["pairs"]) == 6 and len(found["left_out"]) == 28
    assert found["line"]["beyond"].keys() == {"32.0"}
    for figure in ("points.png", "sizes.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_the_same_table_gives_the_same_files(tmp_path, capsys):
    for run in ("a", "b"):
        cli.main(["consistency", str(PAPER), "--out", str(tmp_path / run)])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


# ---- statistics as functions of weights ----


def plain_tau(x, y):
    order_x, order_y = np.sign(np.subtract.outer(x, x)), np.sign(np.subtract.outer(y, y))
    return (order_x * order_y).sum() / math.sqrt((order_x**2).sum() * (order_y**2).sum())


def plain_ranks(x):
    return np.array([(x < one).sum() + ((x == one).sum() + 1) / 2 for one in x])


def test_weights_count_variants_as_often_as_drawn():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 12)).astype(float)  # with ties
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=20)
    levels = np.arange(12) % 3
    for row in counts:
        drawn, weights = np.repeat(np.arange(12), row), row[None].astype(float)
        a, b = x[drawn], y[drawn]
        assert pearson(x, y, weights)[0] == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert spearman(x, y, weights)[0] == pytest.approx(
            np.corrcoef(plain_ranks(a), plain_ranks(b))[0, 1]
        )
        assert kendall(x, y, weights)[0] == pytest.approx(plain_tau(a, b))
        means = [a[levels[drawn] == level].mean() for level in levels[drawn]]
        assert within(x, levels, weights)[0, drawn] == pytest.approx(a - means)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (30, 2.042)]
)
def test_t_quantile(degrees, quantile):
    assert scaling.t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_regret_and_overlap_by_hand():
    small, large = [5.0, 4, 3, 2, 1, 0], [1.0, 9, 8, 3, 2, 0]
    pair = analyse(made_table(np.array([small, large]).T)).pairs[0]
    assert (pair.chosen, pair.best, pair.regret.value) == ("v0", "v1", 8.0)
    assert pair.overlap == {1: 0, 3: 2, 5: 5}
    assert 0 <= pair.regret.low <= pair.regret.high <= 9


def test_equal_orders_agree_fully():
    scores = np.array([[1.0, 2, 3, 5, 8, 13]] * 2).T
    pair = analyse(made_table(scores)).pairs[0]
    for one in (pair.r2, pair.pearson, pair.spearman, pair.kendall):
        assert one.value == pytest.approx(1) and one.low > 0.99
    assert pair.regret.value == pair.regret.high == 0


# ---- planted truths ----


def test_a_known_correlation_is_recovered():
    rng = np.random.default_rng(3)
    pair = analyse(made_table(two_sizes(rng, 600, 0.8))).pairs[0]
    assert pair.pearson.value == pytest.approx(0.8, abs=0.05)
    assert pair.r2.value == pytest.approx(0.64, abs=0.08)
    assert pair.spearman.value == pytest.approx(6 / math.pi * math.asin(0.4), abs=0.06)
    assert pair.kendall.value == pytest.approx(2 / math.pi * math.asin(0.8), abs=0.05)


def test_a_negative_correlation_is_told(capsys, tmp_path):
    path = tmp_path / "table.csv"
    lines = [f"v{i},{i},{-i + (i % 3) / 10}" for i in range(9)]
    path.write_text("variant,1B,7B\n" + "\n".join(lines))
    assert cli.main(["consistency", str(path)]) == 0
    assert "Beware: the correlation of 1B with 7B is negative" in capsys.readouterr().out


def test_a_planted_factor_carries_the_agreement():
    rng = np.random.default_rng(1)
    levels = np.arange(24) % 3
    noise = rng.standard_normal((24, 3))  # the sizes agree about nothing but the levels
    factors = {
        "data": [f"d{level}" for level in levels],
        "colour": [f"c{number % 2}" for number in range(24)],
    }
    found = analyse(made_table(5.0 * levels[:, None] + noise, factors))
    assert min(pair.r2.value for pair in found.to_largest()) > 0.85
    assert found.factors[0].name == "data" and min(found.factors[0].explained) > 0.85
    assert max(r2.value for r2 in found.factors[0].r2_within) < 0.35
    assert min(r2.value for r2 in found.factors[1].r2_within) > 0.8


def test_a_planted_outlier_carries_the_agreement():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((16, 3))
    scores[5] -= 12
    found = analyse(made_table(scores))
    assert min(pair.r2.value for pair in found.to_largest()) > 0.85
    assert found.left_out[0].name == "v5"
    assert max(found.left_out[0].r2) < 0.35


def test_noise_leaves_of_a_full_agreement_what_is_said():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(15):
        truth = rng.standard_normal((200, 1))
        scores = truth * (1.0, 2.0, 3.0) + rng.standard_normal((200, 3))
        one = analyse(made_table(scores), noise=1.0)
        found.append(([pair.r2.value for pair in one.to_largest()], one.ceilings))
    measured, ceilings = np.mean(found, axis=0)
    assert ceilings == pytest.approx([0.5 * 0.9, 0.8 * 0.9], abs=0.03)
    assert measured == pytest.approx(ceilings, abs=0.03)
    assert analyse(made_table(scores)).ceilings == []
    assert analyse(made_table(scores), noise=99.0).ceilings == [0.0, 0.0]


def test_the_command_says_what_noise_leaves(capsys):
    assert cli.main(["consistency", str(PAPER), "--noise", "1.2"]) == 0
    said = "Were they to agree fully, the noise of the scores would leave 0."
    assert said in capsys.readouterr().out
    for wrong in ("-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit):
            cli.main(["consistency", str(PAPER), "--noise", wrong])
        assert f"must be a number from 0, not '{wrong}'" in capsys.readouterr().err


def test_the_smallest_reliable_size_needs_all_above_it():
    assert scaling._smallest([0.95, 0.80, 0.97]) == 2
    assert scaling._smallest([0.80, 0.95, 0.97]) == 1
    assert scaling._smallest([0.99, 0.80]) is None
    assert scaling._smallest([math.nan, 0.95]) == 1


def test_a_planted_line_is_recovered():
    """Noise that falls with size so that R2 to the largest is known at each."""
    rng = np.random.default_rng(4)
    truth, wanted = rng.standard_normal(400), [0.5, 0.7, 0.9]
    columns = [
        math.sqrt(r2) * truth + math.sqrt(1 - r2) * rng.standard_normal(400) for r2 in wanted
    ]
    table = made_table(np.stack([*columns, truth], axis=1))
    line = analyse(table).line
    assert line.slope.value == pytest.approx(0.2 / math.log(2), abs=0.06)
    assert line.reaches.value == pytest.approx(4.0, rel=0.25)
    assert line.slope.low < 0.2 / math.log(2) < line.slope.high


# ---- intervals ----


def coverage(num_tables: int, num_variants: int, correlation: float, num_levels: int = 1):
    """Share of tables whose interval holds the truth, for each correlation."""
    truths = {
        "pearson": correlation,
        "r2": correlation**2,
        "spearman": 6 / math.pi * math.asin(correlation / 2),
        "kendall": 2 / math.pi * math.asin(correlation),
    }
    held = dict.fromkeys([*truths, "within"], 0)
    for seed in range(num_tables):
        rng = np.random.default_rng([num_variants, seed])
        x, y = two_sizes(rng, num_variants, correlation).T
        shares = np.full(num_variants, 1 / num_variants)
        resampled = rng.multinomial(num_variants, shares, size=500)
        weights = np.vstack([np.ones(num_variants), resampled])
        levels = np.arange(num_variants) % num_levels
        shifts = 5 * rng.standard_normal(num_levels)[levels]
        estimates = {
            "pearson": by_fisher(pearson(x, y, weights), num_variants - 2),
            "spearman": by_percentiles(spearman(x, y, weights)),
            "kendall": by_percentiles(kendall(x, y, weights)),
            "within": by_fisher(
                pearson(within(x + shifts, levels, weights), within(y, levels, weights), weights),
                num_variants - num_levels - 1,
            ),
        }
        estimates["r2"] = estimates["pearson"].squared()
        for name, one in estimates.items():
            held[name] += one.low <= truths.get(name, correlation) <= one.high
    return {name: count / num_tables for name, count in held.items()}


def test_intervals_hold_the_truth_as_often_as_they_say():
    for name, share in coverage(60, 21, 0.8, num_levels=3).items():
        assert share >= 0.86, name  # 95 % of 60 tables, less three standard errors


@pytest.mark.slow
@pytest.mark.parametrize(("num_variants", "num_levels"), [(21, 3), (40, 4)])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_intervals_hold_the_truth_closely(num_variants, num_levels, correlation):
    held = coverage(1000, num_variants, correlation, num_levels)
    for name in ("pearson", "within") if correlation == 0 else ("pearson", "r2", "within"):
        assert 0.92 <= held[name] <= 0.98, (name, held)
    for name in ("spearman", "kendall"):  # of few variants they are somewhat too wide
        assert 0.92 <= held[name] <= 0.995, (name, held)


# ---- tables ----


def long_rows(seeds=(None,), sizes=("Qwen2-0.5B", "Qwen2-7B")):
    return [
        {
            "llm": size,
            "mix": mix,
            "config": config,
            "seconds": str(100 + 7.3 * len(config) + hash((size, mix, config, seed)) % 1000),
            **({} if seed is None else {"seed": seed}),
            "accuracy": 10 * ord(config) + ord(mix) + len(size) + (seed or 0),
        }
        for size in sizes
        for mix in "AB"
        for config in "abc"
        for seed in seeds
    ]


def test_long_table_with_sizes_inside_names():
    table = make_table(long_rows(), Columns())
    assert table.sizes == [0.5e9, 7e9] and table.size_names == ["Qwen2-0.5B", "Qwen2-7B"]
    assert table.key_columns == ("mix", "config") and len(table.variants) == 6
    assert table.factors == {"mix": ["A"] * 3 + ["B"] * 3, "config": list("abcabc")}


def test_seeds_are_averaged_and_told():
    table = make_table(long_rows(seeds=(0, 2)), Columns())
    once = make_table(long_rows(), Columns())
    assert table.scores == pytest.approx(once.scores + 1)
    assert any("means over 2 to 2 seeds" in note for note in table.notes)


def test_wide_table():
    rows = [{"name": f"v{i}", "kind": "xy"[i % 2], "1B": str(i), "300M": i * i} for i in range(5)]
    table = make_table(rows, Columns())
    assert table.sizes == [3e8, 1e9] and table.factors == {"kind": ["x", "y", "x", "y", "x"]}
    assert table.scores[:, 1].tolist() == [0, 1, 2, 3, 4]
    named = [{"name": row["name"], "small": row["300M"], "2": row["1B"]} for row in rows]
    with pytest.raises(ValueError, match="'small' is no size"):
        make_table(named, Columns(sizes=("small", "2")))


def test_columns_that_are_named_are_taken():
    rows = [{**row, "ocr_score": 1.0, "other_score": 2} for row in long_rows()]
    table = make_table(rows, Columns(score="accuracy", size="llm", variant=("config", "mix")))
    assert table.key_columns == ("config", "mix") and table.variants[0] == "a A"
    for name in ("acuracy", ""):
        columns = Columns(score=name, variant=("mx",) if not name else ())
        with pytest.raises(ValueError, match="there is no column"):
            make_table(rows, columns)


def test_variants_without_a_score_are_left_out_and_named():
    rows = long_rows()
    rows[0]["accuracy"] = ""
    table = make_table(rows, Columns())
    assert len(table.variants) == 5 and any("left out: A a" in note for note in table.notes)


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(long_rows()), path)
    assert read_table(path).variants == make_table(long_rows(), Columns()).variants
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a Parquet file"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("variant,size,score\n", "has no rows"),
        ("variant,size,score\na,1,2,3\n", ":2: another number of cells"),
        ("variant,size,score\na,1,2\na,1,3\nb,1,2\n", "has two scores"),
        ("variant,size,score\na,1,x\nb,2,1\n", "no column seems to hold the scores"),
        ("variant,size,score\na,big,1\nb,small,2\n", "no column seems to hold the sizes"),
        ("size,score\n1,1\n2,2\n", "no column tells variants apart"),
        ("variant,size,score\na,1,1\nb,2,2\nc,1,3\n", "no variant has a score at every size"),
        ("variant,size,score\na,1,1\na,2,2\nb,1,1\nb,2,2\n", "2 variants at 2 sizes"),
        (
            "variant,size,score\n" + "".join(f"{v},{s},{s}\n" for v in "abcde" for s in (1, 2)),
            "all variants score 1 at size 1",
        ),
        ("a,b,c\n\x00", "cells"),
    ],
)
def test_hostile_tables_end_in_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text(text)
    assert cli.main(["consistency", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_not_a_text_file(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert cli.main(["consistency", str(path)]) == 2
    assert cli.main(["consistency", str(tmp_path / "none.csv")]) == 2


def test_extrapolation_speaks_the_tables_unit(capsys):
    table = read_table(PAPER)
    assert parse_size("32", table) == parse_size("32B", table) == 32
    by_name = make_table(long_rows(), Columns())
    assert parse_size("32B", by_name) == 32e9
    with pytest.raises(ValueError, match="write its unit"):
        parse_size("32", by_name)
    assert cli.main(["consistency", str(PAPER), "--to", "3"]) == 2
    assert "not larger than the largest size" in capsys.readouterr().err
