"""The runner's promises: the same file however a run came about, and nothing asked twice."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from apollo.cli import build_parser, main
from apollo.eval.answerers import Answer, OracleAnswerer, RandomAnswerer
from apollo.eval.questions import Question, read_questions
from apollo.eval.run_folder import RunFolder
from apollo.eval.runner import evaluate, questions_hash, units_of
from apollo.eval.scoring import read_predictions
from apollo.video import VideoError

ROOT = Path(__file__).parent.parent
RECORD = {
    "question_id": "q0",
    "video": "videos/v0.mp4",
    "question": "Which shape moves?",
    "options": ["circle", "square", "star", "ring"],
    "answer": 2,
    "class": "perception",
    "family": "motion",
    "needs": "frames",
    "duration_s": 8.0,
}


def write_questions(folder: Path, records: list[dict]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_questions(num: int, per_video: int = 4) -> list[Question]:
    return [
        Question(
            question_id=f"q{i}",
            video=Path(f"v{i // per_video}.mp4"),
            question="Which?",
            options=("a", "b", "c", "d"),
            answer=i % 4,
            question_class=("spatial", "reasoning")[i % 2],
            family=f"family {i % 5}",
            needs=("frames", "frame", "text")[i % 3],
            duration_s=4.0,
        )
        for i in range(num)
    ]


class Watched(RandomAnswerer):
    """A guesser that remembers what it was shown and asked, and fails as it is told to."""

    def __init__(self, stop_at: int | None = None, unreadable: str = "") -> None:
        self.asked: list[tuple[str, str]] = []
        self.shown: list[tuple[str, str]] = []
        self.stop_at, self.unreadable = stop_at, unreadable
        self.error: BaseException = KeyboardInterrupt()

    def watch(self, question, condition):
        if condition == "text":
            return None
        self.shown.append((question.video.name, condition))
        if question.video.name == self.unreadable:
            raise VideoError(f"{question.video}: moov atom not found")
        return question.video

    def answer(self, questions, condition, seen):
        if condition != "text":
            assert {q.video for q in questions} == {seen}
        if self.stop_at is not None and len(self.asked) >= self.stop_at:
            raise self.error
        self.asked += [(q.question_id, condition) for q in questions]
        return [
            replace(a, frame_times_s=[[0.0, 0.5]])
            for a in super().answer(questions, condition, seen)
        ]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def overall(tables, condition="video"):
    return tables["overall"]["all"][condition]


@pytest.fixture
def straight(tmp_path) -> bytes:
    """predictions.jsonl of 40 questions and two conditions, asked in one go."""
    evaluate(Watched(), make_questions(40), ["video", "text"], tmp_path / "straight")
    return (tmp_path / "straight" / "predictions.jsonl").read_bytes()


# ---- the same file


def test_order_of_questions_and_conditions_does_not_matter(tmp_path, straight):
    questions = make_questions(40)
    Random(0).shuffle(questions)
    evaluate(Watched(), questions, ["text", "video"], tmp_path / "out")
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == straight


@pytest.mark.parametrize("stop_at", [0, 1, 15, 16, 40])
def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path, straight, stop_at):
    questions, out = make_questions(40), tmp_path / "out"
    first = Watched(stop_at)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, questions, ["video", "text"], out)
    assert not (out / "predictions.jsonl").exists()
    assert summary_of(out)["finished"] is False
    second = Watched()
    evaluate(second, questions, ["video", "text"], out)
    assert max(Counter(first.asked + second.asked).values()) == 1
    assert len(first.asked + second.asked) == 80
    assert (out / "predictions.jsonl").read_bytes() == straight
    assert {path.name for path in out.iterdir()} == {
        "predictions.jsonl",
        "report.html",
        "summary.json",
    }


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999])
def test_a_line_cut_by_a_kill_is_asked_again(tmp_path, straight, keep):
    questions, out = make_questions(40), tmp_path / "out"
    first = Watched(stop_at=24)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, questions, ["video", "text"], out)
    part = out / "parts" / "0.jsonl"
    *lines, last, _ = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines, last[: int(keep * len(last))]]))
    second = Watched()
    evaluate(second, questions, ["video", "text"], out)
    again = set(first.asked) & set(second.asked)
    assert again == {(json.loads(last)["question_id"], "video")}
    assert (out / "predictions.jsonl").read_bytes() == straight


def test_a_whole_line_without_its_newline_is_not_lost(tmp_path, straight):
    """Whether it counts must not depend on who reads it: it is asked again."""
    questions, out = make_questions(40), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Watched(stop_at=24), questions, ["video", "text"], out)
    part = out / "parts" / "0.jsonl"
    (out / "parts" / "7.jsonl").write_bytes(part.read_bytes()[:-1])
    part.unlink()
    evaluate(Watched(), questions, ["video", "text"], out)
    assert (out / "predictions.jsonl").read_bytes() == straight


def test_limit_can_be_raised_and_lowered(tmp_path, straight):
    questions, out = make_questions(40), tmp_path / "out"
    tables = evaluate(Watched(), questions, ["video", "text"], out, limit=6)
    assert overall(tables).num_questions == 6
    later = Watched()
    evaluate(later, questions, ["video", "text"], out)
    assert len(later.asked) == 2 * 34
    assert (out / "predictions.jsonl").read_bytes() == straight
    idle = Watched()
    assert overall(evaluate(idle, questions, ["video"], out, limit=6)).num_questions == 6
    assert not idle.asked and not idle.shown
    assert (out / "predictions.jsonl").read_bytes() == straight


def test_each_video_is_watched_once_per_condition(tmp_path):
    answerer = Watched()
    conditions = ["video", "frame", "shuffled", "text"]
    evaluate(answerer, make_questions(20), conditions, tmp_path)
    assert len(answerer.shown) == len(set(answerer.shown)) == 5 * 3


def test_predictions_hold_no_paths_and_no_times(tmp_path):
    for name in ("one", "two"):
        questions = [replace(q, video=tmp_path / name / q.video) for q in make_questions(8)]
        evaluate(Watched(unreadable="v1.mp4"), questions, ["video"], tmp_path / f"out_{name}")
    one, two = ((tmp_path / f"out_{n}/predictions.jsonl").read_bytes() for n in ("one", "two"))
    assert one == two and str(tmp_path).encode() not in one


def test_units_of_two_conditions_are_shared_evenly():
    units = units_of(make_questions(200), ["video", "text"])
    for rank in range(2):
        mine = units[rank::2]
        assert sum(unit.condition == "video" for unit in mine) == 25
    assert [len(u.questions) for u in units if u.condition == "text"] == [64, 64, 64, 8]


def test_the_hash_is_of_what_is_asked():
    questions = make_questions(8)
    same = [replace(q, video=Path("/elsewhere") / q.video) for q in reversed(questions)]
    assert questions_hash(questions) == questions_hash(same)
    for change in ({"question": "What?"}, {"answer": 1}, {"subtitles": Path("a.srt")}):
        assert questions_hash([replace(questions[0], **change)]) != questions_hash(questions[:1])


# ---- what cannot be read


def test_an_unreadable_video_costs_its_own_questions_only(tmp_path):
    questions = make_questions(20)
    tables = evaluate(Watched(unreadable="v1.mp4"), questions, ["video", "text"], tmp_path)
    video, text = overall(tables), overall(tables, "text")
    assert (video.num_unanswered, video.statuses) == (4, {"ok": 16, "unreadable": 4})
    assert (text.num_unanswered, text.num_questions) == (0, 20)
    named = summary_of(tmp_path)["unreadable_videos"]
    assert [(item["video"], item["reason"]) for item in named] == [
        ("v1.mp4", "v1.mp4: moov atom not found")
    ]
    assert "moov atom" in (tmp_path / "report.html").read_text()
    bad = [p for p in read_predictions(tmp_path / "predictions.jsonl") if p.status != "ok"]
    assert {p.video for p in bad} == {"v1.mp4"}
    assert all(not p.correct and p.prediction is None for p in bad)


def test_a_mended_video_is_asked_about_in_the_next_call(tmp_path, straight):
    questions, out = make_questions(40), tmp_path / "out"
    evaluate(Watched(unreadable="v1.mp4"), questions, ["video", "text"], out)
    mended = Watched()
    evaluate(mended, questions, ["video", "text"], out)
    assert mended.shown == [("v1.mp4", "video")] and len(mended.asked) == 4
    assert (out / "predictions.jsonl").read_bytes() == straight


def test_an_answer_stands_over_a_failure_to_read(tmp_path):
    """Parts are read in the order of their names, which is not the order of events."""
    questions = make_questions(4)
    evaluate(Watched(), questions, ["video"], tmp_path / "good")
    evaluate(Watched(unreadable="v0.mp4"), questions, ["video"], tmp_path / "bad")
    good, bad = (tmp_path / name / "predictions.jsonl" for name in ("good", "bad"))
    for names in (("0", "1"), ("1", "0")):
        folder = RunFolder(tmp_path / "".join(names))
        for name, source in zip(names, (good, bad), strict=True):
            (folder.path / "parts" / f"{name}.jsonl").write_bytes(source.read_bytes())
        assert {p.status for p in folder.read(questions).values()} == {"ok"}


# ---- what stops a run


@pytest.mark.parametrize("error", [ConnectionError("no server"), ValueError("too long")])
def test_an_answerers_own_error_stops_the_run_and_says_how_to_go_on(tmp_path, capsys, error):
    failing = Watched(stop_at=8)
    failing.error = error
    with pytest.raises(type(error)):
        evaluate(failing, make_questions(20), ["video"], tmp_path)
    assert "the same command goes on" in capsys.readouterr().err
    later = Watched()
    evaluate(later, make_questions(20), ["video"], tmp_path)
    assert len(later.asked) == 12


def test_scores_that_are_no_numbers_stop_the_run(tmp_path):
    class Broken(OracleAnswerer):
        def answer(self, questions, condition, seen):
            return [Answer(0, "ok", [float("nan")] * 4) for _ in questions]

    with pytest.raises(ValueError, match="'q0'.*weights"):
        evaluate(Broken(), make_questions(4), ["video"], tmp_path)


def test_answer_of_no_scores_is_no_answer(tmp_path):
    class Silent(OracleAnswerer):
        def answer(self, questions, condition, seen):
            return [Answer(None, "unparsable") for _ in questions]

    score = overall(evaluate(Silent(), make_questions(4), ["video"], tmp_path))
    assert (score.num_unanswered, score.accuracy) == (4, 0.0)


def test_no_more_videos_in_memory_than_are_looked_ahead(tmp_path):
    """The thread runs ahead of the answerer, but not far."""
    lead = []

    class Slow(Watched):
        def answer(self, questions, condition, seen):
            time.sleep(0.002)  # long enough for the thread to run away, if it could
            lead.append(len(self.shown) - len(lead))
            return super().answer(questions, condition, seen)

    evaluate(Slow(), make_questions(120), ["video"], tmp_path)
    assert 1 <= max(lead) <= 3


# ---- another run's folder


def test_runs_are_not_mixed(tmp_path):
    questions = make_questions(8)
    evaluate(OracleAnswerer(), questions, ["video"], tmp_path)
    with pytest.raises(ValueError, match="another answerer .kind: oracle, now random.*--out"):
        evaluate(RandomAnswerer(), questions, ["video"], tmp_path)
    with pytest.raises(ValueError, match="other questions"):
        evaluate(OracleAnswerer(), questions[:4], ["video"], tmp_path)
    with pytest.raises(ValueError, match="smell"):
        evaluate(OracleAnswerer(), questions, ["smell"], tmp_path)
    with pytest.raises(ValueError, match="limit"):
        evaluate(OracleAnswerer(), questions, ["video"], tmp_path, limit=0)


def test_other_versions_are_told_and_not_refused(tmp_path):
    """But only if answers were made with them."""
    questions = make_questions(8)
    evaluate(OracleAnswerer(), questions, ["video"], tmp_path)
    summary = summary_of(tmp_path)
    summary["manifest"]["versions"] |= {"torch": "0.4.1", "time": "1999-12-31"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    evaluate(OracleAnswerer(), questions, ["video"], tmp_path)
    assert summary_of(tmp_path)["version_drift"] == []
    for _ in range(2):
        evaluate(OracleAnswerer(), questions, ["video", "text"], tmp_path)
        (drift,) = summary_of(tmp_path)["version_drift"]
        assert drift.startswith("torch: 0.4.1, now ")
    assert summary_of(tmp_path)["manifest"]["versions"]["torch"] == "0.4.1"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"manifest": 3}', '{"a": '])
def test_a_summary_of_something_else(tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match="not the summary of an evaluation"):
        evaluate(OracleAnswerer(), make_questions(4), ["video"], tmp_path)


@pytest.mark.parametrize("name", ["predictions.jsonl", "parts/0.jsonl"])
def test_predictions_without_a_summary(tmp_path, name):
    (tmp_path / "parts").mkdir()
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(ValueError, match="no summary.json that says whose"):
        evaluate(OracleAnswerer(), make_questions(4), ["video"], tmp_path)


@pytest.mark.parametrize(
    "line", ["{}", "[1]", "3", "not JSON", '{"question_id": "q0"}', "\x00", '{"a": NaN}']
)
def test_a_bad_line_in_a_part_is_named(tmp_path, line):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Watched(stop_at=4), make_questions(8), ["video"], tmp_path)
    part = tmp_path / "parts" / "0.jsonl"
    part.write_text(line + "\n" + part.read_text())
    with pytest.raises(ValueError, match="0.jsonl:1: .*asked again"):
        evaluate(Watched(), make_questions(8), ["video"], tmp_path)


def test_part_of_another_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(Watched(stop_at=4), make_questions(8), ["video"], tmp_path / "out")
    others = [replace(q, answer=(q.answer + 1) % 4) for q in make_questions(8)]
    for questions in (others, [replace(q, question_id="x" + q.question_id) for q in others]):
        evaluate(Watched(), questions, ["video"], tmp_path / questions[0].question_id)
        foreign = (tmp_path / questions[0].question_id / "predictions.jsonl").read_bytes()
        (tmp_path / "out" / "parts" / "9.jsonl").write_bytes(foreign)
        with pytest.raises(ValueError, match="9.jsonl:1: .*another run"):
            evaluate(Watched(), make_questions(8), ["video"], tmp_path / "out")


def test_two_writers_are_refused(tmp_path):
    class Greedy(Watched):
        def answer(self, questions, condition, seen):
            evaluate(Watched(), make_questions(8), ["video"], tmp_path)

    with pytest.raises(ValueError, match="another process is writing"):
        evaluate(Greedy(), make_questions(8), ["video"], tmp_path)


def test_a_folder_that_cannot_be(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        evaluate(OracleAnswerer(), make_questions(4), ["video"], file)
    with pytest.raises(OSError):
        evaluate(OracleAnswerer(), make_questions(4), ["video"], file / "below")


# ---- the command


def test_oracle_is_perfect_and_guessing_is_chance(tmp_path):
    questions = make_questions(1000)
    tables = evaluate(OracleAnswerer(), questions, ["video", "text"], tmp_path / "oracle")
    assert {score.accuracy for score in tables["overall"]["all"].values()} == {1.0}
    tables = evaluate(RandomAnswerer(), questions, ["video", "text"], tmp_path / "random")
    for score in tables["overall"]["all"].values():
        assert score.low <= score.chance == 0.25 <= score.high


def test_eval_command_end_to_end(tmp_path, capsys):
    records = [RECORD | {"question_id": f"q{i}", "video": f"v{i // 2}.mp4"} for i in range(6)]
    data, out = write_questions(tmp_path, records), tmp_path / "out"
    command = ["eval", "oracle", "--data", str(data), "--out", str(out)]
    assert main([*command, "--condition", "video", "text"]) == 0
    printed = capsys.readouterr().out
    assert "questions: 6 questions" in printed and "perception" in printed
    assert "12 answers in" in printed and str(out) in printed
    assert len(read_predictions(out / "predictions.jsonl")) == 12
    assert main(["eval", "random", *command[2:]]) == 2
    assert "another --out" in capsys.readouterr().err
    for wrong, said in {
        "--data": "no_such",
        "--benchmark": "no_such",
        "--condition": "no_such",
        "--server": "--server does nothing with 'oracle'",
    }.items():
        assert main([*command, wrong, "no_such"]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", "oracle", "--out", str(out)]) == 2
    assert "--data" in capsys.readouterr().err


def test_the_last_lines_say_what_was_wrong(tmp_path, capsys, plain_video, monkeypatch):
    from apollo.eval import runner

    monkeypatch.setattr(runner, "make_answerer", lambda *_, **__: Watched(unreadable="v1.mp4"))
    records = [RECORD | {"question_id": f"q{i}", "video": f"v{i // 2}.mp4"} for i in range(6)]
    data = write_questions(tmp_path, records)
    assert main(["eval", "random", "--data", str(data), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 of 6 questions have no answer and count as wrong (2 unreadable)" in printed
    assert "1 video could not be read: v1.mp4" in printed


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    from apollo.world.make import make_world

    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, num_videos=4, seed=5, split="test", workers=1)
    return folder


def test_a_world_is_recognised(tiny_world, tmp_path, capsys):
    assert main(["eval", "oracle", "--data", str(tiny_world), "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "world (by its world.json)" in printed and "scored by option" in printed


def test_damaged_missing_and_empty_videos(tiny_world, tmp_path, capsys):
    """The shipped model answers about the video that is left; the others are named."""
    shutil.copytree(tiny_world, tmp_path / "world")
    damaged, missing, empty, _ = sorted((tmp_path / "world" / "videos").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:1000] + b"\x00" * 1000)
    missing.unlink()
    empty.write_bytes(b"")
    out = tmp_path / "out"
    assert main(["eval", "micro", "--data", str(tmp_path / "world"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "15 of 20 questions have no answer" in printed
    assert "3 videos could not be read: videos/000000.mp4, videos/000001.mp4" in printed
    statuses = Counter(
        (p.video, p.status == "ok") for p in read_predictions(out / "predictions.jsonl")
    )
    assert statuses == {(f"videos/00000{i}.mp4", i == 3): 5 for i in range(4)}
    assert str(tmp_path) not in (out / "predictions.jsonl").read_text()


def test_the_documentation_runs(tiny_world, tmp_path, monkeypatch, capsys):
    """Its commands parse, and its example of an answerer answers."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = [line.split(" #")[0] for line in text.splitlines() if line.startswith("    apollo ")]
    assert len(commands) > 5
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "held_out").symlink_to(tiny_world)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_terminated_run_says_how_to_go_on(tmp_path):
    """SIGTERM ends it with its own code; what was answered is there."""
    data = write_questions(tmp_path, [RECORD | {"question_id": f"q{i}"} for i in range(6)])
    code = (
        "import os, signal, sys\n"
        "from apollo.eval import answerers\n"
        "from apollo.cli import main\n"
        "guess = answerers.RandomAnswerer.answer\n"
        "def answer(self, questions, condition, seen):\n"
        "    if condition == 'text': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return guess(self, questions, condition, seen)\n"
        "answerers.RandomAnswerer.answer = answer\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    line = ["eval", "random", "--data", str(data), "--out", str(tmp_path / "out")]
    line += ["--condition", "video", "text"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    part = tmp_path / "out" / "parts" / "0.jsonl"
    assert part.read_text().count("\n") == 6


# ---- the shipped model: one file, byte for byte


def run_micro(world: Path, out: Path, *options: str, processes: int = 1) -> bytes:
    """`apollo eval` of the shipped model in processes of its own; gives predictions.jsonl."""
    done = subprocess.run(
        micro_command(world, out, *options, processes=processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return (out / "predictions.jsonl").read_bytes()


def micro_command(world: Path, out: Path, *options: str, processes: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line = ["-m", "apollo", "eval", "micro", "--data", str(world), "--out", str(out)]
    return [sys.executable, *(launch if processes > 1 else []), *line, *options]


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["letter", "option", "generate"])
def test_one_file_for_any_batch_processes_order_and_kill(tiny_world, tmp_path, scoring):
    options = ["--scoring", scoring, "--condition", "video", "frame", "text", "shuffled"]
    expected = run_micro(tiny_world, tmp_path / "1", *options, "--batch-size", "1")
    for size in ("4", "16"):
        out = tmp_path / size
        assert run_micro(tiny_world, out, *options, "--batch-size", size) == expected, size
    assert run_micro(tiny_world, tmp_path / "two", *options, processes=2) == expected

    permuted = tmp_path / "permuted"  # the same world, its questions in another order
    permuted.mkdir()
    for name in ("videos", "world.json"):
        (permuted / name).symlink_to(tiny_world / name)
    lines = (tiny_world / "questions.jsonl").read_text().splitlines(keepends=True)
    Random(3).shuffle(lines)
    (permuted / "questions.jsonl").write_text("".join(lines))
    assert run_micro(permuted, tmp_path / "order", *options) == expected

    killed = tmp_path / "killed"
    for wanted in (1, 3):  # kill -9 after some units, twice, then go on with two processes
        kill_after(micro_command(tiny_world, killed, *options), killed, wanted)
    assert run_micro(tiny_world, killed, *options, processes=2) == expected


def kill_after(command: list[str], out: Path, num_units: int) -> None:
    """Start a run and kill it when its part has grown so many times, by whatever it was before."""
    part = out / "parts" / "0.jsonl"
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sizes = set()
    while len(sizes) <= num_units and process.poll() is None:
        sizes.add(part.stat().st_size if part.exists() else 0)
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before"


@pytest.mark.slow
def test_a_process_that_dies_leaves_no_other_waiting(tiny_world, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from apollo.eval import answerers\n"
        "from apollo.cli import main\n"
        "def answer(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ['RANK'] == '1': answerers.RandomAnswerer.answer = answer\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "WORLD_SIZE": "2"}
    environment["MASTER_PORT"] = str(free_port())
    line = ["eval", "random", "--data", str(tiny_world), "--out", str(tmp_path / "out")]
    processes = [  # without torchrun, which would end the other itself
        subprocess.Popen(
            [sys.executable, str(script), *line],
            cwd=ROOT,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = processes[0].communicate(timeout=120)[1]
    assert processes[1].wait() == -signal.SIGKILL
    assert processes[0].returncode == 2 and "another process of this run has stopped" in said


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_oracle_random_and_blind_on_clean_questions(tmp_path):
    """Where only the frames tell the answer, whoever does not see them is at chance."""
    from apollo.eval.answerers import make_answerer
    from apollo.world.make import make_world

    make_world(tmp_path / "world", num_videos=40, seed=11, split="test", workers=1)
    clean = [q for q in read_questions(tmp_path / "world") if q.needs == "frames"]
    tables = evaluate(OracleAnswerer(), clean, ["video"], tmp_path / "oracle")
    assert overall(tables).accuracy == 1
    tables = evaluate(RandomAnswerer(), clean, ["video"], tmp_path / "random")
    assert overall(tables).low <= overall(tables).chance <= overall(tables).high
    for scoring in ("option", "letter"):
        blind = make_answerer("micro", scoring=scoring)
        tables = evaluate(blind, clean, ["text"], tmp_path / scoring)
        score = overall(tables, "text")
        assert score.low <= score.chance <= score.high, score
