"""Readers of benchmarks on small tables in the true schemas; subtitles; the hub; hostile rows."""

import csv
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from apollo.cli import main
from apollo.eval.answerers import SCORINGS
from apollo.eval.benchmarks import (
    BENCHMARKS,
    answer_index,
    read_benchmark,
    split_options,
    without_letters,
)
from apollo.eval.data_folder import read_rows, unpack
from apollo.eval.questions import Question, read_jsonl, read_questions
from apollo.eval.scoring import read_predictions
from apollo.eval.subtitles import Subtitle, read_subtitles, subtitles_at

FIXTURES = Path(__file__).parent / "benchmark_fixtures"
ROOT = Path(__file__).parent.parent

# Name: folder of the fixture, its table, usual paths of its videos, right options in order.
CASES: dict[str, tuple[str, str, list[str], list[int]]] = {
    "videomme": (
        "videomme",
        "videomme/test-00000-of-00001.parquet",
        ["data/kEttle-01_a.mp4", "data/harbour02-Q.mp4"],
        [2, 0, 1, 0, 3, 0],
    ),
    "mlvu_dev": (
        "mlvu_dev",
        "data/test-00000-of-00001.parquet",
        ["video/2_count/count_7.mp4", "plot_31.mp4", "video/street_2.mp4"],
        [0, 2, 3, 0],
    ),
    "mlvu_test": (
        "mlvu_test",
        "test-00000-of-00001.parquet",
        ["tutorial_4.mp4", "match_9.mp4"],
        [4, 1],
    ),
    "longvideobench": (
        "longvideobench",
        "validation-00000-of-00001.parquet",
        ["videos/hArbour_3x.mp4", "videos/valley-9.mp4"],
        [2, 4, 0],
    ),
    "tempcompass_multi_choice": (
        "tempcompass",
        "multi-choice/test-00000-of-00001.parquet",
        ["videos/9001.mp4", "videos/9001_reverse.mp4", "videos/9002_speed.mp4"],
        [1, 2, 3, 0],
    ),
    "tempcompass_yes_no": (
        "tempcompass",
        "yes_no/test-00000-of-00001.parquet",
        ["videos/9001.mp4", "videos/9001_reverse.mp4"],
        [0, 1, 1],
    ),
    "tempcompass_caption_matching": (
        "tempcompass",
        "caption_matching/test-00000-of-00001.parquet",
        ["videos/9001.mp4", "videos/9002_speed.mp4"],
        [0, 1, 1],
    ),
    "tempcompass_captioning": (
        "tempcompass",
        "captioning/test-00000-of-00001.parquet",
        ["videos/9001.mp4"],
        [1, 0],
    ),
    "nextqa": (
        "nextqa",
        "MC/test-00000-of-00001.parquet",
        ["NExTVideo/4100730427.mp4", "NExTVideo/1010/9013380132.mp4"],
        [0, 1, 4, 1],
    ),
    "perception_test": (
        "perception_test",
        "mc_question_val/validation-00000-of-00001.parquet",
        ["videos/video_12.mp4", "videos/video_77.MP4"],
        [2, 0, 0],
    ),
    "curated": (
        "curated",
        "questions.jsonl",
        ["videos/kEttle-01_a.mp4", "videos/9013380132.mp4"],
        [2, 1],
    ),
}
CASES["videomme_subtitles"] = CASES["videomme"]
CASES["longvideobench_subtitles"] = CASES["longvideobench"]
TABLES = sorted(set(CASES) - {"curated"})


