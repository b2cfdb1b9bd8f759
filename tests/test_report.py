"""The pages: hostile text, no network, what went wrong, and the frames that a model saw."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import NumberedVideo, read_number
from PIL import Image
from test_scoring import Said, make_questions, predict

from apollo.eval import report
from apollo.eval.questions import Question
from apollo.eval.scoring import Prediction, Score, tabulate

ATTACK = "<script>alert(1)</script>\" onerror='x' {0} {title} %s"


def draw(
    questions: list[Question],
    predictions: list[Prediction],
    conditions: tuple[str, ...] = ("video",),
    manifest: dict | None = None,
) -> str:
    tables = tabulate(questions, predictions, conditions)
    return report.run_page(questions, predictions, tables, manifest or {"answerer": "tiny"})


class Checker(HTMLParser):
    """Collects what a page is made of, and fails where tags do not match."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page: str) -> list[tuple[str, dict]]:
    """Check that a page is whole, needs nothing from elsewhere, and can be read aloud."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    names = [tag for tag, _ in checker.tags]
    assert not {"script", "link", "iframe"} & set(names)
    assert "http" not in page and "@import" not in page
    assert names.count("h1") == names.count("main") == 1
    assert ("html", {"lang": "en"}) in checker.tags
    for tag, attributes in checker.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["alt"] and attributes["src"].startswith("data:image/")
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if attributes.get("role") == "region":  # scrolls, so the keyboard must reach it
            assert attributes["aria-label"] and attributes["tabindex"] == "0"
    return checker.tags


def pictures(page: str) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    ]


# ---- parts ----


def test_parts_show_hostile_text_and_run_none_of_it():
    frames = np.zeros((1, 2, 4, 4, 3), dtype=np.uint8)
    page = report.page(
        ATTACK,
        report.heading(ATTACK),
        report.paragraph(ATTACK),
        report.details(ATTACK, ATTACK),
        report.table([ATTACK], [[ATTACK, ATTACK], [report.mark(ATTACK, True)]], ATTACK),
        report.frame_strip(frames, np.array([[0.0, 0.5]])),
        report.curves({"a & b": ([1, 2], [3.0, 2.0])}, unit="loss"),
    )
    check(page)
    assert page.count("data:image/png;base64,") == 3
    assert "0.50 s" in page and "&lt;script&gt;alert(1)" in page


def test_a_strip_of_many_clips_shows_some_and_says_so():
    frames = np.zeros((20, 2, 4, 4, 3), dtype=np.uint8)
    strip = report.frame_strip(frames, np.arange(40.0).reshape(20, 2))
    assert strip.count("<img") == 2 * report.MAX_CLIPS_SHOWN
    assert "8 of 20 clips" in strip and "39.00 s" in strip


def test_bars_stay_within_their_track():
    score = Score(10, 0, accuracy=1.0, low=0.7, high=1.0, chance=0.25)
    for bar in (
        report.score_bar(score),
        report.difference_bar(-1.0, -1.0, -0.2),
        report.difference_bar(1.0, 0.2, 1.0),
    ):
        for place in re.findall(r'style="([^"]+)"', bar):
            sizes = [float(size) for size in re.findall(r"([-\d.]+)%", place)]
            assert min(sizes) >= 0 and sum(sizes) <= 100


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        ([], []),
        ([0.0, 1.0], [0, 1]),
        ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]),
        ([-1000.0, -1000.0], [0.5, 0.5]),
        ([-0.1, -5000.0], [1, 0]),
        ([float(np.log(0.6)), float(np.log(0.2)), float(np.log(0.2))], [0.6, 0.2, 0.2]),
        ([0.0, 0.0], [0.5, 0.5]),
    ],
)
def test_shares_add_up_to_one(scores, shares):
    assert report.shares_of(scores) == pytest.approx(shares)


# ---- the page of a run ----


def seen(question: Question, right: bool, times_s: list[list[float]], **changes) -> Prediction:
    prediction = replace(predict(question, right), frame_times_s=times_s)
    return replace(prediction, option_scores=[-1.0, -2.0, -3.0, -4.0], **changes)


def test_the_frames_shown_are_those_the_model_saw(plain_video: NumberedVideo):
    question = replace(make_questions(1)[0], video=plain_video.path)
    times_s = [[1.0, 1.5, 2.0, 2.5], [9.0, 9.0, 9.0, 9.0]]  # the second is one frame, repeated
    page = draw([question], [seen(question, True, times_s)])
    check(page)
    expected = [plain_video.number_at(time_s) for time_s in (1.0, 1.5, 2.0, 2.5, 9.0)]
    assert [read_number(picture) for picture in pictures(page)] == expected
    for time_s in ("1.00 s", "2.50 s", "9.00 s"):
        assert f"frame at {time_s}" in page
    assert "evenly chosen" not in page


def test_of_many_frames_some_are_shown(plain_video: NumberedVideo):
    question = replace(make_questions(1)[0], video=plain_video.path)
    times_s = [[i / 4 for i in range(44)]]
    page = draw([question], [seen(question, True, times_s)])
    assert len(pictures(page)) == report.MAX_FRAMES_SHOWN
    assert "8 of 44 frames, evenly chosen" in page and "frame at 10.75 s" in page
    shuffled = seen(question, True, times_s, condition="shuffled")
    assert "in another order" in draw([question], [shuffled], ("shuffled",))


def test_large_frames_are_made_small(tmp_path):
    from conftest import write_numbered_video

    video = write_numbered_video(tmp_path / "large.mp4", range(30), size=(640, 360))
    question = replace(make_questions(1)[0], video=video.path)
    page = draw([question], [seen(question, True, [[0.5]])])
    assert pictures(page)[0].shape[:2] == (120, 68)  # fits into 160 x 120, upright


def test_a_video_that_cannot_be_read_now_is_said(plain_video, tmp_path):
    questions = make_questions(8)
    questions[0] = replace(questions[0], video=plain_video.path)
    page = draw(questions, [seen(q, True, [[0.5]]) for q in questions])
    assert len(pictures(page)) == 1
    assert page.count("The video cannot be read now") == 7
    assert "/data/" not in page and "v1.mp4" in page  # its name, not its place on this machine
    nonsense = [seen(questions[0], True, [[-1.0, 2.0]])]
    assert "The video cannot be read now" in draw(questions[:1], nonsense)


def test_what_has_no_answer_is_counted_and_named():
    questions = make_questions(12)
    predictions = [predict(q, True) for q in questions[:4]]
    predictions += [
        Prediction.of(q, "video", Said(None, "unreadable: moov atom not found"))
        for q in questions[4:8]
    ]
    predictions.append(Prediction.of(questions[8], "video", Said(None, "unparsable")))
    page = draw(questions, predictions)
    check(page)
    assert "they count as wrong" in page
    assert "1 video could not be read" in page
    assert "questions / v1.mp4: moov atom not found" in page
    assert "not asked" in page and "unparsable" in page
    whole = draw(questions, [predict(q, False) for q in questions])
    assert "Every question was answered." in whole


def test_examples_are_of_every_class_right_and_wrong():
    questions = [
        replace(q, question_class=f"class {i % 4}") for i, q in enumerate(make_questions(400))
    ]
    predictions = [predict(q, i % 10 == 0 or i % 7 == 0) for i, q in enumerate(questions)]
    answers = {(p.benchmark, p.question_id): {"video": p} for p in predictions}
    chosen = report.pick_examples(questions, answers, "video")
    assert len(chosen) == len(set(chosen)) == report.NUM_EXAMPLES
    assert chosen == report.pick_examples(questions[::-1], answers, "video")
    kinds = [
        (q.question_class, answers[q.benchmark, q.question_id]["video"].correct) for q in chosen
    ]
    assert {kinds.count(kind) for kind in set(kinds)} == {3} and len(set(kinds)) == 8
    assert len(report.pick_examples(questions[:5], answers, "video")) == 5
    assert report.pick_examples(questions, answers, "text") == []


def test_more_classes_than_room_still_show_right_and_wrong():
    questions = [
        replace(q, question_class=f"class {i % 60:02}") for i, q in enumerate(make_questions(600))
    ]
    answers = {
        (q.benchmark, q.question_id): {"video": predict(q, i // 60 % 2 == 0)}
        for i, q in enumerate(questions)
    }
    chosen = report.pick_examples(questions, answers, "video")
    right = [answers[q.benchmark, q.question_id]["video"].correct for q in chosen]
    assert len(chosen) == report.NUM_EXAMPLES and 8 <= sum(right) <= 16


def test_every_condition_is_told(plain_video):
    question = replace(make_questions(1)[0], video=plain_video.path)
    blind = replace(predict(question, False), condition="text", text="It is b. " * 200)
    blind = replace(blind, frame_times_s=[])
    page = draw([question], [blind, seen(question, True, [[1.0]])], ("video", "text"))
    assert "✓ video" in page and "✗ text" in page and "✓ chosen" in page
    assert len(pictures(page)) == 1
    written = draw([question], [blind], ("text",))
    assert "No frames were shown." in written and "✗ chosen" in written
    assert written.count("It is b.") < 100 and "It is b. It is b" in written


def test_hostile_questions_are_shown_and_not_run():
    questions = [
        replace(q, question=ATTACK, options=(ATTACK, "b", "c", "d"), family=ATTACK, source=ATTACK)
        for q in make_questions(4)
    ]
    predictions = [
        replace(predict(q, False), text=ATTACK, status=f"unreadable: {ATTACK}") for q in questions
    ]
    page = draw(questions, predictions, manifest={"answerer": ATTACK})
    check(page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_a_large_run_makes_a_small_page(tmp_path):
    """All examples of noise in motion, which no codec makes small."""
    from conftest import write_numbered_video

    video = write_numbered_video(
        tmp_path / "noise.mp4", range(12), noise=True, size=(120, 160), options={"qp": "5"}
    )
    questions = [
        replace(q, video=video.path, family=f"family {i % 20}")
        for i, q in enumerate(make_questions(400))
    ]
    times_s = [[i / 30 for i in range(12)]]
    page = draw(questions, [seen(q, i % 2 == 0, times_s) for i, q in enumerate(questions)])
    assert len(page.encode()) < 3_000_000
    assert len(pictures(page)) > 8


def test_a_page_of_the_same_run_is_the_same(plain_video):
    questions = [replace(q, video=plain_video.path) for q in make_questions(6)]
    predictions = [seen(q, i % 2 == 0, [[1.0, 2.0]]) for i, q in enumerate(questions)]
    page = draw(questions, predictions)
    assert page == draw(questions[::-1], predictions[::-1])
    assert json.dumps("tiny") in page.replace("&#34;", '"')
    assert Path(plain_video.path).parent.as_posix() not in page
