"""Every accepted form becomes the one form; everything else is refused with its place."""

import base64

import pytest

from apollo.messages import MessageError, map_media, media_parts, normalize, question_prompt

VIDEO = {"type": "video", "video": "a.mp4"}


def one(part):
    return normalize([{"role": "user", "content": [part]}])[0]["content"][0]


def test_strings_become_parts():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
    ]
    result = normalize(messages)
    assert [message["content"][0]["text"] for message in result] == ["Be brief.", "Hi", "Hello"]
    assert normalize(result) == result
    assert messages[1]["content"] == "Hi"  # the caller's own are left alone


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "path": "a.mp4"},
        {"type": "video", "url": "a.mp4"},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "video_url", "video_url": "a.mp4"},
    ],
)
def test_forms_of_media(part):
    assert one(part) == VIDEO
    as_image = {
        (key.replace("video", "image")): (
            value.replace("video", "image") if isinstance(value, str) else value
        )
        for key, value in part.items()
    }
    assert one(as_image) == {"type": "image", "image": "a.mp4"}


def test_urls_with_a_place_or_content():
    assert one({"type": "image", "url": "file:///tmp/a%20b.png"})["image"] == "/tmp/a b.png"
    data = base64.b64encode(b"\x00picture").decode()
    assert one({"type": "image", "url": f"data:image/png;base64,{data}"})["image"] == b"\x00picture"
    for url in ("data:image/png;base64,???", "data:text/plain,hello", "data:"):
        with pytest.raises(MessageError, match=r"messages\[0\].content\[0\].*data URL"):
            one({"type": "image", "url": url})
    assert one({"type": "video", "url": "https://x.org/a.mp4"})["video"] == "https://x.org/a.mp4"


def test_loaded_sources_pass_untouched():
    for source in (b"bytes", object(), [1, 2]):
        assert one({"type": "video", "video": source})["video"] is source


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        ({"role": "user", "content": "Hi"}, "non-empty list"),
        ([{"role": "user"}], r"messages\[0\]"),
        (["Hi"], r"messages\[0\]"),
        ([{"role": "robot", "content": "Hi"}], "system, user, assistant"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], r"messages\[1\]"),
        ([{"role": "user", "content": []}], r"messages\[0\]"),
        ([{"role": "user", "content": None}], r"messages\[0\]"),
        ([{"role": "user", "content": ["Hi"]}], r"content\[0\]"),
        ([{"role": "user", "content": [VIDEO, {"type": "audio", "audio": "a"}]}], r"content\[1\]"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "string"),
        ([{"role": "user", "content": [{"type": "text"}]}], "string"),
        ([{"role": "user", "content": [{"type": "video"}]}], "exactly one source"),
        ([{"role": "user", "content": [{**VIDEO, "path": "b.mp4"}]}], "exactly one source"),
        ([{"role": "assistant", "content": [VIDEO]}], "only the user"),
        ([{"role": "system", "content": [VIDEO]}], "only the user"),
    ],
)
def test_refused(messages, place):
    with pytest.raises(MessageError, match=place):
        normalize(messages)


def test_media_in_order_and_replaced():
    messages = normalize(
        [
            {"role": "user", "content": [VIDEO, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": [{"type": "image", "image": "b.png"}, VIDEO]},
        ]
    )
    expected = [("video", "a.mp4"), ("image", "b.png"), ("video", "a.mp4")]
    assert media_parts(messages) == expected
    calls = []
    loaded = map_media(messages, lambda kind, source: calls.append((kind, source)) or len(calls))
    assert calls == expected
    assert media_parts(loaded) == [("video", 1), ("image", 2), ("video", 3)]
    assert media_parts(messages) == expected
    assert loaded[1] == messages[1]


def test_question_prompt():
    assert question_prompt("Why?", ["x", "y"]) == "Why?\nA. x\nB. y"
    assert question_prompt("Why?") == "Why?"
    assert question_prompt("Why?", [str(n) for n in range(26)]).endswith("\nZ. 25")


@pytest.mark.parametrize(
    ("question", "options"),
    [("", ()), (" \n", ("a", "b")), ("Why?", ("a",)), ("Why?", ("a", " ")), ("Why?", ("a", "a"))]
    + [("Why?", tuple(map(str, range(27))))],
)
def test_question_prompt_refuses(question, options):
    with pytest.raises(MessageError):
        question_prompt(question, options)
