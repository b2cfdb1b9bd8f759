"""Studies: their points, the ledger that survives anything, workers that never share a point."""

import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lab_fakes
import numpy as np
import pytest

from apollo import cli
from apollo.lab.findings import FINDINGS, findings_text, write_findings
from apollo.lab.ledger import Ledger, claimed
from apollo.lab.report import (
    MATTERS,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    UNDECIDED,
    effects,
    finding_verdicts,
    judge,
    judge_all,
    level_estimates,
    scaling_of,
    seed_spread,
    values_of,
)
from apollo.lab.runner import EXECUTORS, Work, find_study, finished_lines, points_of, work_through
from apollo.lab.scaling import Estimate
from apollo.lab.spec import Asking, Claim, Side, Study
from apollo.lab.studies import SCALES, STUDIES
from apollo.runtime import append_jsonl

ROOT = Path(__file__).parent.parent
FAKES = f"{Path(__file__).parent}/lab_fakes.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}
NUM_POINTS = 18


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "events.log"
    monkeypatch.setenv("LAB_FAKES_LOG", str(path))
    monkeypatch.setitem(ENVIRONMENT, "LAB_FAKES_LOG", str(path))
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    return path


def run(tmp_path, name="quick", executor="here", workers=1) -> int:
    return EXECUTORS[executor](Work(f"{FAKES}:{name}", "micro", tmp_path / "lab", workers))


def lines_of(tmp_path):
    return lab_fakes.ledger_lines(tmp_path / "lab" / "ledgers" / "fake.micro.jsonl")


def stable(lines):
    """What does not depend on when and where a line was written."""
    kept = ("study", "scale", "hash", "levels", "seed", "metrics")
    return sorted(json.dumps({name: line[name] for name in kept}) for line in lines)


# ---- points ----


def test_points_are_all_combinations_the_first_seed_first():
    points = list(lab_fakes.quick().points())
    assert len(points) == NUM_POINTS == len({point.label for point in points})
    assert points[0].label == "a=0 b=x seed=0" and points[3].label == "a=1 b=y seed=0"
    assert [point.seed for point in points] == [0] * 6 + [1] * 6 + [2] * 6
    assert points[3].overrides() == ["a=1", "seconds=0.0", "b=1", "loop.seed=0"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": ()}, "needs seeds"),
        ({"axes": {"a": {}}}, "axes with levels"),
        ({"metric": "text"}, "not in asking: video"),
        ({"size_axis": "llm"}, "no axis 'llm'"),
        (
            {"claims": [Claim(finding=1, says="", more=Side(levels={"a": ["9"]}), less=Side())]},
            r"a claim names a \['9'\]",
        ),
    ],
)
def test_a_wrong_study_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lab_fakes.make(**fields)


def test_every_study_of_the_paper_is_there_at_both_scales():
    numbers = {name: len(STUDIES[name]("micro").axes) for name in STUDIES}
    assert numbers["scaling"] == 3
    for name, make in STUDIES.items():
        for scale in SCALES:
            study = make(scale)
            assert study.name == name and study.scale == scale and study.about
    levels = {name: STUDIES[name]("paper").axes for name in STUDIES}
    assert len(levels["schedules"]["schedule"]) == 17
    assert len(levels["composition"]["mixture"]) == 13
    assert math.prod(map(len, levels["scaling"].values())) == 84
    assert math.prod(map(len, levels["tokens"].values())) == 28
    claimed_findings = {
        claim.finding for make in STUDIES.values() for claim in make("micro").claims
    }
    assert claimed_findings | {1} == FINDINGS.keys() | {0}  # 0: none of the ten