def unpacked(name: str, folder: Path) -> Path:
    """Copy a benchmark's fixture and put a file in the place of each of its videos."""
    source, table, videos, _ = CASES[name]
    if table.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    root = shutil.copytree(FIXTURES / source, folder / source, dirs_exist_ok=True)
    for video in videos:
        path = root / video
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def rows_of(name: str, root: Path) -> list[dict]:
    return [row for _, row in read_rows(root / CASES[name][1])]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- every benchmark


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_fixture_reads_with_known_counts(name, tmp_path):
    _, _, videos, answers = CASES[name]
    root = unpacked(name, tmp_path)
    questions = read_benchmark(name, root)
    assert [q.answer for q in questions] == answers
    assert {q.video for q in questions} == {root / video for video in videos}
    assert len({q.video_id for q in questions}) == len(videos)
    assert len({q.question_id for q in questions}) == len(questions)
    assert {q.benchmark for q in questions} == {"small_bench" if name == "curated" else name}
    for q in questions:
        assert str(tmp_path) not in q.question_id + q.video_id
        assert q.question_class and not re.search(r"\n|^\(?[A-Z][.)]", q.question)
        assert not any(re.match(r"\(?[A-Z][.)] |Caption|Option|N/A", o) for o in q.options)


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_fixture_scores_with_known_counts(name, tmp_path):
    answers = CASES[name][3]
    root, out = unpacked(name, tmp_path), tmp_path / "out"
    assert (
        main(["eval", "oracle", "--benchmark", name, "--data", str(root), "--out", str(out)]) == 0
    )
    predictions = read_predictions(out / "predictions.jsonl")
    assert sorted(p.answer for p in predictions) == sorted(answers)
    assert all(p.correct and p.status == "ok" for p in predictions)
    assert str(tmp_path) not in (out / "predictions.jsonl").read_text()


