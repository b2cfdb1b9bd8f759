"""Predictions on disk, accuracies with their intervals, groups, and what has no answer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apollo.eval.questions import Question
from apollo.eval.scoring import (
    NOT_GIVEN,
    Prediction,
    accuracy_interval,
    duration_group,
    groups_of,
    read_predictions,
    resampled_ratios,
    tabulate,
)


class Said:
    """An answer as `answerers.Answer` has it; that module's own class is not needed for scoring."""

    def __init__(self, prediction: int | None, status: str = "ok") -> None:
        self.prediction, self.status = prediction, status
        self.option_scores: list[float] = []
        self.text = ""
        self.frame_times_s = [[0.0, 0.5]]
        self.num_prompt_tokens = 12
        self.num_answer_tokens = None


def make_questions(num: int, per_video: int = 4, **changes) -> list[Question]:
    return [
        Question(
            question_id=f"q{i}",
            video=Path(f"/data/v{i // per_video}.mp4"),
            question="Which?",
            options=("a", "b", "c", "d"),
            answer=i % 4,
            question_class=("spatial", "reasoning")[i % 2],
            family=f"family {i % 5}",
            needs=("frames", "frame", "text")[i % 3],
            duration_s=(60.0, 600.0, 3000.0)[i % 3],
            **changes,
        )
        for i in range(num)
    ]


def predict(question: Question, right: bool, condition: str = "video") -> Prediction:
    wrong = (question.answer + 1) % len(question.options)
    return Prediction.of(question, condition, Said(question.answer if right else wrong))


def overall(questions, predictions, condition="video"):
    return tabulate(questions, predictions, [condition])["overall"]["all"][condition]


# ---- predictions ----

FIELDS = (
    "benchmark question_id video condition class family needs duration_s duration_group source "
    "num_options answer prediction correct status option_scores text frame_times_s "
    "num_prompt_tokens num_answer_tokens"
).split()


def test_prediction_round_trip_with_its_fields_in_order(tmp_path):
    questions = make_questions(8)
    predictions = [predict(q, i % 2 == 0) for i, q in enumerate(questions)]
    predictions[3] = Prediction.of(questions[3], "video", Said(None, "unparsable"))
    assert list(predictions[0].to_json()) == FIELDS
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(p.to_json()) + "\n" for p in predictions))
    assert read_predictions(path) == predictions
    assert not predictions[3].correct
    assert predictions[0].video == "v0.mp4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": None}, "missing: class"),
        ({"status": None, "text": None}, "missing: status, text"),
        ({"correct": "yes"}, "'correct' is yes"),
        ({"correct": False}, "'correct' is False, but prediction is 1 and answer is 1"),
        ({"prediction": None}, "'correct' is True, but prediction is None"),
    ],
)
def test_a_bad_prediction_names_file_and_record(tmp_path, change, message):
    good = predict(make_questions(2)[1], True).to_json()
    bad = {name: value for name, value in (good | change).items() if value is not None}
    if change == {"prediction": None}:
        bad = good | change
    else:
        bad |= {"num_answer_tokens": None}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(good | {"more": 1}) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_predictions(path)
    assert f"{path}: record 2" in str(error.value)


# ---- accuracies ----


def test_unanswered_counts_as_wrong_and_is_shown():
    questions = make_questions(10)
    predictions = [predict(q, True) for q in questions[:6]]
    predictions.append(Prediction.of(questions[6], "video", Said(None, "unparsable")))
    predictions.append(Prediction.of(questions[7], "video", Said(None, "unreadable: moov atom")))
    predictions.append(Prediction.of(questions[8], "video", Said(None, "unreadable: cut off")))
    result = overall(questions, predictions)
    assert (result.accuracy, result.num_unanswered, result.num_questions) == (0.6, 4, 10)
    assert result.statuses == {"ok": 6, "unreadable": 2, "not asked": 1, "unparsable": 1}
    assert result.chance == 0.25


def test_predictions_of_others_do_not_count():
    questions = make_questions(4)
    predictions = [predict(q, True, "video") for q in questions]
    assert overall(questions, predictions, "text").num_unanswered == 4
    assert overall(questions[:2], predictions).num_questions == 2
    twin = replace(questions[0], benchmark="another")  # the same id elsewhere
    scores = tabulate([twin, *questions], predictions, ["video"])["benchmark"]
    assert [scores[name]["video"].accuracy for name in ("another", "questions")] == [0, 1]


def test_nothing_is_counted_twice():
    questions = make_questions(4)
    predictions = [predict(q, True) for q in questions]
    with pytest.raises(ValueError, match="two predictions for questions / q1 / video"):
        tabulate(questions, [*predictions, predictions[1]], ["video"])
    with pytest.raises(ValueError, match="1 questions have the id"):
        tabulate([*questions, questions[0]], predictions, ["video"])
    with pytest.raises(ValueError, match="without questions"):
        tabulate([], predictions, ["video"])


def test_chance_follows_the_number_of_options():
    few = [replace(q, options=("yes", "no"), answer=0) for q in make_questions(2)]
    many = [replace(q, question_id=f"m{q.question_id}") for q in make_questions(2)]
    assert overall(few + many, []).chance == pytest.approx((0.5 + 0.25) / 2)


