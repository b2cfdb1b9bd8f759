"""Records, mixtures, batches and the feature cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apollo.data.formats import RecordError
from apollo.data.mixture import Mixture, Source, interleave
from apollo.data.readers import read_records


def record(id: str = "a", type: str = "text", media: tuple = (), **changes) -> dict:
    content = [{"type": kind, kind: path} for kind, path in media]
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A ball."},
    ]
    return {"id": id, "type": type, "messages": messages} | changes


def write(path: Path, *lines: dict | str) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return path


# ---- records


def test_records_are_normal_and_their_media_lie_beside_the_file(tmp_path):
    path = write(
        tmp_path / "records.jsonl",
        record("a"),
        record("b", "image", [("image", "pictures/one.png")]),
        record("c", "multi_image", [("image", "1.png"), ("image", "/abs/2.png")]),
        record("d", "video", [("video", "v.mp4"), ("image", "1.png")]),
    )
    text, image, multi_image, video = read_records(path)
    assert text.messages[1]["content"] == [{"type": "text", "text": "A ball."}]
    assert image.media == [("image", tmp_path / "pictures/one.png")]
    assert multi_image.media[1] == ("image", Path("/abs/2.png"))
    assert [kind for kind, _ in video.media] == ["video", "image"]
    assert video.where == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "must be an object with keys"),
        (record() | {"weight": 2}, "no key 'weight'; keys: id, type, messages"),
        (record() | {"tpye": "text"}, "did you mean 'type'"),
        (record(id=3), "id must be a string"),
        (record(id="first"), r"was used in .*records\.jsonl:1"),
        (record(type="audio"), "must be one of text, image, multi_image, video"),
        (record(type="video"), "0 images and 0 videos"),
        (record(type="image", media=[("image", "a"), ("image", "b")]), "2 images"),
        (record(type="text", media=[("video", "a")]), "1 videos"),
        (record(type="image", media=[("image", ["a.png"])]), "path of a file, a URL or bytes"),
        (record(type="image", media=[("image", "a\0.png")]), "path of a file, a URL or bytes"),
        (record(messages=[]), "non-empty list"),
        (record(messages=[{"role": "user", "content": "hello"}]), "no assistant message"),
        (record(messages=[{"role": "oracle", "content": "hello"}]), "role must be"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "records.jsonl", record("first"), line)
    with pytest.raises(RecordError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_id_and_type_may_be_left_out(tmp_path):
    plain = {"messages": record()["messages"]}
    shown = {"messages": record(media=[("image", "1.png"), ("image", "2.png")])["messages"]}
    one, two = read_records(write(tmp_path / "records.jsonl", plain, shown))
    assert (one.id, one.type) == ("1", "text") and (two.id, two.type) == ("2", "multi_image")


def test_absent_empty_and_binary_files_are_refused(tmp_path):
    with pytest.raises(RecordError, match="no training file"):
        read_records(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordError, match="holds no record"):
        read_records(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x01\n")
    with pytest.raises(RecordError, match="1: .utf-8. codec"):
        read_records(tmp_path / "binary.jsonl")


# ---- mixtures


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [14.4, 33.0, 16.6, 36.0], [0.9, 0.05, 0.05], [1e-3, 1], [1 / 7] * 7, [5, 3, 2]],
)
def test_each_source_is_drawn_its_share_to_within_one(weights):
    shares = np.array(weights) / sum(weights)
    order = interleave(shares, 3000)
    drawn = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    owed = np.arange(1, 3001)[:, None] * shares
    assert np.abs(drawn - owed).max() <= 1


def test_the_bound_holds_for_many_uneven_sources():
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares = rng.dirichlet(np.full(12, 0.3)).clip(1e-4)
        shares /= shares.sum()
        drawn = np.cumsum(interleave(shares, 400)[:, None] == np.arange(12), axis=0)
        assert np.abs(drawn - np.arange(1, 401)[:, None] * shares).max() <= 1


def test_a_pass_visits_every_record_once_and_passes_differ():
    mixture = Mixture([7, 40], [1, 1], 100, seed=3)
    draws = [place for source, place in (mixture[i] for i in range(100)) if source == 0]
    passes = [draws[start : start + 7] for start in range(0, 49, 7)]
    assert all(sorted(one_pass) == list(range(7)) for one_pass in passes)
    assert len({tuple(one_pass) for one_pass in passes}) > 1
    assert mixture.counts() == (50, 50)
    assert sum(mixture.counts(33)) == 33


def test_a_position_is_a_pure_function_of_the_seed():
    positions = list(range(200))
    one = Mixture([9, 30, 4], [3, 2, 1], 200, seed=5)
    forwards = [one[i] for i in positions]
    backwards = [one[i] for i in reversed(positions)][::-1]
    longer = Mixture([9, 30, 4], [3, 2, 1], 500, seed=5)
    other = Mixture([9, 30, 4], [3, 2, 1], 200, seed=6)
    assert forwards == backwards == [longer[i] for i in positions]
    assert forwards != [other[i] for i in positions]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_must_be_a_positive_number(weight):
    with pytest.raises(ValueError, match="weight must be positive"):
        Source(path=Path("a.jsonl"), weight=weight)