def test_there_is_a_case_for_every_public_benchmark():
    assert set(BENCHMARKS) == {*CASES, "questions", "world"}
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.about and "\n" not in benchmark.about
        assert benchmark.scoring == ("option" if name == "world" else "letter")
        assert benchmark.scoring in SCORINGS
        assert bool(benchmark.hub_id) == (name not in ("questions", "world", "curated"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("name", TABLES)
def test_the_same_columns_in_another_container_make_the_same_questions(name, suffix, tmp_path):
    root = unpacked(name, tmp_path)
    expected = read_benchmark(name, root)
    rows = rows_of(name, root)
    table = root / CASES[name][1]
    table.unlink()
    (root / "lvb_val.json").unlink(missing_ok=True)
    table = table.with_suffix(suffix)
    if suffix == ".csv":
        listed = [
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows
        ]
        with open(table, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(listed)
    elif suffix == ".jsonl":
        write_jsonl(table, rows)
    else:
        table.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert read_benchmark(name, root) == expected


def test_videomme_says_where_its_questions_come_from(tmp_path):
    root = unpacked("videomme", tmp_path)
    first = read_benchmark("videomme", root)[0]
    assert first == Question(
        question_id="001-1",
        video=root / "data/kEttle-01_a.mp4",
        question="How many cups are filled from the kettle?",
        options=("One.", "Two.", "Three.", "Four."),
        answer=2,
        question_class="Counting Problem",
        family="Food",
        benchmark="videomme",
        video_id="kEttle-01_a",
        duration_group="short",
        source="Life Record",
    )
    letters = read_benchmark("videomme", root)[4]
    assert letters.options == ("B.", "A.", "D.", "C.") and letters.answer == 3  # answer "D"


def test_subtitles_are_found_where_there_are_some(tmp_path):
    root = unpacked("videomme", tmp_path)
    questions = read_benchmark("videomme_subtitles", root)
    shown = [q.subtitles and q.subtitles.name for q in questions]
    assert shown == ["kEttle-01_a.srt"] * 3 + [None] * 3
    assert [s.text for s in read_subtitles(questions[0].subtitles)] == [
        "Good morning.",
        "We boil water, then we wait.",
    ]
    (root / "subtitle/kEttle-01_a.srt").unlink()
    with pytest.raises(ValueError, match="no subtitles below .*subtitle.zip"):
        read_benchmark("videomme_subtitles", root)
    assert len(read_benchmark("videomme", root)) == 6


def test_longvideobench_reads_its_parquet_and_its_json_alike(tmp_path):
    root = unpacked("longvideobench", tmp_path)
    questions = read_benchmark("longvideobench_subtitles", root)
    assert questions == read_benchmark("longvideobench_subtitles", root / "lvb_val.json")
    assert [len(q.options) for q in questions] == [4, 5, 2]
    assert [q.duration_group for q in questions] == ["60", "60", "3600"]
    last = questions[2]
    assert (last.duration_s, last.subtitles_from_s, last.video_id) == (2210.0, 754.5, "valley-9")
    assert last.source == "LT-Travel Guides" and last.question_class == "SSS"
    read = read_subtitles(last.subtitles, last.subtitles_from_s)
    assert read[1] == Subtitle(0.0, 2.75, "We cross the bridge.")
    assert read[2].end_s == float("inf") and read[0].end_s < 0
    assert [s.end_s for s in read_subtitles(questions[0].subtitles)] == [2.5, 5.12]


def test_tempcompass_captions_are_asked_for_and_then_asked_about(tmp_path):
    root = unpacked("tempcompass_captioning", tmp_path)
    first, second = read_benchmark("tempcompass_captioning", root)
    assert first.caption_prompt.endswith("Generated Caption:")
    assert first.question == second.question == "What is the girl doing?"
    assert first.options == ("folding paper", "tearing paper", "painting paper")
    assert (first.question_id, second.question_id) == ("9001-action-1", "9001-action-2")
    unpacked("tempcompass_caption_matching", tmp_path)
    slow = read_benchmark("tempcompass_caption_matching", root)[2]
    assert slow.options == ("The video is fast.", "The video is slow: half its speed.")
    yes_no = read_benchmark("tempcompass_yes_no", unpacked("tempcompass_yes_no", tmp_path))
    assert {q.options for q in yes_no} == {("yes", "no")}


def test_an_option_given_twice_is_shown_once(tmp_path):
    fourth = read_benchmark("nextqa", unpacked("nextqa", tmp_path))[3]
    assert fourth.options == ("on his arm", "by the lead", "on his back", "not at all")
    assert (fourth.question_class, fourth.family) == ("causal", "CH")
    assert fourth.question_id == "9013380132-1"


def test_nextqa_without_its_ids_and_types(tmp_path):
    root = unpacked("nextqa", tmp_path)
    rows = [
        {k: v for k, v in r.items() if k not in ("qid", "type")} for r in rows_of("nextqa", root)
    ]
    questions = read_benchmark("nextqa", write_jsonl(root / "nextqa.jsonl", rows))
    assert [q.question_id[-4:] for q in questions] == ["row1", "row2", "row1", "row2"]
    assert questions[0].question_class == ""


# ---- rows that make no question


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("videomme", {"answer": "E"}, "is not a letter of"),
        ("videomme", {"answer": "Three."}, "is not a letter of"),
        ("videomme", {"answer": ""}, "'answer' is empty"),
        ("videomme", {"answer": None}, "'answer' is not a text"),
        ("videomme", {"options": ["A. one", "B.  "], "answer": "A"}, "non-empty"),
        ("videomme", {"options": "one, two"}, "'options' is not a list"),
        ("videomme", {"options": ["A. one"], "answer": "A"}, "two or more"),
        ("videomme", {"question": " "}, "'question' is empty"),
        ("videomme", {"question_id": "001-1"}, "also in .*:1"),
        ("videomme", {"videoID": "../../secret"}, "does not lie in the folder"),
        ("videomme", {"videoID": "/etc/passwd"}, "does not lie in the folder"),
        ("mlvu_dev", {"candidates": ["3", "1", "2", "5"]}, "'question' has the options"),
        ("mlvu_dev", {"candidates": ["B", "A"], "question": "?", "answer": "A"}, "names two of"),
        ("mlvu_dev", {"duration": "long"}, "'duration' is not a number"),
        ("mlvu_dev", {"duration": -1}, "not a positive number"),
        ("longvideobench", {"correct_choice": -1}, "not the number of an option"),
        ("longvideobench", {"correct_choice": 4}, "not an index of 4 options"),
        ("longvideobench", {"correct_choice": 1.5}, "not the number of an option"),
        ("longvideobench", {"option1": "N/A"}, "stands before other options"),
        ("longvideobench_subtitles", {"starting_timestamp_for_subtitles": None}, "'starting"),
        ("tempcompass_multi_choice", {"question": "What?"}, "ends in no options"),
        ("tempcompass_multi_choice", {"answer": "A. tearing paper"}, "is none of the options"),
        ("tempcompass_yes_no", {"answer": "maybe"}, "is none of the options"),
        ("tempcompass_captioning", {"mc_answer": "D. none"}, "is none of the options"),
        ("nextqa", {"answer": 5}, "not an index of 5 options"),
        ("nextqa", {"a3": None}, "'a3' is not a text"),
        ("nextqa", {"type": "XX"}, "'type' must begin"),
        ("perception_test", {"answer_id": "two"}, "'answer_id' is not a number"),
    ],
)
def test_a_row_that_makes_no_question_is_named(name, change, message, tmp_path):
    root = unpacked(name, tmp_path)
    rows = rows_of(name, root)
    row = rows[0] | {key: rows[1][key] for key in ("question_id", "id", "qid") if key in rows[1]}
    table = write_jsonl(root / "table.jsonl", [rows[0], row | change])
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(name, table)
    assert str(error.value).startswith(f"{table}:2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_is_named_with_those_that_are_there(name, tmp_path):
    root = unpacked(name, tmp_path)
    rows = rows_of(name, root)
    for column in ("question", "mc_question"):
        rows[1].pop(column, None)
    with pytest.raises(ValueError, match="no column '(mc_)?question'; the columns are ") as error:
        read_benchmark(name, write_jsonl(root / "table.jsonl", rows))
    assert "table.jsonl:2: " in str(error.value)


def test_parquet_rows_are_named_by_number(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = unpacked("nextqa", tmp_path)
    rows = rows_of("nextqa", root)
    rows[2]["answer"] = 7
    path = root / CASES["nextqa"][1]
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=2)
    with pytest.raises(ValueError, match=r"parquet row 3: .* not an index of 5"):
        read_benchmark("nextqa", root)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"parquet cannot be read") as error:
        read_benchmark("nextqa", root)
    assert "\n" not in str(error.value)


def test_shards_are_read_together(tmp_path):
    root = unpacked("videomme", tmp_path)
    expected = read_benchmark("videomme", root)
    rows = rows_of("videomme", root)
    (root / CASES["videomme"][1]).unlink()
    write_jsonl(root / "videomme/test-00001-of-00002.jsonl", rows[2:])
    write_jsonl(root / "videomme/test-00000-of-00002.jsonl", rows[:2])
    assert read_benchmark("videomme", root) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test.json", "[{]", r"test.json:1: "),
        ("test.json", "[1]", r"test.json row 1: a row is an object"),
        ("test.json", "[]", "holds no questions"),
        ("test.jsonl", "\n", "holds no questions"),
        ("test.jsonl", "{}\n{", r"test.jsonl:1: no column"),
        ("test.jsonl", "nonsense", r"test.jsonl:1: "),
        ("test.csv", "videoID,question\na,b,c\n", r"row 1: more values than columns"),
        ("test.csv", "videoID\n\xe9\n", r"cannot be read"),
        ("test.parquet", "PAR1", r"cannot be read"),
        ("test.txt", "x", "looked for videomme/test"),
    ],
)
def test_broken_tables_are_errors_of_one_line(file, content, message, tmp_path):
    if file.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark("videomme", tmp_path)
    assert "\n" not in str(error.value)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    root = shutil.copytree(FIXTURES / "nextqa", tmp_path / "nextqa")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'apollo-lmm\[data\]'"):
        read_benchmark("nextqa", root)