def test_groups_add_up_in_every_grouping_with_values():
    questions = make_questions(60)
    predictions = [predict(q, i % 3 == 0) for i, q in enumerate(questions)]
    tables = tabulate(questions, predictions, ["video"])
    assert list(tables) == ["overall", "benchmark", "class", "family", "needs", "duration"]
    whole = tables["overall"]["all"]["video"]
    for groups in tables.values():
        scores = [group["video"] for group in groups.values()]
        assert sum(s.num_questions for s in scores) == 60
        right = sum(s.accuracy * s.num_questions for s in scores)
        assert right == pytest.approx(whole.accuracy * 60)
    assert list(tables["duration"]) == ["< 2 min", "2-15 min", "> 15 min"]


def test_questions_without_a_value_come_last_under_a_name():
    questions = make_questions(8)
    questions[2] = replace(questions[2], family="", source="film")
    tables = tabulate(questions, [], ["video"])
    assert list(tables["family"])[-1] == NOT_GIVEN
    assert list(tables["source"]) == ["film", NOT_GIVEN]
    assert tables["source"]["film"]["video"].num_questions == 1


def test_durations_are_grouped_as_the_benchmark_does_else_by_length():
    question = make_questions(1)[0]
    lengths = {119.9: "< 2 min", 120.0: "2-15 min", 900.0: "2-15 min", 900.1: "> 15 min"}
    for duration_s, group in lengths.items():
        assert duration_group(replace(question, duration_s=duration_s)) == group
    assert duration_group(replace(question, duration_group="60")) == "60"
    assert duration_group(replace(question, duration_s=None)) == ""


def test_groups_come_in_natural_order():
    names = ["3600", "15", "600", "60", "", "60"]
    groups = groups_of(names)
    assert list(groups) == ["15", "60", "600", "3600", NOT_GIVEN]
    assert groups["60"].tolist() == [3, 5]
    assert list(groups_of(["medium", "long", "short"])) == ["short", "medium", "long"]


def test_mean_over_families_weighs_them_alike():
    questions = [
        replace(q, family="rare" if i == 0 else "common") for i, q in enumerate(make_questions(11))
    ]
    predictions = [predict(q, q.family == "rare") for q in questions]
    tables = tabulate(questions, predictions, ["video"])
    assert tables["overall"]["all"]["video"].family_mean == pytest.approx(0.5)
    assert tables["benchmark"]["questions"]["video"].family_mean == pytest.approx(0.5)
    assert tables["family"]["rare"]["video"].family_mean is None
    plain = [replace(q, family="") for q in questions]
    assert overall(plain, predictions).family_mean is None


def test_order_changes_nothing():
    rng = np.random.default_rng(0)
    questions = make_questions(200, per_video=3)
    predictions = [predict(q, bool(rng.random() < 0.6)) for q in questions]
    tables = tabulate(questions, predictions, ["video"])
    shuffled_questions = [questions[i] for i in rng.permutation(200)]
    shuffled_predictions = [predictions[i] for i in rng.permutation(200)]
    again = tabulate(shuffled_questions, shuffled_predictions, ["video"])
    assert json.dumps({k: list(v) for k, v in tables.items()}) == json.dumps(
        {k: list(v) for k, v in again.items()}
    )
    for grouping, groups in tables.items():
        for name, scores in groups.items():
            one, other = scores["video"], again[grouping][name]["video"]
            assert (one.low, one.high) == (other.low, other.high)
            assert one.accuracy == other.accuracy


# ---- intervals ----


def test_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(100), 4)
    inside = 0
    for trial in range(120):
        skill = np.repeat(rng.beta(3, 2, size=100), 4)  # questions of one video go together
        low, high = accuracy_interval(rng.random(400) < skill, videos, seed=trial)
        inside += low <= 0.6 <= high
    assert 106 <= inside <= 119


def test_interval_is_that_of_drawing_videos_one_by_one():
    """Drawing kinds of videos instead of videos changes the speed, not the distribution."""
    rng = np.random.default_rng(1)
    asked = rng.integers(1, 9, size=60)
    right = rng.binomial(asked, 0.6)
    drawn = rng.integers(0, 60, size=(20000, 60))
    plain = right[drawn].sum(axis=1) / asked[drawn].sum(axis=1)
    ours = resampled_ratios(right, asked)
    for percentile in (2.5, 25, 50, 75, 97.5):
        assert np.percentile(ours, percentile) == pytest.approx(
            np.percentile(plain, percentile), abs=0.01
        )


def test_interval_is_wider_when_a_video_stands_or_falls_as_one():
    correct = np.arange(200) // 10 % 2 == 0
    together = accuracy_interval(correct, np.arange(200) // 10)
    apart = accuracy_interval(correct, np.arange(200))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])


@pytest.mark.parametrize("right", [True, False])
def test_interval_never_claims_certainty(right):
    low, high = accuracy_interval(np.full(8, right), np.arange(8) // 2)
    assert high - low > 0.2 and low <= right <= high
    low, high = accuracy_interval(np.array([True, False]), np.zeros(2, dtype=int))
    assert high - low > 0.5
    low, high = accuracy_interval(np.arange(20) % 2 == 0, np.arange(20) // 2)  # half of each video
    assert high - low > 0.2
