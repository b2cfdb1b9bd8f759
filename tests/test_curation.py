"""Reading predictions: every format into one table, and what contradicts itself refused."""

import csv
import json

import numpy as np
import pytest

from apollo.curation.formats import FORMATS
from apollo.curation.readers import is_aggregate, parse_sources, read_pool
from apollo.curation.records import (
    NOT_ASKED,
    RIGHT,
    UNANSWERED,
    WRONG,
    ContradictionError,
    DuplicateError,
    MalformedError,
    PartialError,
    load_pool,
    save_pool,
)
from apollo.curation.simulate import simulate


def prediction(question="q1", condition="video", chosen=1, answer=1, **more):
    """A line of predictions.jsonl."""
    return {
        "benchmark": "b",
        "question_id": question,
        "video": "v1",
        "condition": condition,
        "class": "spatial",
        "family": "",
        "needs": "",
        "duration_s": 90.0,
        "duration_group": "",
        "source": "",
        "num_options": 4,
        "answer": answer,
        "prediction": chosen,
        "correct": chosen == answer,
        "status": "ok" if chosen is not None else "unparsable",
        "option_scores": [],
        "text": "",
        "frame_times_s": [],
        "num_prompt_tokens": None,
        "num_answer_tokens": None,
        **more,
    }


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_table(path, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def pool_of(*texts, **options):
    return read_pool(parse_sources(list(map(str, texts))), **options)


def state(pool, model, condition, question):
    row = list(pool.question_ids).index(question)
    return pool.states[pool.place(condition), pool.models.index(model), row]


def test_our_predictions(tmp_path):
    write_lines(
        tmp_path / "small/predictions.jsonl",
        prediction(),
        prediction("q2", chosen=0),
        prediction(condition="text", chosen=None),
    )
    write_lines(tmp_path / "large/predictions.jsonl", prediction(), prediction("q2"))
    pool = pool_of(tmp_path / "small", tmp_path / "large", max_missing=0.5)
    assert pool.models == ("small", "large") and pool.conditions == ("video", "text")
    assert state(pool, "small", "video", "q1") == RIGHT
    assert state(pool, "small", "video", "q2") == WRONG
    assert state(pool, "small", "text", "q1") == UNANSWERED
    assert state(pool, "large", "text", "q1") == NOT_ASKED
    assert pool.columns["duration"].names == ("< 2 min",)
    # Not run is no score; asked in part is wrong and shown.
    scores = pool.accuracies("text", pool.columns["benchmark"])
    assert scores[0, 0] == 0 and np.isnan(scores[1, 0])
    assert pool.missing() == [("small", "text", "b", 1, 1)]


def test_lmms_eval_logs(tmp_path):
    videomme = {
        "question_id": "001-1",
        "duration": "short",
        "category": "Knowledge",
        "sub_category": "Biology",
        "task_category": "Counting Problem",
        "pred_answer": "C",
        "answer": "C",
        "videoID": "abc",
    }
    tempcompass = {"video_id": "7", "gt-answer": "A. left", "video-llm-prediction": "B"}
    folder = tmp_path / "org__model"
    line = {"doc_id": 0, "input": "", "target": "C", "filtered_resps": ["C"], "doc_hash": "x"}
    write_lines(
        folder / "2026_samples_videomme.jsonl",
        {**line, "videomme_perception_score": videomme},
        {
            **line,
            "doc_id": 1,
            "videomme_perception_score": {**videomme, "question_id": "001-2", "pred_answer": ""},
        },
    )
    write_lines(
        folder / "2026_samples_videomme_no_visual.jsonl",
        {**line, "videomme_perception_score": {**videomme, "pred_answer": "A"}},
        {**line, "videomme_perception_score": {**videomme, "question_id": "001-2"}},
    )
    write_lines(
        folder / "2026_samples_tempcompass_multi_choice.jsonl",
        {**line, "avg_accuracy": {**tempcompass, "rating": 0, "dim": "order"}},
        {**line, "avg_accuracy": {**tempcompass, "rating": 1, "dim": "order"}},
    )
    write_lines(folder / "2026_samples_nextqa_mc_test.jsonl", {**line, "exact_match": 1.0})
    pool = pool_of(folder)
    assert pool.models == ("org__model",) and set(pool.conditions) == {"video", "text"}
    assert state(pool, "org__model", "video", "001-1") == RIGHT
    assert state(pool, "org__model", "video", "001-2") == UNANSWERED
    assert state(pool, "org__model", "text", "001-1") == WRONG
    assert state(pool, "org__model", "video", "7-order-2") == RIGHT  # named as ours is
    assert state(pool, "org__model", "video", "0") == RIGHT
    row = list(pool.question_ids).index("001-1")
    assert pool.columns["class"][row] == "Counting Problem" and pool.answer[row] == 2
    assert set(pool.columns["benchmark"].names) == {
        "videomme",
        "tempcompass_multi_choice",
        "nextqa_mc_test",
    }


ROWS = [
    {
        "index": 5,
        "video": "abc",
        "duration": "short",
        "task_type": "counting",
        "candidates": "['A. one', 'B. two']",
        "question": "How many?",
        "answer": "B",
        "prediction": "The answer is B.",
    },
    {
        "index": 6,
        "video": "abc",
        "duration": "short",
        "task_type": "counting",
        "candidates": "['A. one', 'B. two']",
        "question": "And now?",
        "answer": "A",
        "prediction": "no idea",
    },
]


@pytest.mark.parametrize("suffix", ["tsv", "json", "xlsx"])
def test_vlmevalkit(tmp_path, suffix):
    path = tmp_path / "model_a" / f"model_a_Video-MME_8frame.{suffix}"
    path.parent.mkdir()
    if suffix == "tsv":
        write_table(path, ROWS, "\t")
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    else:
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in [list(ROWS[0]), *(list(row.values()) for row in ROWS)]:
            book.active.append(row)
        book.save(path)
    pool = pool_of(f"{path},condition=image")
    assert (pool.models, pool.conditions) == (("model_a",), ("frame",))
    assert pool.columns["benchmark"].names == ("Video-MME_8frame",)
    assert pool.states[0, 0].tolist() == [RIGHT, UNANSWERED]
    assert pool.answer.tolist() == [1, 0] and pool.question_ids.tolist() == ["5", "6"]


def test_plain_table(tmp_path):
    rows = [
        {"model": m, "question_id": "007", "condition": c, "correct": v, "duration_s": "130"}
        for m, c, v in (("a", "video", "1"), ("a", "image", "false"), ("b", "video", ""))
    ]
    pool = pool_of(write_table(tmp_path / "mine.csv", rows))
    assert pool.question_ids.tolist() == ["007"]  # a name, not a number
    assert pool.conditions == ("video", "frame") and pool.columns["benchmark"].names == ("mine",)
    assert pool.states[:, :, 0].tolist() == [[RIGHT, UNANSWERED], [WRONG, NOT_ASKED]]
    assert pool.columns["duration"].names == ("2-15 min",) and pool.duration_s.tolist() == [130]


def test_a_list_of_sources(tmp_path):
    write_lines(tmp_path / "p.jsonl", prediction())
    (tmp_path / "all.txt").write_text(
        f"{tmp_path}/p.jsonl,model=a\n\n{tmp_path}/p.jsonl,model=b,condition=blind\n"
    )
    pool = pool_of(f"@{tmp_path}/all.txt")
    assert pool.models == ("a", "b") and pool.conditions == ("video", "text")


def test_parquet_round_trip(tmp_path):
    pytest.importorskip("pyarrow")
    pool = simulate(60, 4, seed=1)
    save_pool(pool, tmp_path / "pool.parquet")
    back = pool_of(tmp_path / "pool.parquet")
    assert back.models == pool.models and back.conditions == pool.conditions
    for name in ("question_ids", "num_options", "answer", "states", "chosen", "duration_s"):
        np.testing.assert_array_equal(getattr(back, name), getattr(pool, name))
    for name, labels in pool.columns.items():
        assert back.columns[name].values().tolist() == labels.values().tolist()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(MalformedError, match="bad.parquet"):
        load_pool(tmp_path / "bad.parquet")


HOSTILE = {
    "two of the same": (DuplicateError, [prediction(), prediction()]),
    "two that differ": (ContradictionError, [prediction(), prediction(chosen=2)]),
    "another right option": (
        ContradictionError,
        [prediction(), prediction(condition="text", answer=0, chosen=0)],
    ),
    "another video": (ContradictionError, [prediction(), prediction(condition="text", video="w")]),
    "right but wrong": (MalformedError, [prediction(correct=False)]),
    "not all fields": (MalformedError, [{**prediction(), "x": 1}, {"benchmark": "b"}]),
    "a list": (MalformedError, [prediction(), [1]]),
}


@pytest.mark.parametrize("error, records", HOSTILE.values(), ids=HOSTILE)
def test_hostile_predictions(tmp_path, error, records):
    path = write_lines(tmp_path / "run/predictions.jsonl", *records)
    with pytest.raises(error, match=r"run|q1") as caught:
        pool_of(path)
    assert "\n" not in str(caught.value)


def test_cut_off_file(tmp_path):
    path = write_lines(tmp_path / "predictions.jsonl", prediction(), prediction("q2"))
    path.write_text(path.read_text()[:-30])
    with pytest.raises(PartialError, match="predictions.jsonl:2"):
        pool_of(path)
    path.write_text("{broken\n")
    with pytest.raises(MalformedError, match="predictions.jsonl:1"):
        pool_of(path)


def test_unfinished_run(tmp_path):
    run = tmp_path / "run"
    write_lines(run / "predictions.jsonl", prediction())
    (run / "summary.json").write_text('{"finished": false}')
    with pytest.raises(PartialError, match="not finished"):
        pool_of(run)
    (run / "predictions.jsonl").unlink()
    with pytest.raises(PartialError, match="not finished"):
        pool_of(run)


def test_a_run_with_a_limit(tmp_path):
    write_lines(tmp_path / "all.jsonl", *(prediction(f"q{n}") for n in range(10)))
    write_lines(tmp_path / "few.jsonl", *(prediction(f"q{n}") for n in range(4)))
    files = (tmp_path / "all.jsonl", tmp_path / "few.jsonl")
    with pytest.raises(PartialError, match="few was not asked 6 of 10"):
        pool_of(*files)
    pool = pool_of(*files, max_missing=0.6)
    assert pool.accuracies("video", pool.columns["benchmark"])[:, 0].tolist() == [1.0, 0.4]
    assert pool.missing() == [("few", "video", "b", 0, 6)]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "x,y\n1,2\n"),
        ("a.csv", ""),
        ("a.csv", "model,question_id,correct\nm,q,perhaps\n"),
        ("a.csv", "model,question_id,correct\n,q,1\n"),
        ("a.csv", "model,question_id,correct,prediction,answer\nm,q,1,0,2\n"),
        ("a.csv", "model,question_id\nm,q\n"),
        ("a.jsonl", '{"doc_id": 1, "target": "A", "f1": 0.4}\n'),
        ("a.jsonl", '{"doc_id": 1, "target": "A", "acc": 1, "other": 0}\n'),
        ("a.tsv", "index\tquestion\tanswer\tprediction\n1\tq\tA\n"),
        ("a.tsv", "index\tquestion\tanswer\tprediction\n1\tq\tA\tB\n"),
        ("a.xlsx", "no zip"),
        ("a.json", "[1]"),
        ("a.png", "x"),
    ],
)
def test_files_that_are_no_predictions(tmp_path, name, text):
    if name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
    (tmp_path / name).write_text(text)
    with pytest.raises(MalformedError, match="a\\.") as caught:
        pool_of(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path):
    for text in (f"{tmp_path}/none", f"{tmp_path}", f"{tmp_path}/x,format=none"):
        with pytest.raises(ValueError):
            parse_sources([text])
    (tmp_path / "a,b=c.csv").write_text("model,question_id,correct\nm,q,1\n")
    assert parse_sources([f"{tmp_path}/a,b=c.csv,model=x"])[0].model == "x"


def test_formats_say_what_they_are():
    assert all(format_.about and format_.keys for format_ in FORMATS.values())


def test_tables_of_accuracies_are_told_apart(tmp_path):
    (tmp_path / "a.csv").write_text("model,benchmark,video,image,text\nm,b,1,2,3\n")
    (tmp_path / "p.csv").write_text("model,question_id,correct\nm,q,1\n")
    assert is_aggregate(tmp_path / "a.csv") and not is_aggregate(tmp_path / "p.csv")