# ---- videos


def test_a_missing_video_keeps_its_questions(tmp_path):
    root = unpacked("videomme", tmp_path)
    (root / "data/kEttle-01_a.mp4").unlink()
    questions = read_benchmark("videomme", root)
    assert len(questions) == 6 and questions[0].video == root / "data/kEttle-01_a.mp4"
    (root / "data/harbour02-Q.mp4").unlink()
    with pytest.raises(ValueError, match="none of the 2 videos is below") as error:
        read_benchmark("videomme", root)
    assert str(root / "data/harbour02-Q.mp4") in str(error.value)
    (root / "videos_chunked_01.zip").touch()
    with pytest.raises(ValueError, match="unpack videos_chunked_01.zip there first"):
        read_benchmark("videomme", root)


def test_videos_are_found_anywhere_below(tmp_path):
    root = unpacked("videomme", tmp_path)
    elsewhere = tmp_path / "disk"
    (elsewhere / "deep").mkdir(parents=True)
    (root / "data/kEttle-01_a.mp4").rename(elsewhere / "deep/kEttle-01_a.MKV")
    (elsewhere / "up").symlink_to(root)  # a circle of links
    (root / "linked").symlink_to(elsewhere)
    (root / ".cache").mkdir()
    (root / ".cache/kEttle-01_a.mp4").touch()
    assert read_benchmark("videomme", root)[0].video == root / "linked/deep/kEttle-01_a.MKV"
    (root / "copy").mkdir()
    (root / "copy/kEttle-01_a.mp4").symlink_to(elsewhere / "deep/kEttle-01_a.MKV")
    read_benchmark("videomme", root)  # one file by two names
    (root / "copy/kEttle-01_a.webm").touch()
    with pytest.raises(
        ValueError, match=r"'kEttle-01_a' may be .*copy.* or .*kEttle-01_a"
    ) as error:
        read_benchmark("videomme", root)
    assert "row 1: " in str(error.value)
    (root / "data/kEttle-01_a.mkv").touch()  # its usual place decides
    assert read_benchmark("videomme", root)[0].video == root / "data/kEttle-01_a.mkv"