def test_the_papers_differences_are_those_of_its_tables():
    found = {
        (study, effect.claim.says): effect.paper
        for study in ("resamplers", "encoders", "schedules", "composition", "integration")
        for effect in effects(STUDIES[study]("micro"), [])
    }
    expected = {  # from Tables 1, 9, 12, 13 and 2, by hand
        "The Perceiver beats two MLP layers and average pooling.": 55.5 - 53.2,
        "InternVideo2 beside SigLIP beats SigLIP.": 57.9 - 52.7,
        "Three stages beat two (rows 13 and 7).": 59.2 - 57.8,
        "15 % text, more video than images beats no text (rows 2 and 13).": 59.0 - 47.5,
        "Something between the clips beats nothing.": (56.7 + 56.8 + 56.2) / 3 - 55.5,
    }
    by_text = {says: paper for (_, says), paper in found.items()}
    for says, difference in expected.items():
        assert by_text[says] == pytest.approx(difference), says
    sampling = effects(STUDIES["sampling"]("micro"), [])
    assert sampling[0].paper == pytest.approx(55.6 - (44.2 + 48.1 + 51.9 + 55.1) / 4)
    tokens = [effects(STUDIES["tokens"](scale), []) for scale in SCALES]
    assert tokens[0][0].paper == pytest.approx(tokens[1][0].paper)
    assert all(effect.verdict == NOT_RUN for effect in sampling)


# ---- ledger and claims ----


def test_every_point_is_run_once_and_its_folder_removed(tmp_path, log, capsys):
    assert run(tmp_path) == 0 and run(tmp_path) == 0
    counts = Counter(lab_fakes.events(log))
    assert len(counts) == 2 * NUM_POINTS and set(counts.values()) == {1}
    lines = lines_of(tmp_path)
    assert len(lines) == NUM_POINTS and lines[0]["metrics"] == {"video": 50.0}
    assert lines[0]["environment"]["numpy"] and not any((tmp_path / "lab" / "points").iterdir())
    assert capsys.readouterr().out.count("a=1 b=x seed=2: video 62.0") == 1


def test_what_two_studies_have_in_common_is_run_once(tmp_path, log, capsys):
    run(tmp_path)
    before = len(lab_fakes.events(log))
    assert run(tmp_path, "other") == 0 and run(tmp_path, "other") == 0
    assert len(lab_fakes.events(log)) == before + 2 * 3  # three seeds of the new level
    lines = lab_fakes.ledger_lines(tmp_path / "lab" / "ledgers" / "other.micro.jsonl")
    same = [line for line in lines if line["levels"] == {"c": "same"}]
    assert [line["metrics"]["video"] for line in same] == [60.0, 61.0, 62.0]
    assert {line["study"] for line in lines} == {"other"} and len(lines) == 6
    assert "other: c=same seed=0: as in fake" in capsys.readouterr().out


def test_two_points_that_are_the_same_are_named():
    study = lab_fakes.make(axes={"a": {"one": {"a": 1}, "uno": {"a": 1}}})
    with pytest.raises(ValueError, match="a=one seed=0 and a=uno seed=0 are the same training"):
        points_of(study, lab_fakes)


def test_a_torn_line_is_cut_off_and_its_point_run_again(tmp_path, log):
    run(tmp_path)
    path = tmp_path / "lab" / "ledgers" / "fake.micro.jsonl"
    whole = path.read_bytes()
    for cut in (1, 40):
        path.write_bytes(whole[:-cut])
        assert len(Ledger(path.parent, "fake", "micro").read()) == NUM_POINTS - 1
        assert run(tmp_path) == 0
        assert stable(lines_of(tmp_path)) == stable(map(json.loads, whole.splitlines()))


def test_a_line_that_is_none_is_named(tmp_path):
    path = tmp_path / "fake.micro.jsonl"
    for text, message in (('{"study": "fake"}', "1 has no scale, hash"), ("{]", "1 is no line")):
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match=message):
            Ledger(tmp_path, "fake", "micro").read()


