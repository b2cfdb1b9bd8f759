"""Questions, scores, the runner's promises, reports, and likelihood answers of a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apollo.eval import report
from apollo.eval.answerers import Answer, OracleAnswerer, RandomAnswerer
from apollo.eval.benchmarks import Question, read_questions
from apollo.eval.runner import evaluate, read_predictions
from apollo.eval.scoring import Prediction, bootstrap_interval, score, tabulate
from apollo.media import sampling_of
from apollo.video import VideoError

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


# ---- questions ----


def test_questions_round_trip_from_file_and_folder(tmp_path):
    other = RECORD | {"question_id": "q1", "duration_s": 8, "scene": 3}  # "scene": its maker's own
    path = write_questions(tmp_path, [RECORD, other])
    questions = read_questions(path)
    assert questions == read_questions(tmp_path)
    assert questions[0].video == tmp_path / "videos/v0.mp4"
    assert questions[0].question_class == "perception"
    assert questions[1].options == tuple(RECORD["options"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "not an index"),
        ({"answer": "star"}, "'answer'"),
        ({"answer": True}, "'answer'"),
        ({"options": ["one"]}, "two or more"),
        ({"options": ["same", "same", "b", "c"]}, "the same"),
        ({"options": "abcd"}, "'options'"),
        ({"needs": "luck"}, "luck"),
        ({"question": "  "}, "empty"),
        ({"duration_s": -1}, "positive"),
        ({"duration_s": float("nan")}, "positive"),
        ({"question_id": "q0"}, "also on line 1"),
    ],
)
def test_bad_question_names_file_and_line(tmp_path, change, message):
    path = write_questions(tmp_path, [RECORD, RECORD | {"question_id": "q1"} | change])
    with pytest.raises(ValueError, match=message) as error:
        read_questions(path)
    assert f"{path}:2: " in str(error.value)


def test_other_broken_question_files(tmp_path):
    path = tmp_path / "questions.jsonl"
    with pytest.raises(ValueError, match="world make"):
        read_questions(tmp_path)
    with pytest.raises(ValueError, match="cannot read"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=":1: a question is a JSON object"):
        read_questions(path)
    write_questions(tmp_path, [{key: RECORD[key] for key in RECORD if key != "needs"}])
    with pytest.raises(ValueError, match=":1: fields are missing: needs"):
        read_questions(path)
    path.write_text('{"question_id": \n')
    with pytest.raises(ValueError, match=":1: "):
        read_questions(path)
    path.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_questions(path)


def test_a_line_separator_inside_a_text_is_no_line_end(tmp_path):
    line = json.dumps(RECORD | {"question": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "questions.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_questions(tmp_path)[0].question == "one\u2028two"


# ---- scores ----


def predict(question: Question, right: bool, condition: str = "video") -> Prediction:
    best = question.answer if right else (question.answer + 1) % 4
    return Prediction(
        question_id=question.question_id,
        video=str(question.video),
        condition=condition,
        option_scores=[float(i == best) for i in range(4)],
        prediction=best,
        correct=right,
        frame_times_s=[],
        question_class=question.question_class,
        family=question.family,
        needs=question.needs,
        status="ok",
    )


def test_unanswered_counts_as_wrong_and_is_shown():
    questions = make_questions(10)
    result = score(questions, [predict(q, True) for q in questions[:6]], "video")
    assert (result.accuracy, result.num_unanswered, result.num_questions) == (0.6, 4, 10)
    assert result.chance == 0.25


def test_predictions_of_another_condition_do_not_count():
    questions = make_questions(4)
    predictions = [predict(q, True, "video") for q in questions]
    assert score(questions, predictions, "text").num_unanswered == 4


def test_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    videos = [str(i // 4) for i in range(400)]
    inside = 0
    for trial in range(120):
        skill = np.repeat(rng.beta(3, 2, size=100), 4)  # questions of one video go together
        low, high = bootstrap_interval(list(rng.random(400) < skill), videos, seed=trial)
        inside += low <= 0.6 <= high
    assert 106 <= inside <= 119


def test_interval_is_wider_when_a_video_stands_or_falls_as_one():
    correct = [i // 10 % 2 == 0 for i in range(200)]
    together = bootstrap_interval(correct, [str(i // 10) for i in range(200)])
    apart = bootstrap_interval(correct, [str(i) for i in range(200)])
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


@pytest.mark.parametrize("right", [True, False])
def test_interval_never_claims_certainty(right):
    low, high = bootstrap_interval([right] * 8, list("aabbccdd"))
    assert high - low > 0.2
    low, high = bootstrap_interval([True, False], ["a", "a"])
    assert high - low > 0.5


def test_groups_add_up():
    questions = make_questions(60)
    predictions = [predict(q, i % 3 == 0) for i, q in enumerate(questions)]
    tables = tabulate(questions, predictions, ["video"])
    whole = tables["overall"]["all"]["video"]
    for groups in tables.values():
        scores = [group["video"] for group in groups.values()]
        assert sum(s.num_questions for s in scores) == 60
        right = sum(s.accuracy * s.num_questions for s in scores)
        assert right == pytest.approx(whole.accuracy * 60)


def test_prediction_json_round_trip():
    prediction = predict(make_questions(1)[0], True)
    record = json.loads(json.dumps(prediction.to_json()))
    assert record["class"] == "spatial"
    assert Prediction.from_json(record) == prediction


# ---- runner ----


def test_oracle_is_perfect_and_guessing_is_chance(tmp_path):
    questions = make_questions(1000)
    for answerer, low, high in ((OracleAnswerer(), 1, 1), (RandomAnswerer(), 0.2, 0.3)):
        tables = evaluate(answerer, questions, ["video", "text"], tmp_path / answerer.identity)
        assert low <= tables["overall"]["all"]["video"].accuracy <= high


def test_guesses_depend_on_the_question_id_alone():
    question = make_questions(1)[0]
    scores = RandomAnswerer().answer([question], "video")[0].option_scores
    assert scores == RandomAnswerer().answer([question, question], "text")[1].option_scores
    assert scores[0] == pytest.approx(
        0.9207766675481578
    )  # the same in every process and on every machine


class Watched(OracleAnswerer):
    """An oracle that remembers what it was asked, fails on one video, and can be killed."""

    def __init__(self, kill_at: int | None = None, unreadable: str = "") -> None:
        self.asked: list[tuple[str, str]] = []
        self.kill_at, self.unreadable = kill_at, unreadable

    def answer(self, questions, condition):
        assert len({q.video for q in questions}) == 1
        if self.kill_at is not None and len(self.asked) >= self.kill_at:
            raise KeyboardInterrupt
        if questions[0].video.name == self.unreadable and condition != "text":
            raise VideoError(f"{self.unreadable}: moov atom not found")
        self.asked += [(q.question_id, condition) for q in questions]
        return [
            replace(a, frame_times_s=[[0.0, 0.5]]) for a in super().answer(questions, condition)
        ]


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path):
    questions = make_questions(40)
    first = Watched(kill_at=16)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, questions, ["video", "text"], tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["scores"]["overall"]["all"]["video"]["num_unanswered"] == 32
    with open(tmp_path / "predictions.jsonl", "a") as file:
        file.write('{"question_id": "q3')  # a line cut off by the kill
    second = Watched()
    tables = evaluate(second, questions, ["video", "text"], tmp_path)
    assert tables["overall"]["all"]["text"].accuracy == 1
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked + second.asked) == 80
    kept = read_predictions(tmp_path / "predictions.jsonl")
    assert len({(p.question_id, p.condition) for p in kept}) == len(kept) == 80


def test_limit_can_be_raised(tmp_path):
    questions = make_questions(40)
    assert (
        evaluate(Watched(), questions, ["video"], tmp_path, limit=6)["overall"]["all"][
            "video"
        ].num_questions
        == 6
    )
    later = Watched()
    evaluate(later, questions, ["video"], tmp_path)
    assert len(later.asked) == 34


def test_an_unreadable_video_costs_its_own_questions_only(tmp_path):
    questions = make_questions(20)
    tables = evaluate(Watched(unreadable="v1.mp4"), questions, ["video", "text"], tmp_path)
    video, text = tables["overall"]["all"]["video"], tables["overall"]["all"]["text"]
    assert (video.accuracy, video.num_unanswered) == (0.8, 4)
    assert (text.accuracy, text.num_unanswered) == (1.0, 0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["unreadable_videos"] == ["v1.mp4"]
    bad = [p for p in read_predictions(tmp_path / "predictions.jsonl") if p.status != "ok"]
    assert {p.video for p in bad} == {"v1.mp4"}
    assert all("moov atom" in p.status and not p.correct and p.prediction is None for p in bad)


def test_runs_are_not_mixed(tmp_path):
    questions = make_questions(8)
    evaluate(OracleAnswerer(), questions, ["video"], tmp_path)
    with pytest.raises(ValueError, match="answerer"):
        evaluate(RandomAnswerer(), questions, ["video"], tmp_path)
    with pytest.raises(ValueError, match="questions"):
        evaluate(OracleAnswerer(), questions[:4], ["video"], tmp_path)
    with pytest.raises(ValueError, match="smell"):
        evaluate(OracleAnswerer(), questions, ["smell"], tmp_path)
    with pytest.raises(ValueError, match="limit"):
        evaluate(OracleAnswerer(), questions, ["video"], tmp_path, limit=0)


def test_a_bad_line_among_predictions_is_named(tmp_path):
    evaluate(OracleAnswerer(), make_questions(4), ["video"], tmp_path)
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"a": 1}\n' + path.read_text())
    with pytest.raises(ValueError, match="predictions.jsonl:1"):
        read_predictions(path)


# ---- report ----


def test_report_shows_hostile_text_and_runs_none_of_it(tmp_path):
    attack = "<script>alert(1)</script>\" onerror='x' {0} {title} %s"
    questions = [replace(q, family=attack, question_class=attack) for q in make_questions(8)]
    answerer = OracleAnswerer()
    evaluate(answerer, questions, ["video"], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    frames = np.zeros((1, 2, 4, 4, 3), dtype=np.uint8)
    other = report.page(
        attack,
        report.heading(attack),
        report.paragraph(attack),
        report.table([attack], [[attack], [report.mark(attack, True)]]),
        report.frame_strip(frames, np.array([[0.0, 0.5]])),
        report.curves({"a & b": ([1, 2], [3.0, 2.0])}, unit="loss"),
    )
    assert "<script" not in other
    assert other.count("data:image/png;base64,") == 3
    assert "0.50 s" in other


def test_report_needs_no_network(tmp_path):
    evaluate(OracleAnswerer(), make_questions(8), ["video"], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<link" not in page and "@import" not in page


def test_answer_of_no_scores_is_no_answer(tmp_path):
    class Silent:
        identity = "silent"

        def answer(self, questions, condition):
            return [Answer([], []) for _ in questions]

    tables = evaluate(Silent(), make_questions(4), ["video"], tmp_path)
    assert tables["overall"]["all"]["video"].num_unanswered == 4


# ---- a tiny model ----


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A random model in a folder; its LLM is sure of what it says, so that scores differ."""
    import torch
    from tiny_models import TOKENIZER, make_config, make_llm_config

    from apollo.model import ApolloForConditionalGeneration, ApolloProcessor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = make_config(text_config=make_llm_config(initializer_range=0.5))
    ApolloForConditionalGeneration(config).save_pretrained(folder)
    ApolloProcessor.from_config(config, TOKENIZER, max_clips=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def asked(plain_video) -> list[Question]:
    options = ("a ball", "the red cube", "x", "it moves to the left side")
    text = ("Which shape moves?", "What is written second?", "Which shape moves first, then?")
    return [
        replace(q, video=plain_video.path, question=text[i], options=options)
        for i, q in enumerate(make_questions(3))
    ]


def plain_scores(folder: Path, question: Question, condition: str) -> list[float]:
    """Each option by itself: whole conversation, pixels in, no cache, no padding."""
    import torch

    from apollo.chat import VideoChat
    from apollo.messages import question_prompt
    from apollo.video import load_clips

    chat = VideoChat.load(folder)
    media: list[dict] = []
    if condition == "video":
        clips = load_clips(question.video, sampling_of(chat.processor))
        media = [{"type": "video", "video": clips}]
    elif condition == "frame":
        centre = load_clips(question.video, sampling_of(chat.processor, "center"))
        media = [{"type": "image", "image": centre.frames[0, 0]}]
    prompt = {"type": "text", "text": question_prompt(question.question, question.options)}
    scores = []
    for option in question.options:
        messages = [
            {"role": "user", "content": [*media, prompt]},
            {"role": "assistant", "content": option},
        ]
        batch = chat.processor([messages], with_labels=True)
        labels = batch.pop("labels")[0]
        with torch.inference_mode():
            log_probabilities = chat.model(**batch).logits[0].log_softmax(-1)
        places = (labels != -100).nonzero()[:, 0]
        scores.append(float(log_probabilities[places - 1, labels[places]].sum()))
    return scores


@pytest.mark.parametrize("condition", ["video", "frame", "text"])
def test_scores_are_those_of_one_option_at_a_time(tiny_model, asked, condition):
    """Sharing a prefix, features and batches changes the speed, not the scores."""
    from apollo.eval.answerers import ModelAnswerer

    by_batch = [ModelAnswerer(tiny_model, size).answer(asked, condition) for size in (1, 5, 64)]
    for i, question in enumerate(asked):
        expected = plain_scores(tiny_model, question, condition)
        for answers in by_batch:
            assert answers[i].option_scores == pytest.approx(expected, abs=1e-3)
            assert np.argmax(answers[i].option_scores) == np.argmax(expected)


def test_a_lone_question_scores_as_among_others(tiny_model, asked):
    from apollo.eval.answerers import ModelAnswerer

    answerer = ModelAnswerer(tiny_model)
    together = answerer.answer(asked, "video")
    for question, answer in zip(asked, together, strict=True):
        alone = answerer.answer([question], "video")[0]
        assert alone.option_scores == pytest.approx(answer.option_scores, abs=1e-3)


def test_the_conditions_show_what_they_say(tiny_model, asked, plain_video, tmp_path):
    from apollo.eval.answerers import ModelAnswerer

    answerer = ModelAnswerer(tiny_model)
    video, frame, text = (answerer.answer(asked, c)[0] for c in ("video", "frame", "text"))
    assert np.shape(video.frame_times_s) == (4, 4)  # max_clips, frames_per_clip
    duration_s = float(plain_video.times_s[-1]) + 1 / 30
    assert frame.frame_times_s[0][0] == pytest.approx(duration_s / 2, abs=1 / 30)
    assert text.frame_times_s == []
    assert len({tuple(a.option_scores) for a in (video, frame, text)}) == 3
    moved = replace(asked[0], video=tmp_path / "gone.mp4")
    assert answerer.answer([moved], "text")[0].option_scores == pytest.approx(text.option_scores)
    with pytest.raises(VideoError):
        answerer.answer([moved], "video")


def test_identity_follows_the_weights(tiny_model, tmp_path):
    import shutil

    from apollo.chat import load_model
    from apollo.eval.answerers import ModelAnswerer

    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert ModelAnswerer(copy).identity == ModelAnswerer(tiny_model).identity
    model, _ = load_model(tiny_model)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(copy)
    assert ModelAnswerer(copy).identity != ModelAnswerer(tiny_model).identity


def test_shared_tokens_stop_before_the_first_supervised_one():
    import torch

    from apollo.eval.answerers import num_shared_tokens

    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 3, 4]])
    labels = torch.full_like(ids, -100)
    labels[:, 4:] = ids[:, 4:]
    assert num_shared_tokens(ids, labels) == 3  # 8 predicts the first supervised token
    assert num_shared_tokens(ids[:1], labels[:1]) == 3
    labels[0, 3] = 8
    assert num_shared_tokens(ids, labels) == 2
    ids[1, 1] = 1
    assert num_shared_tokens(ids, labels) == 1


def test_eval_command_end_to_end(tiny_model, asked, tmp_path, capsys):
    from apollo.cli import main

    records = [
        RECORD | {"question_id": q.question_id, "video": str(q.video), "question": q.question}
        for q in asked
    ]
    path = write_questions(tmp_path, records)
    out = tmp_path / "out"
    command = ["eval", str(tiny_model), "--questions", str(path), "--out", str(out)]
    assert main([*command, "--condition", "video", "text"]) == 0
    printed = capsys.readouterr().out
    assert "perception" in printed and "video" in printed and "text" in printed
    assert len(read_predictions(out / "predictions.jsonl")) == 6
    assert main(["eval", "random", "--questions", str(path), "--out", str(out)]) == 2
    assert "another --out" in capsys.readouterr().err
    assert main(["eval", "oracle", "--questions", str(tmp_path / "no"), "--out", str(out)]) == 2