def test_one_video_of_mlvu_in_the_folders_of_two_tasks(tmp_path):
    root = unpacked("mlvu_dev", tmp_path)
    (root / "plot_31.mp4").unlink()
    for folder in ("video/1_plotQA", "video/7_topic_reasoning"):
        (root / folder).mkdir(parents=True)
        (root / folder / "plot_31.mp4").touch()
    assert read_benchmark("mlvu_dev", root)[1].video == root / "video/1_plotQA/plot_31.mp4"


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A snapshot folder as huggingface_hub would give it, with the videos in a zip."""
    root = unpacked("videomme", tmp_path)
    with zipfile.ZipFile(root / "videos_chunked_01.zip", "w") as file:
        for path in sorted((root / "data").iterdir()):
            file.writestr(f"data/{path.name}", b"video")
    shutil.rmtree(root / "data")
    asked: list[tuple] = []

    def snapshot_download(repo_id: str, repo_type: str) -> str:
        asked.append((repo_id, repo_type))
        assert asked[-1] == ("lmms-eval/Video-MME", "dataset")
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return root


@pytest.mark.parametrize("data", [None, "lmms-eval/Video-MME"])
def test_a_benchmark_comes_from_the_hub_and_is_unpacked_once(data, hub):
    questions = read_benchmark("videomme", data)
    assert len(questions) == 6
    video = hub / "unpacked/videos_chunked_01/data/kEttle-01_a.mp4"
    assert questions[0].video == video
    video.write_bytes(b"touched")
    read_benchmark("videomme", data)
    assert video.read_bytes() == b"touched"
    assert [p.name for p in (hub / "unpacked").iterdir()] == ["videos_chunked_01"]


@pytest.mark.parametrize("name", ["../out.mp4", "/out.mp4", "a/../../out.mp4", "..\\out.mp4"])
def test_no_file_of_a_zip_leaves_its_folder(name, tmp_path):
    archive = tmp_path / "bad.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("good.mp4", b"")
        file.writestr(name, b"")
    with pytest.raises(ValueError, match="would lie outside"):
        unpack(archive, tmp_path / "deep/er/bad")
    assert not list(tmp_path.rglob("*.mp4"))
    archive.write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "deep/er/bad")
    assert not list((tmp_path / "deep").rglob("*bad*"))


def test_a_zip_that_another_process_unpacks_first_is_left_to_it(tmp_path, monkeypatch):
    archive, folder = tmp_path / "a.zip", tmp_path / "unpacked/a"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("v.mp4", b"mine")
    extract = zipfile.ZipFile.extractall

    def extract_slowly(self, path):
        extract(self, path)
        extract(self, folder)
        (folder / "v.mp4").write_bytes(b"theirs")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", extract_slowly)
    unpack(archive, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    assert (folder / "v.mp4").read_bytes() == b"theirs"


def test_data_that_is_nowhere(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(ValueError, match=r"cannot fetch .*a/b \(no network at all\).* --data"):
        read_benchmark("nextqa", "a/b")
    with pytest.raises(ValueError, match="no folder or file /no/where"):
        read_benchmark("nextqa", "/no/where")
    with pytest.raises(ValueError, match=r"no folder or file \./there"):
        read_benchmark("nextqa", "./there")
    for name in ("questions", "world", "curated"):
        with pytest.raises(ValueError, match=f"{name!r} needs --data"):
            read_benchmark(name)
    with pytest.raises(ValueError, match="no benchmark 'mme'; there are questions, world, "):
        read_benchmark("mme", tmp_path)


# ---- our own formats

RECORD = {
    "question_id": "q0",
    "video": "videos/v0.mp4",
    "question": "Which shape moves?",
    "options": ["circle", "square"],
    "answer": 1,
}


def test_five_fields_make_a_question(tmp_path):
    path = write_jsonl(tmp_path / "questions.jsonl", [RECORD])
    (question,) = read_jsonl(path)
    assert question == Question(
        "q0", tmp_path / "videos/v0.mp4", "Which shape moves?", ("circle", "square"), 1,
        video_id="videos/v0.mp4",
    )  # fmt: skip
    assert read_questions(tmp_path) == read_benchmark("questions", path) == [question]
    assert read_benchmark("world", tmp_path)[0].benchmark == "world"


def test_all_fields_of_a_question_are_read(tmp_path):
    fields = {
        "class": "c", "family": "f", "needs": "frame", "duration_s": 8, "video_id": "v",
        "duration_group": "short", "source": "home", "subtitles": "subs/a.srt",
        "subtitles_from_s": 3, "caption_prompt": "Describe.", "maker": "left alone",
    }  # fmt: skip
    (question,) = read_jsonl(write_jsonl(tmp_path / "q.jsonl", [RECORD | fields]), "mine")
    assert question.question_class == "c" and question.duration_s == 8.0
    assert question.subtitles == tmp_path / "subs/a.srt" and question.subtitles_from_s == 3
    assert (question.benchmark, question.video_id, question.source) == ("mine", "v", "home")
    assert question.caption_prompt == "Describe." and question.duration_group == "short"
    nothing = dict.fromkeys(fields)  # null says nothing
    assert read_jsonl(write_jsonl(tmp_path / "q.jsonl", [RECORD | nothing]))[0].duration_s is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_id": 3}, "'video_id'"),
        ({"video": " "}, "'video' is empty"),
        ({"options": ["a", 2]}, "'options' must be texts"),
        ({"subtitles_from_s": float("nan")}, "not a number"),
        ({"duration_s": True}, "'duration_s'"),
        ({"question_id": "q1", "video": "/elsewhere/v0.mp4", "video_id": "videos/v0.mp4"}, "both"),
    ],
)
def test_bad_fields_are_named(change, message, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [RECORD, RECORD | {"question_id": "q1"} | change])
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path)
    assert f"{path}:2: " in str(error.value)


def test_no_path_of_the_machine_is_a_video_id(tmp_path):
    inside, outside = str(tmp_path / "videos/a.mp4"), "/elsewhere/b.mp4"
    rows = [RECORD | {"question_id": v, "video": v} for v in (inside, outside, "../c.mp4")]
    ids = [q.video_id for q in read_jsonl(write_jsonl(tmp_path / "q.jsonl", rows))]
    assert ids == ["videos/a.mp4", "b.mp4", "../c.mp4"]
    assert Question("q", Path("/x/y.mp4"), "?", ("a", "b"), 0).video_id == "y.mp4"


def test_a_curated_benchmark_is_sealed(tmp_path):
    root = unpacked("curated", tmp_path)
    questions = root / "questions.jsonl"
    manifest = root / "manifest.json"
    before = questions.read_text()
    questions.write_text(before.replace("Three", "3"))
    with pytest.raises(ValueError, match="is not what .* was written for"):
        read_benchmark("curated", root)
    questions.write_text(before)
    for content, message in [
        (json.loads(manifest.read_text()) | {"num_questions": 3}, "not 3 with"),
        (json.loads(manifest.read_text()) | {"name": ""}, "'name' must be a text"),
        ({"name": "x"}, "must hold name, num_questions"),
        ([], "must hold name, num_questions"),
    ]:
        manifest.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_benchmark("curated", root)
    manifest.unlink()
    with pytest.raises(ValueError, match="no manifest.json"):
        read_benchmark("curated", root)


# ---- options and answers


@pytest.mark.parametrize(
    ("text", "stem", "options"),
    [
        ("Which?\nA. x\nB. y", "Which?", ["x", "y"]),
        ("Which?\n(A) x\n(B) y\n(C) z", "Which?", ["x", "y", "z"]),
        ("Which?\r\nA) x\r\nB) y\r\n", "Which?", ["x", "y"]),
        ("Which?\n\nCaption A: x: y\nCaption B: z.", "Which?", ["x: y", "z."]),
        ("Which?\nOption 1: x\nOption 2: y", "Which?", ["x", "y"]),
        ("Which?\nSentence A: x\nSentence B: y", "Which?", ["x", "y"]),
        ("Question: Which?\nOptions:\n(A) x\n(B) y", "Question: Which?", ["x", "y"]),
        ("A. Smith says\nso. Who?\nA. x\nB. y", "A. Smith says\nso. Who?", ["x", "y"]),
        ("Which?\nB. x\nC. y", "Which?\nB. x\nC. y", []),
        ("Which?\nA. x\nC. y", "Which?\nA. x\nC. y", []),
        ("Which?\nA. x\nB. y\nSay the letter.", "Which?\nA. x\nB. y\nSay the letter.", []),
        ("A. x\nB. y", "A. x\nB. y", []),
        ("Which?", "Which?", []),
    ],
)
def test_options_are_parted_from_the_question(text, stem, options):
    assert split_options(text) == (stem, options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["A. x", "B. y"], ["x", "y"]),
        (["A.x", "B: y", "(C) z"], ["x", "y", "z"]),
        (["A. B.", "B. A."], ["B.", "A."]),
        ([" x", "B. B. King"], ["x", "B. B. King"]),
        (["A. x", "C. y"], ["A. x", "C. y"]),
        (["A. Smith", "A. Miller"], ["A. Smith", "A. Miller"]),
        (["1. x", "2. y"], ["1. x", "2. y"]),
        (["Apple", "Bread"], ["Apple", "Bread"]),
    ],
)
def test_letters_are_taken_off_if_every_option_has_its_own(options, expected):
    assert without_letters(options) == expected


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. dunking", 1),
        ("(B) Dunking.", 1),
        ("Option 2: dunking", 1),
        ("dunking", 1),
        ("  DUNKING ", 1),
        ("A. dunking", None),
        ("C. elegans", 2),
        ("D", None),
        ("(D)", None),
        ("b", None),
        ("", None),
        ("dunk", None),
    ],
)
def test_an_answer_names_one_option_or_none(answer, index):
    options = ["dribbling", "dunking", "C. elegans"]
    if index is None:
        with pytest.raises(ValueError, match="the options"):
            answer_index(answer, options)
    else:
        assert answer_index(answer, options) == index


def test_an_exact_text_comes_before_one_that_is_alike():
    assert answer_index("Yes", ["Yes.", "Yes"]) == 1
    assert answer_index("YES", ["Yes.", "Yes"]) == 0
    assert answer_index("B", ["A", "B"]) == 1
    with pytest.raises(ValueError, match="names two of"):
        answer_index("B", ["B", "A"])


# ---- subtitles


def test_subrip_as_it_is_found_in_the_wild(tmp_path):
    path = tmp_path / "a.SRT"
    path.write_bytes(
        b"\xef\xbb\xbf7\r\n01:02:03,500 --> 01:02:05,250 X1:40 X2:600\r\n<b>Two</b> lines,\r\n"
        b"{\\an8}and <font color=\"white\">a tag</font>\r\n\r\n"
        b"7\r\n00:00:01.5 --> 00:00:02\r\nan earlier one\r\nthat holds\r\n\r\n42\r\n\r\n"
        b"x\r\n00:10:00,000 --> 00:10:00,000\r\n\r\n\r\n"
        b"9\r\n00:20:00,000 --> 00:20:01,000\r\n1 < 2 > 0\r\n"
        b"10\r\n00:21,000 --> 00:22,000\r\n12\r\n"
    )  # fmt: skip
    assert read_subtitles(path) == [
        Subtitle(1.5, 2.0, "an earlier one that holds 42 x"),
        Subtitle(21.0, 22.0, "12"),
        Subtitle(1200.0, 1201.0, "1 < 2 > 0"),
        Subtitle(3723.5, 3725.25, "Two lines, and a tag"),
    ]
    shifted = read_subtitles(path, from_s=1200.5)
    assert (shifted[2].start_s, shifted[2].end_s) == (-0.5, 0.5)


@pytest.mark.parametrize(
    ("file", "content", "place"),
    [
        ("a.srt", b"WEBVTT\n\n00:00:01,0 --> 00:00:02,0\nx", ":1: text before"),
        ("a.srt", b"1\n00:00:01,000 --> soon\nx", ":2: not two times"),
        ("a.srt", b"1\n00:00:05,000 --> 00:00:04,000\nx", ":2: a subtitle cannot last"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\n\xff", ":3: subtitles must be UTF-8"),
        ("a.json", b"[\n{]", ":2: "),
        ("a.json", b'{"start": 1}', ":1: subtitles are a list"),
        ("a.json", b'[{"text": "x"}]', "[0]: neither"),
        (
            "a.json",
            b'[{"timestamp": [0, 1], "text": "a"}, {"timestamp": [2], "text": "b"}]',
            "[1]:",
        ),
        ("a.json", b'[{"timestamp": [3, 2], "text": "a"}]', "[0]: a subtitle cannot last"),
        ("a.json", b'[{"timestamp": [NaN, 2], "text": "a"}]', "[0]: a subtitle cannot last"),
        ("a.json", b'[{"start": "1 s", "end": "00:00:02", "line": "x"}]', "[0]: not a time: '1 s'"),
        ("a.vtt", b"", "from .srt or .json"),
    ],
)
def test_unreadable_subtitles_name_file_and_line(file, content, place, tmp_path):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(place)) as error:
        read_subtitles(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="cannot read subtitles from"):
        read_subtitles(tmp_path / "none.srt")


def test_the_subtitles_of_a_time_are_shown_in_order_and_once():
    subtitles = [
        Subtitle(0, 2, "one"),
        Subtitle(2, 4, "two"),
        Subtitle(3, 6, "three"),
        Subtitle(6, 7, "three"),
        Subtitle(8, float("inf"), "last"),
    ]
    everything = "one\ntwo\nthree\nlast"
    assert subtitles_at(subtitles, [(0, 10)]) == everything
    assert subtitles_at(subtitles, [(8, 9), (0, 3), (2, 6)]) == everything
    assert subtitles_at(subtitles, [(2, 2)]) == "two"  # one frame, as the first one goes
    assert subtitles_at(subtitles, [(7, 7.5)]) == ""
    assert subtitles_at(subtitles, [(1e6, 1e6)]) == "last"
    assert subtitles_at(subtitles, []) == subtitles_at([], [(0, 1)]) == ""


# ---- the documentation


def test_the_worked_example_of_the_documentation_works(tmp_path, monkeypatch):
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/hall.mp4").touch()
    (tmp_path / "test.jsonl").write_text(table)
    monkeypatch.setattr("apollo.eval.benchmarks.BENCHMARKS", dict(BENCHMARKS))
    exec(compile(code, "docs/benchmarks.md", "exec"), {})
    who, count = read_benchmark("doors", tmp_path)
    assert (who.options, who.answer, who.benchmark) == (("a child", "a dog"), 1, "doors")
    assert (count.question_id, count.answer) == ("hall-count", 0)


def test_the_documentation_names_every_benchmark_and_column():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        short = name.removeprefix("tempcompass") if "yes" in name or "caption" in name else name
        assert f"`{short}`" in page, name
        assert benchmark.hub_id in page


def test_list_shows_every_benchmark(capsys):
    assert main(["list", "benchmarks"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(shown) == set(BENCHMARKS)
    assert all(len(line.split()) > 1 for line in shown.values())
