"""Mixture files, what they draw, and `apollo data check`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import make_config, make_processor

from apollo import cli
from apollo.config import ConfigError
from apollo.data.check import check_mixture
from apollo.data.formats import RECORD_TYPES, RecordError
from apollo.data.mixture import Mixture, Source, chosen_rows, read_mixture
from apollo.data.readers import count_types, open_sources

MIXTURES = Path(__file__).parent.parent / "mixtures"


def record(id: str, type: str, *media: tuple[str, str], answer: str = "A ball.") -> dict:
    content = [{"type": kind, kind: path} for kind, path in media]
    messages = [
        {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": f"{answer} {id}"},
    ]
    return {"id": id, "type": type, "messages": messages}


def write(path: Path, *rows: dict | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def data(tmp_path, plain_video) -> Path:
    """Two records of text, one of an image and one of a video, in three files."""
    (tmp_path / "v.mp4").write_bytes(plain_video.path.read_bytes())
    Image.new("RGB", (32, 24)).save(tmp_path / "1.png")
    write(tmp_path / "text.jsonl", record("a", "text"), record("b", "text"))
    write(tmp_path / "image.jsonl", record("c", "image", ("image", "1.png")))
    write(tmp_path / "video.jsonl", record("d", "video", ("video", "v.mp4")))
    (tmp_path / "mixture.yaml").write_text(
        """
        shares: {text: 1, image: 1, video: 2}
        sources:
          - {path: text.jsonl, type: text, hub: nowhere/text}
          - {path: image.jsonl, type: image}
          - {path: video.jsonl, type: video}
        """
    )
    return tmp_path


# ---- mixture files


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("align", {"image": 0.5, "video": 0.5}),
        ("vision", {"video": 1.0}),
        ("sft", {"text": 0.144, "image": 0.33, "multi_image": 0.166, "video": 0.36}),
    ],
)
def test_our_mixtures_have_the_shares_of_the_paper(name, shares):
    sources = read_mixture(MIXTURES / f"{name}.yaml")
    weights: Counter[str] = Counter()
    for source in sources:
        weights[source.type] += source.weight
        assert source.hub and source.size and source.licence and source.stands_for
        assert Path(source.path).parts[len((MIXTURES.parent).parts) + 1] == "..", source.path
    total = sum(weights.values())
    assert {type_: weight / total for type_, weight in weights.items()} == pytest.approx(shares)
    drawn = Mixture([10] * len(sources), [s.weight for s in sources], 1000, 0).counts()
    for type_, share in shares.items():
        of_type = sum(c for c, s in zip(drawn, sources, strict=True) if s.type == type_)
        assert abs(of_type - 1000 * share) <= len(sources)


def test_every_mixture_is_tested_and_described():
    names = {path.stem for path in MIXTURES.glob("*.yaml")}
    assert names == {"align", "vision", "sft"}
    readme = (MIXTURES / "README.md").read_text()
    for name in names:
        assert f"`{name}.yaml`" in readme
        for source in read_mixture(MIXTURES / f"{name}.yaml"):
            assert f"hf download {source.hub.split()[0]} " in readme


def test_shares_are_spread_by_the_weights_inside_a_type(tmp_path):
    (tmp_path / "m.yaml").write_text(
        """
        data_dir: data
        shares: {text: 10, video: 90}
        sources:
          - {path: a.jsonl, type: text}
          - {path: b.jsonl, type: video, weight: 1}
          - {path: "s3://bucket/c.jsonl", type: video, weight: 2, media_dir: films}
        """
    )
    a, b, c = read_mixture(tmp_path / "m.yaml")
    assert (a.weight, b.weight, c.weight) == pytest.approx((10, 30, 60))
    assert a.path == str(tmp_path / "data/a.jsonl") and c.path == "s3://bucket/c.jsonl"
    assert (b.media_dir, c.media_dir) == ("", str(tmp_path / "data/films"))
    assert read_mixture(tmp_path / "m.yaml", Path("/other"))[0].path == "/other/a.jsonl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sorces: []", "did you mean sources"),
        ("sources: [{path: a, wieght: 2}]", r"sources\.0\.wieght .* did you mean weight"),
        ("sources: [{weight: 2}]", "sources.0.path is missing"),
        ("sources: []", "no sources"),
        ("sources: [{path: a, type: audio}]", "type must be one of"),
        ("sources: [{path: a, limit: some}]", "limit must be all, first:N"),
        ("sources: [{path: a, weight: 0}]", "weight must be positive"),
        ("sources: [{path: a}]\nshares: {text: 1}", "shares has no 'untyped'; it has: text"),
        ("sources: [{path: a, type: text}]\nshares: {text: 1, video: 1}", "shares.video: must"),
        ("sources: [{path: a, type: text}]\nshares: {text: -1}", "shares.text: must"),
        ("datasets: [{json_path: a, sampling_stategy: all}]", "did you mean sampling_strategy"),
        ("datasets: [{json_path: a, modality: sound}]", "type must be one of"),
        ("[1, 2]", "a mapping"),
        ("sources: [", "m.yaml"),
    ],
)
def test_a_mistake_in_a_mixture_file_is_named(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_mixture(tmp_path / "m.yaml")
    assert "m.yaml" in str(error.value)


def test_mixtures_of_llava_and_smolvlm2_weigh_by_records(data):
    (data / "llava.yaml").write_text(
        """
        datasets:
          - {json_path: text.jsonl, sampling_strategy: "first:50%", modality: text, source: x}
          - {json_path: many.jsonl, sampling_strategy: all, modality: multi-image, category: y}
        """
    )
    two = [("image", "1.png"), ("image", "1.png")]
    write(data / "many.jsonl", *[record(str(i), "multi_image", *two) for i in range(5)])
    text, many = open_sources([Source(path="llava.yaml", weight=None)], data)
    assert (text.weight, many.weight) == (1, 5) and len(text.records) == 1
    inner = open_sources([Source(path="llava.yaml", weight=3), Source(path="text.jsonl")], data)
    assert [one.weight for one in inner] == pytest.approx([0.5, 2.5, 1])


@pytest.mark.parametrize(
    ("limit", "rows"),
    [
        ("all", None),
        ("first:3", [0, 1, 2]),
        ("first:25%", [0, 1, 2]),
        ("first:1%", [0]),
        ("end:2", [8, 9]),
        ("end:20%", [8, 9]),
        ("first:99", None),
        ("random:100%", None),
    ],
)
def test_limits_are_those_of_llava(limit, rows):
    chosen = chosen_rows(limit, 10)
    assert (None if chosen is None else chosen.tolist()) == rows


def test_a_random_limit_is_the_same_in_every_run():
    chosen = chosen_rows("random:30%", 100)
    assert len(set(chosen.tolist())) == 30 and max(chosen) > 50
    assert (chosen == chosen_rows("random:30", 100)).all()


@pytest.mark.parametrize("limit", ["", "first", "first:0", "first:-1", "end:2.5", "random:101%"])
def test_other_limits_are_refused(limit):
    with pytest.raises(ValueError, match="limit must be"):
        Source(path="a", limit=limit)


# ---- accounting


def test_what_is_drawn_of_each_type_is_counted_exactly(data):
    mixed = [record(str(i), "text") for i in range(5)]
    mixed += [record(str(i + 5), "image", ("image", "1.png")) for i in range(2)]
    write(data / "mixed.jsonl", *mixed)
    sources = open_sources([Source(path="mixed.jsonl", weight=2), Source(path="video.jsonl")], data)
    mixture = Mixture([7, 1], [2, 1], 50, seed=1)
    drawn = Counter(sources[s].records[place].type for s, place in (mixture[i] for i in range(50)))
    assert count_types(sources, mixture) == dict(drawn)
    for source in range(2):
        places = Counter(p for s, p in (mixture[i] for i in range(50)) if s == source)
        assert mixture.times_drawn(source).tolist() == [places[p] for p in range((7, 1)[source])]
    sources[0].records.types = None  # as in a large file
    assert count_types(sources, mixture) == {"not known": 33, "video": 17}


# ---- the check


def test_a_good_mixture_passes(data, capsys):
    code = cli.main(
        ["data", "check", str(data / "mixture.yaml"), "--steps", "10", "--batch-size", "4"]
    )
    assert code == 0
    shown = capsys.readouterr().out
    assert "nothing wrong; the media of 4 records were opened" in shown and "50.0%" in shown
    report = check_mixture(str(data / "mixture.yaml"), num_draws=40)
    assert report["types"] == {"text": 2, "image": 1, "video": 1}
    assert report["draws"] == {"text": 10, "image": 10, "video": 20}
    assert [one["passes"] for one in report["sources"]] == [5, 10, 20]
    assert not any(report["warnings"].values())


def test_everything_wrong_is_counted_and_named(data, tmp_path, capsys):
    (data / "broken.mp4").write_bytes(b"no video")
    (data / "broken.png").write_bytes(b"no image")
    write(
        data / "video.jsonl",
        record("d", "video", ("video", "v.mp4")),
        record("e", "video", ("video", "lost.mp4")),
        record("f", "video", ("video", "lost.mp4")),
        record("g", "video", ("video", "broken.mp4")),
        record("h", "multi_image", ("image", "1.png"), ("image", "broken.png")),
        "{",
        record("d", "video", ("video", "v.mp4")),
        record("i", "text") | {"type": "video"},
    )
    write(data / "image.jsonl", record("b", "text"))
    (data / "text.jsonl").rename(data / "away.jsonl")
    out = data / "deep" / "report.json"
    arguments = ["data", "check", str(data / "mixture.yaml"), "--out", str(out), "--steps", "5"]
    assert cli.main([*arguments, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    problems = report["problems"]
    (source,) = problems["sources"]
    assert "no training file" in source and source.endswith("get it from nowhere/text")
    where = [text.split(": ")[0] for text in problems["records"]]
    assert where == [f"{data / 'video.jsonl'}:{line}" for line in (6, 7, 8)]
    assert problems["missing"] == [
        {"file": str(data / "lost.mp4"), "records": 2, "first": f"{data / 'video.jsonl'}:2"}
    ]
    assert [Path(one["file"]).name for one in problems["unreadable"]] == [
        "broken.mp4",
        "broken.png",
    ]
    others = report["warnings"]["other_type"]
    assert len(others) == 2 and others[0].endswith("image.jsonl:1: text, not image")
    assert cli.main(arguments) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 bad records" in shown and "1 missing files" in shown


def test_a_sample_is_seeded_and_no_more_than_asked(data):
    write(data / "image.jsonl", *[record(str(i), "image", ("image", "1.png")) for i in range(20)])
    report = check_mixture(str(data / "image.jsonl"), num_samples=3, num_draws=10)
    assert report["sources"][0]["opened"] == 3 and report["sources"][0]["media"] == 20


def test_duplicates_are_found_within_and_across_sources(data):
    write(data / "image.jsonl", record("b", "text"), record("x", "text", answer="No."))
    report = check_mixture(str(data / "mixture.yaml"), num_draws=10)
    assert report["warnings"]["duplicates"] == [
        {"first": f"{data / 'text.jsonl'}:2", "again": [f"{data / 'image.jsonl'}:1"]}
    ]
    write(data / "image.jsonl", record("y", "image", ("image", "1.png")),
          record("y", "image", ("image", "2.png")))  # fmt: skip
    report = check_mixture(str(data / "mixture.yaml"), num_draws=10)
    assert not report["warnings"]["duplicates"]  # the same words on another image


def test_lengths_are_those_of_the_processor(data, tmp_path_factory):
    config = make_config()
    model = tmp_path_factory.mktemp("model")
    processor = make_processor(config)
    config.save_pretrained(model)
    processor.save_pretrained(model)
    report = check_mixture(str(data / "mixture.yaml"), model=str(model), num_draws=10)
    text, image, video = report["sources"]
    messages = record("a", "text")["messages"]
    assert text["tokens"]["min"] == processor([messages])["input_ids"].shape[1]
    assert image["tokens"]["median"] > text["tokens"]["median"]
    assert video["tokens"]["max"] >= 6 * config.tokens_per_clip  # 12 s in clips of 2 s
    assert report["window"] == config.text_config.max_position_embeddings
    config.text_config.max_position_embeddings = text["tokens"]["max"]
    config.save_pretrained(model)
    report = check_mixture(str(data / "mixture.yaml"), model=str(model), num_draws=10)
    assert [line.split(":")[0] for line in report["problems"]["too_long"]] == [
        str(data / "image.jsonl"),
        str(data / "video.jsonl"),
    ]
    assert report["sources"][2]["tokens"]["above_window"] == 1


def test_a_model_or_file_that_is_not_there_is_named(data, capsys):
    arguments = ["data", "check", str(data / "mixture.yaml"), "--model", str(data)]
    assert cli.main(arguments) == 2
    assert "is no model of Apollo" in capsys.readouterr().err
    assert cli.main(["data", "check", str(data / "lost.yaml")]) == 2
    assert "cannot read the mixture file" in capsys.readouterr().err
    assert cli.main(["data", "check", str(data / "lost.jsonl")]) == 2
    assert "no training file" in " ".join(capsys.readouterr().out.split())


def test_training_reads_mixture_files(data):
    opened = open_sources([Source(path="mixture.yaml", media_dir="elsewhere")], data)
    assert [one.records[0].type for one in opened] == ["text", "image", "video"]
    assert opened[1].records[0].media == [("image", data / "elsewhere/1.png")]
    write(data / "image.jsonl", "{")
    with pytest.raises(RecordError, match=r"image\.jsonl:1"):
        open_sources([Source(path="mixture.yaml")], data)
    assert set(RECORD_TYPES) >= {one.source.type for one in opened}