def test_a_claim_is_its_process(tmp_path):
    """A file left behind claims nothing; one whose process lives does, until it is killed."""
    (tmp_path / "p.lock").write_text("process 1 on elsewhere\n")
    with claimed(tmp_path, "p") as is_mine:
        assert is_mine and str(os.getpid()) in (tmp_path / "p.lock").read_text()
    code = (
        "import sys, time; from apollo.lab.ledger import claimed\n"
        f"with claimed({str(tmp_path)!r}, 'p') as is_mine:\n"
        "    print(is_mine, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert other.stdout.readline() == b"True\n"
    with claimed(tmp_path, "p") as is_mine, claimed(tmp_path, "q") as other_is_mine:
        assert not is_mine and other_is_mine
    other.kill()
    other.wait()
    with claimed(tmp_path, "p") as is_mine:
        assert is_mine


def test_a_claimed_point_is_left_alone(tmp_path, log):
    identity = lab_fakes.identity(lab_fakes.quick(), next(lab_fakes.quick().points()))
    code = (
        "import sys; from apollo.lab.ledger import claimed\n"
        f"with claimed({str(tmp_path / 'lab' / 'claims')!r}, {identity!r}) as is_mine:\n"
        "    print(is_mine, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, **pipes)
    assert other.stdout.readline() == b"True\n"
    assert run(tmp_path) == 0 and len(lines_of(tmp_path)) == NUM_POINTS - 1
    other.communicate()
    assert run(tmp_path) == 0 and len(lines_of(tmp_path)) == NUM_POINTS


def test_a_point_that_fails_does_not_stop_the_others(tmp_path, log, capsys):
    assert run(tmp_path, "failing") == 6
    assert len(lines_of(tmp_path)) == NUM_POINTS - 6
    assert "a=1 b=x seed=0: failed: as it was told to" in capsys.readouterr().err
    (error,) = {path.read_text() for path in (tmp_path / "lab" / "points").glob("*/error.txt")}
    assert "ValueError: as it was told to" in error
    Path(f"{log}.mended").touch()
    assert run(tmp_path, "failing") == 0 and len(lines_of(tmp_path)) == NUM_POINTS


def worker(tmp_path, name="slow"):
    out = str(tmp_path / "lab")
    command = ["-m", "apollo", "study", "run", f"{FAKES}:{name}", "--out", out]
    return subprocess.Popen(
        [sys.executable, *command], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL
    )


def test_killed_at_any_moment_no_point_is_lost_or_repeated(tmp_path, log):
    chance = random.Random(0)
    for _ in range(3):
        process = worker(tmp_path)
        seen = len(lab_fakes.events(log))
        deadline = time.monotonic() + 60
        while len(lab_fakes.events(log)) < seen + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = Ledger(tmp_path / "lab" / "ledgers", "fake", "micro").read()
    before = Counter(lab_fakes.events(log))
    assert 0 < len(finished) < NUM_POINTS
    assert run(tmp_path, "slow") == 0
    assert len({line["hash"] for line in lines_of(tmp_path)}) == len(lines_of(tmp_path)) == 18
    again = Counter(lab_fakes.events(log)) - before
    for line in finished:  # what was in the ledger was never started again
        levels = " ".join(f"{axis}={level}" for axis, level in line["levels"].items())
        assert f"start {levels} seed={line['seed']}" not in again


def test_processes_share_the_points(tmp_path, log):
    assert run(tmp_path, "slow", "processes", workers=2) == 0
    counts = Counter(lab_fakes.events(log))
    assert len(counts) == 2 * NUM_POINTS and set(counts.values()) == {1}
    assert run(tmp_path / "alone", "slow") == 0
    assert stable(lines_of(tmp_path)) == stable(lines_of(tmp_path / "alone"))


@pytest.mark.slow
def test_ray_gives_the_same_ledger(tmp_path, log):
    pytest.importorskip("ray")
    assert run(tmp_path, "slow", "ray", workers=2) == 0
    counts = Counter(lab_fakes.events(log))
    assert len(counts) == 2 * NUM_POINTS and set(counts.values()) == {1}
    assert run(tmp_path / "alone", "slow") == 0
    assert stable(lines_of(tmp_path)) == stable(lines_of(tmp_path / "alone"))


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"apollo-lmm\[ray\]"):
        run(tmp_path, executor="ray")


def test_slurm_gets_a_script_that_starts_workers(tmp_path, capsys):
    assert run(tmp_path, executor="slurm", workers=4) == 0
    (path,) = (tmp_path / "lab").glob("*.slurm")
    script = path.read_text()
    assert "#SBATCH --array=0-3" in script and str(path) in capsys.readouterr().out
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    command = shlex.split(script.rsplit("exec ", 1)[1])
    args = cli.build_parser().parse_args(command[command.index("apollo") + 1 :])
    assert args.handler == "apollo.lab.commands:run_main" and args.executor == "here"


# ---- the command line ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["run", "nothing"], "no study 'nothing'; there are: scaling"),
        (["run", "no.py:mine"], "there is no Python file no.py"),
        (["run", f"{FAKES}:events_of"], "must be a function that returns a Study"),
        (["run", "resamplers", "--workers", "2"], "take processes, ray or slurm"),
        (["report", "--ledgers", "nowhere"], "no ledger of a study is in nowhere"),
        (["plan", f"{FAKES}:quick", "--calibrate"], "run one seed instead"),
    ],
)
def test_mistakes_end_in_one_line(line, message, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert cli.main(["study", *line]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_list_names_all(capsys, tmp_path):
    assert cli.main(["study", "list", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in STUDIES)


def test_plan_knows_what_the_ledger_knows(tmp_path, log, capsys):
    def plan():
        command = ["study", "plan", f"{FAKES}:quick", "--out", str(tmp_path / "lab"), "--json"]
        assert cli.main(command) == 0
        return json.loads(capsys.readouterr().out)

    assert plan()["unknown"] == NUM_POINTS
    run(tmp_path)
    path = tmp_path / "lab" / "ledgers" / "fake.micro.jsonl"
    kept = [line for line in lines_of(tmp_path) if line["seed"] < 2 and line["levels"]["a"] != "2"]
    for line in kept:
        line["seconds"] = 100.0 * (1 + int(line["levels"]["a"])) + line["seed"]
    kept[0]["timing"] = {"features_s": 40.0}  # a=0 b=x seed=0 made what the others find
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    capsys.readouterr()
    found = plan()
    by_label = {one["point"]: (one["seconds"], one["how"]) for one in found["points"]}
    assert by_label["a=0 b=x seed=1"] == (101.0, "finished")
    assert by_label["a=1 b=y seed=2"] == (200.5, "as its other seeds took")
    assert by_label["a=0 b=x seed=2"] == (80.5, "as its other seeds took")
    assert by_label["a=2 b=x seed=0"][0] == 145.5
    assert found["hours_left"] * 3600 == pytest.approx(80.5 + 100.5 + 2 * 200.5 + 6 * 145.5)


# ---- the report ----


def planted(study: Study, effect, noise=1.0, seed=0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "study": study.name,
            "scale": study.scale,
            "hash": point.label,
            "levels": dict(point.levels),
            "seed": point.seed,
            "seconds": 60.0,
            "metrics": {
                name: 50 + effect(point.levels, name) + noise * rng.standard_normal()
                for name in study.asking
            },
            "environment": {"cpu": "a CPU", "torch": "2"},
        }
        for point in study.points()
    ]


RESAMPLERS = STUDIES["resamplers"]("micro")
GAIN = {"perceiver": 8.0, "mlp_pool": 0.0, "conv_pool": -4.0}


def test_planted_effects_are_recovered():
    lines = planted(RESAMPLERS, lambda levels, _: GAIN[levels["resampler"]], noise=0.5)
    found = effects(RESAMPLERS, lines)
    for effect, truth in zip(found, (8.0, 12.0), strict=True):
        assert effect.estimate.low < truth < effect.estimate.high
        assert effect.verdict == REPRODUCED and effect.num_runs == 6
    flipped = planted(RESAMPLERS, lambda levels, _: -GAIN[levels["resampler"]], noise=0.5)
    assert {one.verdict for one in effects(RESAMPLERS, flipped)} == {NOT_REPRODUCED}
    assert {one.verdict for one in effects(RESAMPLERS, planted(RESAMPLERS, lambda *_: 0, 5))} == {
        UNDECIDED
    }


def test_effects_of_two_ways_to_ask_are_paired():
    study = STUDIES["sampling"]("micro")
    lines = planted(study, lambda *_: 0, noise=20.0)
    for line in lines:  # the models differ wildly, what asking does to each does not
        line["metrics"]["2 fps"] = line["metrics"]["as trained"] + 3 + 0.1 * line["seed"]
    effect = effects(study, lines)[1]
    assert effect.estimate.value == pytest.approx(3.1) and effect.estimate.low > 2.8
    assert effect.verdict == REPRODUCED


def test_one_seed_decides_nothing():
    study = replace(RESAMPLERS, seeds=(0,))
    lines = planted(study, lambda levels, _: GAIN[levels["resampler"]])
    assert {one.verdict for one in effects(study, lines)} == {UNDECIDED}
    assert math.isnan(effects(study, lines)[0].estimate.low)


@pytest.mark.parametrize(
    ("low", "high", "more", "same"),
    [
        (0.1, 1.0, REPRODUCED, REPRODUCED),
        (-1.0, 1.0, NOT_REPRODUCED, REPRODUCED),
        (-1.0, 3.0, UNDECIDED, UNDECIDED),
        (-9.0, -3.0, NOT_REPRODUCED, NOT_REPRODUCED),
        (3.0, 9.0, REPRODUCED, NOT_REPRODUCED),
        (math.nan, math.nan, UNDECIDED, UNDECIDED),
    ],
)
def test_the_rule(low, high, more, same):
    assert MATTERS == 2
    estimate = Estimate((low + high) / 2, low, high)
    assert (judge(estimate, False), judge(estimate, True)) == (more, same)


def test_a_finding_is_as_good_as_its_weakest_claim():
    assert judge_all([REPRODUCED, NOT_RUN]) == REPRODUCED
    assert judge_all([REPRODUCED, UNDECIDED]) == UNDECIDED
    assert judge_all([UNDECIDED, NOT_REPRODUCED, REPRODUCED]) == NOT_REPRODUCED
    assert judge_all([NOT_RUN]) == NOT_RUN == judge_all([])


def test_intervals_over_seeds_hold_the_truth():
    held, total = 0, 400
    for seed in range(total):
        lines = planted(RESAMPLERS, lambda levels, _: GAIN[levels["resampler"]], 2.0, seed)
        estimate = effects(RESAMPLERS, lines)[0].estimate
        held += estimate.low <= 8.0 <= estimate.high
    assert 0.92 <= held / total <= 0.98


def test_lines_of_levels_that_are_no_more_do_not_count():
    lines = planted(RESAMPLERS, lambda levels, _: GAIN[levels["resampler"]])
    strange = [{**lines[0], "levels": {"resampler": "gone"}}, {**lines[0], "seed": 9}]
    assert values_of(RESAMPLERS, lines + strange, "video") == values_of(RESAMPLERS, lines, "video")
    assert len(level_estimates(values_of(RESAMPLERS, lines, "video"))) == 3


def test_a_study_of_sizes_is_read_as_consistency():
    study = STUDIES["scaling"]("micro")
    step = {f"llm-{size}": 5.0 * i for i, size in enumerate(("0.3m", "1m", "4m", "9m"))}
    quality = {"A": -6, "B": 0, "C": 3, **{name: i for i, name in enumerate("abcdefg")}}

    def effect(levels, _):
        return quality[levels["data"]] + quality[levels["design"]] + step[levels["llm"]]

    scaling = scaling_of(study, planted(study, effect, noise=0.05))
    assert scaling.table.sizes == [3e5, 1e6, 4e6, 9e6] and len(scaling.table.variants) == 21
    assert min(pair.r2.value for pair in scaling.found.pairs) > 0.99
    assert scaling.verdict == REPRODUCED
    assert scaling.paper_found.pairs[0].r2.value == pytest.approx(0.938, abs=1e-3)
    assert scaling_of(study, planted(study, effect)[:10]) is None
    noisy = planted(study, lambda *_: 0, noise=5)
    assert scaling_of(study, noisy).verdict == NOT_REPRODUCED
    assert scaling_of(study, noisy, noise=4.0).verdict == UNDECIDED  # noise alone may do that
    assert scaling_of(study, noisy, noise=0.1).verdict == NOT_REPRODUCED
    seeds = planted(RESAMPLERS, lambda levels, _: GAIN[levels["resampler"]], noise=1.5)
    spread = seed_spread([study, RESAMPLERS], {"scaling": noisy, "resamplers": seeds})
    assert 0.5 < spread < 3  # of seeds, and not of what differs otherwise
    assert seed_spread([study], {"scaling": noisy}) is None


def test_the_same_ledgers_give_the_same_page(tmp_path):
    studies = [make("micro") for make in STUDIES.values()]
    few = [study for study in studies if study.name in ("resamplers", "scaling", "integration")]
    size = {f"llm-{size}": i for i, size in enumerate(("0.3m", "1m", "4m", "9m"))}
    ledgers = {
        study.name: planted(study, lambda levels, _: size.get(levels.get("llm"), 0))
        for study in few
    }
    for run_ in ("a", "b"):
        write_findings(tmp_path / run_ / "findings.md", studies, ledgers)
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 5, files  # the page, and four figures
    for path in files:
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes(), path.name
    text = files[0].read_text() if files[0].suffix == ".md" else files[-1].read_text()
    for number, says in FINDINGS.items():
        assert f"| {number} | {says} |" in text
    assert "| 8 | Unfreezing the parts one stage after another is best. | **not run** |" in text
    assert "| perceiver | 55.5 |" in text and text.count("Not run yet.") == 8
    for link in ("figures/resamplers.png", "figures/scaling-paper.png"):
        assert link in text and (tmp_path / "a" / link).is_file()


def test_the_page_is_that_of_the_ledgers_beside_it():
    """docs/findings.md is never typed; its figures are as old as it."""
    docs = Path(__file__).parent.parent / "docs"
    studies = [make("micro") for make in STUDIES.values()]
    ledgers = {study.name: finished_lines(study, docs / "ledgers") for study in studies}
    figures = {}
    assert findings_text(studies, ledgers, figures) == (docs / "findings.md").read_text()
    assert set(figures) == {path.name for path in (docs / "figures").iterdir()}


def test_findings_are_judged_over_studies():
    studies = [STUDIES["schedules"]("micro"), STUDIES["encoder-data"]("micro")]
    good = {"13": 20, "7": 10, "5": 5, "1": 0, "3": -10, "16": -10, "videos": 10, "mixture": 0}

    def effect(levels, _):
        return good.get(next(iter(levels.values())), 0)

    ledgers = {study.name: planted(study, effect, noise=0.5) for study in studies}
    assert finding_verdicts(studies, ledgers) == {8: REPRODUCED, 9: REPRODUCED}
    good["mixture"] = 20
    ledgers["encoder-data"] = planted(studies[1], effect, noise=0.5)
    assert finding_verdicts(studies, ledgers) == {8: REPRODUCED, 9: NOT_REPRODUCED}


def test_lines_of_other_settings_do_not_count(tmp_path, log, capsys):
    run(tmp_path)
    ledger = tmp_path / "lab" / "ledgers" / "fake.micro.jsonl"
    line = json.loads(ledger.read_text().splitlines()[0])
    append_jsonl(ledger, {**line, "hash": "0" * 64, "metrics": {"video": 0.0}})
    study = find_study(f"{FAKES}:quick", "micro")
    assert finished_lines(study, ledger.parent) == lines_of(tmp_path)[:-1]
    assert f"1 of {NUM_POINTS + 1} lines do not count" in capsys.readouterr().err


def test_report_of_one_study_is_printed(tmp_path, log, capsys):
    run(tmp_path)
    ledgers = str(tmp_path / "lab" / "ledgers")
    assert cli.main(["study", "report", f"{FAKES}:quick", "--ledgers", ledgers]) == 0
    printed = capsys.readouterr().out
    assert "| 2 | y |" in printed and "71.0" in printed
    assert findings_text([lab_fakes.make(asking={"video": Asking()})], {}, {})


def test_find_study():
    assert find_study("tokens", "paper").scale == "paper"
    assert work_through.__doc__
