"""Every layout and container of records, and every place where media may lie."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apollo.data import readers
from apollo.data.formats import RecordError
from apollo.data.mixture import Source
from apollo.data.readers import open_source, read_records
from apollo.data.stores import EmbeddedFile, RemoteFile, TarMember, exists, fetch, locate
from apollo.media import load_image
from apollo.video import ClipSampling, load_clips

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The owl."}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("APOLLO_CACHE", str(folder))
    return folder


def llava(value: str, **columns) -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "A ball."}]
    return {"id": "a", "conversations": turns} | columns


def write_json(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def kinds(record) -> list[str]:
    """What the first user turn consists of."""
    return [part.get("text") or part["type"] for part in record.messages[0]["content"]]


# ---- LLaVA / ShareGPT


def test_llava_placeholders_become_parts_in_their_place(tmp_path):
    rows = [
        llava("<image>\nWhat is it?", image="1.png"),
        llava("Compare <image>\n<image>\nnow.", image=["1.png", "2.png"]),
        llava("<video>\nWhat moves?", video="v.mp4"),
        llava("<image>\nWhat moves?", video="v.mp4", data_source="academic"),
        llava("What is it?", image="1.png"),
        llava("Who?") | {"id": 7},
        llava("First <image> then <video>?", image="1.png", video="v.mp4"),
    ]
    one, two, video, as_image, unplaced, text, both = read_records(
        write_json(tmp_path / "a.json", rows)
    )
    assert kinds(one) == ["image", "What is it?"] and one.type == "image"
    assert one.media == [("image", tmp_path / "1.png")]
    assert kinds(two) == ["Compare ", "image", "image", "now."] and two.type == "multi_image"
    assert kinds(video) == kinds(as_image) == ["video", "What moves?"]
    assert as_image.type == "video"
    assert kinds(unplaced) == ["image", "What is it?"]
    assert (text.id, text.type, text.where) == ("7", "text", f"{tmp_path / 'a.json'}[5]")
    assert kinds(both) == ["First ", "image", " then ", "video", "?"]
    assert [message["role"] for message in both.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("<image> <image>", image="1.png"), "2 placeholders of images .* for 1 images"),
        (llava("<image>", image=["1.png", "2.png"]), "1 placeholders of images .* for 2 images"),
        (llava("Two.", image=["1.png", "2.png"]), "0 placeholders of images .* for 2 images"),
        (llava("<video>", image="1.png"), "1 of videos for 1 images and 0 videos"),
        (llava("Write <video> in HTML."), "give its source `type: text`"),
        (llava("Who?", image=3), "path of a file"),
        ({"conversations": [{"from": "oracle", "value": "x"}]}, "from must be one of human, gpt"),
        ({"conversations": [{"from": "human"}]}, '"from" and "value"'),
        ({"conversations": []}, "non-empty list"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "image": "1.png"}, "no user message"),
        ({"text": "x"}, "conversations must be"),
    ],
)
def test_a_bad_llava_record_is_named(tmp_path, row, message):
    path = write_json(tmp_path / "a.json", [llava("Who?"), row])
    with pytest.raises(RecordError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}[1]: ")


def test_text_may_say_what_elsewhere_is_a_placeholder(tmp_path):
    write_json(tmp_path / "a.json", [llava("Write <video> in HTML.")])
    (record,) = open_source(Source(path="a.json", type="text"), tmp_path)
    assert kinds(record) == ["Write <video> in HTML."] and record.type == "text"


def test_a_json_file_may_hold_lines_or_other_letters(tmp_path):
    rows = [llava("¿Qué? 鳥 🦉"), llava("Who?")]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    assert kinds(read_records(path)[0]) == ["¿Qué? 鳥 🦉"] and len(read_records(path)) == 2
    write_lines(path, *rows)
    assert kinds(read_records(path)[-1]) == ["Who?"]


@pytest.mark.parametrize("text", ["", "3", '{"a": 1', "[1, 2", "[1 2]", "[1,", '["a', "[]", "nul"])
def test_damaged_json_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"a\.json"):
        read_records(path)


# ---- LLaMA-Factory and Hugging Face chat


def test_llama_factory_by_its_columns(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "<video>What moves? <image>"},
            {"role": "assistant", "content": "This."},
        ],
        "images": ["1.png"],
        "videos": ["v.mp4"],
        "system": "Be brief.",
    }
    path = write_json(tmp_path / "a.json", [row | {"videos": ["v.mp4"]}])
    (record,) = read_records(path)
    assert record.messages[0]["role"] == "system" and record.id == "1"
    assert [kind for kind, _ in record.media] == ["video", "image"]


def test_llama_factory_by_its_dataset_info(tmp_path):
    info = {
        "mine": {
            "file_name": "mine.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "videos": "films", "system": "rules"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me",
                     "assistant_tag": "bot"},
        },
        "other": {"file_name": "mine.jsonl"},
        "empty": {"formatting": "sharegpt"},
    }  # fmt: skip
    write_json(tmp_path / "lf/dataset_info.json", info)
    talk = [{"who": "me", "says": "<video>What?"}, {"who": "bot", "says": "A ball."}]
    write_lines(tmp_path / "lf/mine.jsonl", {"talk": talk, "films": ["v.mp4"], "rules": "Short."})
    (record,) = open_source(Source(path="lf#mine"), tmp_path)
    assert record.media == [("video", tmp_path / "lf/v.mp4")]
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    for name, message in {"his": "has no 'his'", "other": "sharegpt", "empty": "file_name"}.items():
        with pytest.raises(RecordError, match=message):
            open_source(Source(path=f"lf#{name}"), tmp_path)
    with pytest.raises(RecordError, match="dataset_info.json cannot be read"):
        open_source(Source(path="nowhere#mine"), tmp_path)


def test_hugging_face_chat_with_every_name_of_a_source(tmp_path):
    def row(part: dict, **columns) -> dict:
        content = [{"type": "text", "text": "What?"}, part]
        return {
            "messages": [{"role": "user", "content": content}, CHAT[1]],
            "source": "x",
        } | columns

    path = write_lines(
        tmp_path / "chat.jsonl",
        row({"type": "video", "path": "v.mp4", "text": None}),
        row({"type": "video", "url": "https://x.org/v.mp4"}),
        row({"type": "image", "image": "1.png"}),
        row({"type": "image"}, images=["2.png"]),
    )
    records = read_records(path)
    assert [record.media[0] for record in records] == [
        ("video", tmp_path / "v.mp4"),
        ("video", RemoteFile("https://x.org/v.mp4")),
        ("image", tmp_path / "1.png"),
        ("image", tmp_path / "2.png"),
    ]
    write_lines(path, row({"type": "image"}))
    with pytest.raises(RecordError, match="exactly one source"):
        read_records(path)


# ---- Parquet and data sets


def test_parquet_with_images_inside_as_onevision_has_them(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        llava("<image>\nWhat?", image={"bytes": png(), "path": "1.png"}) | {"id": str(i)}
        for i in range(30)
    ]
    rows.append(llava("Who?", image=None) | {"id": "text"})
    for number, part in enumerate((rows[:20], rows[20:])):
        path = tmp_path / f"part-{number}.parquet"
        parquet.write_table(arrow.Table.from_pylist(part), path, row_group_size=7)
    records = open_source(Source(path="part-*.parquet"), tmp_path)
    assert [record.id for record in records] == [row["id"] for row in rows]
    assert records[25].where == f"{tmp_path / 'part-1.parquet'}:6"
    assert [record.type for record in records[-2:]] == ["image", "text"]
    medium = pickle.loads(pickle.dumps(records))[3].media[0][1]
    assert isinstance(medium, EmbeddedFile) and load_image(fetch(medium)).size == (8, 6)


def test_our_own_records_survive_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": [{"type": "video", "video": "v.mp4", "text": None},
                                             {"type": "text", "video": None, "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]  # fmt: skip
    rows = [{"id": "a", "type": "video", "messages": messages}]
    lines = read_records(write_lines(tmp_path / "a.jsonl", *rows))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (record,) = read_records(tmp_path / "a.parquet")
    assert replace(record, where="") == replace(lines[0], where="")


def test_a_parquet_file_cut_off_or_damaged_is_refused(tmp_path, cache):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    text = [{"id": str(i), "messages": CHAT, "note": str(i) * 50} for i in range(500)]
    parquet.write_table(arrow.Table.from_pylist(text), path, row_group_size=100)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1", b"\0" * 2000 + whole[2000:]):
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"a\.parquet cannot be read"):
            read_records(path)
    assert not [file for file in cache.rglob("*") if file.is_file()]  # no half copies


def test_data_sets_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"messages": CHAT, "source": "x"}] * 2
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    assert [record.id for record in read_records(tmp_path / "saved")] == ["1", "2"]

    images = [{"conversations": llava("<image>\nWhat?")["conversations"],
               "image": {"bytes": png(), "path": None}}]  # fmt: skip
    shown = datasets.Dataset.from_list(images).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": shown}).save_to_disk(tmp_path / "split")
    (record,) = read_records(tmp_path / "split/test")
    assert load_image(fetch(record.media[0][1])).size == (8, 6)
    with pytest.raises(RecordError, match="name a split's folder"):
        read_records(tmp_path / "split")

    def load_dataset(name, config, split):
        assert (name, config) == ("owner/name", "part")
        if split != "train":
            raise ValueError(f"Unknown split {split}")
        return saved

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(open_source(Source(path="hf://owner/name:part"), tmp_path)) == 2
    with pytest.raises(RecordError, match=r"hf://owner/name:part/dev cannot be read: Unknown"):
        open_source(Source(path="hf://owner/name:part/dev"), tmp_path)
    with pytest.raises(RecordError, match="must look like"):
        open_source(Source(path="hf://name"), tmp_path)


@pytest.mark.parametrize("package", ["pyarrow", "datasets", "fsspec"])
def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    paths = {"pyarrow": "a.parquet", "datasets": "hf://a/b", "fsspec": "s3://bucket/a.jsonl"}
    with pytest.raises(ValueError, match=r"pip install 'apollo-lmm\[data\]'"):
        open_source(Source(path=paths[package]), tmp_path)


def test_other_suffixes_folders_and_formats_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecordError, match=r"suffix must be one of \.jsonl, \.json, \.parquet"):
        read_records(tmp_path / "a.csv")
    with pytest.raises(RecordError, match="no saved data set"):
        read_records(tmp_path / "folder")
    with pytest.raises(RecordError, match="no training file"):
        open_source(Source(path="*.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="format must be one of"):
        open_source(Source(path="a.csv", format="alpaca"), tmp_path)
    write_json(tmp_path / "a.json", [{"prompt": "x"}])
    with pytest.raises(RecordError, match=r"a\.json\[0\]: a record needs messages .* found prompt"):
        read_records(tmp_path / "a.json")


# ---- large files


def test_a_large_file_is_read_as_it_is_needed(tmp_path, monkeypatch):
    rows = [{"id": str(i), "type": "text", "messages": CHAT} for i in range(50)]
    rows[30] = {"id": "bad", "type": "video", "messages": CHAT}
    path = write_lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(RecordError, match=r"a\.jsonl:31: type is 'video'"):
        read_records(path)
    monkeypatch.setattr(readers, "WHOLE_CHECK_RECORDS", 50)
    records = read_records(path)
    assert records.types is None and len(records) == 50
    assert records[29].id == "29" and records[-1].id == "49"
    assert [record.id for record in records[3:5]] == ["3", "4"]
    with pytest.raises(RecordError, match=r"a\.jsonl:31: type is 'video'"):
        records[30]
    with pytest.raises(IndexError):
        records[50]


def test_the_index_of_lines_takes_eight_bytes_each(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * 20_000)
    rows, _ = readers.open_rows(str(path))
    assert len(rows) == 20_000 and rows[19_999] == {}
    assert rows.starts.base is rows.ends.base  # one array
    assert rows.starts.base.nbytes == 8 * 20_001


# ---- tar shards


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_media_in_tar_shards(tmp_path, plain_video):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        add(tar, "./films/v.mp4", plain_video.path.read_bytes())
    with tarfile.open(tmp_path / "shards/1.tar", "w") as tar:
        add(tar, "1.png", png())
    rows = [llava("<video>", video="films/v.mp4"), llava("<image>", image="1.png"),
            llava("<image>", image="2.png")]  # fmt: skip
    write_json(tmp_path / "a.json", rows)
    video, image, lost = open_source(Source(path="a.json", media_dir="shards/*.tar"), tmp_path)
    medium = pickle.loads(pickle.dumps(video.media[0][1]))
    assert medium == TarMember(str(tmp_path / "shards/*.tar"), "films/v.mp4")
    clips = load_clips(fetch(medium), ClipSampling(max_clips=1))
    assert clips.frames.shape[:2] == (1, 4)
    assert load_image(fetch(image.media[0][1])).size == (8, 6) and exists(medium)
    assert not exists(lost.media[0][1])
    with pytest.raises(FileNotFoundError, match="holds no member 2.png"):
        fetch(lost.media[0][1])


def test_a_webdataset_shard_is_a_source(tmp_path, plain_video):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0001.json", json.dumps(llava("<video>\nWhat?")).encode())
        add(tar, "0001.mp4", plain_video.path.read_bytes())
        add(tar, "0002.json", json.dumps(llava("What?")).encode())
        add(tar, "0002.left.jpg", png())
        add(tar, "0003.json", json.dumps(llava("Who?")).encode())
        add(tar, "0004.json", json.dumps(llava("<image>", image="0002.left.jpg")).encode())
    records = read_records(tmp_path / "a.tar")
    assert [record.type for record in records] == ["video", "image", "text", "image"]
    assert records[0].where == f"{tmp_path / 'a.tar'}!0001.json"
    assert fetch(records[0].media[0][1]) == plain_video.path.read_bytes()
    assert fetch(records[3].media[0][1]) == png()


def test_damaged_and_ambiguous_shards_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "1.json", json.dumps(llava("Who?")).encode())
        add(tar, "1.bin", bytes(50_000))
    whole = path.read_bytes()
    with pytest.raises(RecordError, match="no training file"):
        read_records(tmp_path / "b.tar")
    for name, data in {"cut": whole[:30_000], "zip": b"PK\3\4" * 500, "half": whole[:700]}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}\.tar"):
            read_records(tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        add(tar, "1.json", b"{}")
        add(tar, "./1.json", b"{}")
    with pytest.raises(ValueError, match="both hold 1.json"):
        read_records(tmp_path / "twice.tar")


# ---- remote stores


def test_media_and_records_in_a_remote_store(cache, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/pictures/1.png", png())
    store.pipe("/bucket/a.json", json.dumps([llava("<image>", image="pictures/1.png")]).encode())
    (record,) = open_source(Source(path="memory://bucket/a.json"))
    medium = record.media[0][1]
    assert medium == RemoteFile("memory://bucket/pictures/1.png")
    path = fetch(medium)
    assert path.read_bytes() == png() and cache in path.parents and path.suffix == ".png"
    store.rm("/bucket/pictures/1.png")
    assert fetch(medium) == path  # from the cache
    other = locate("2.png", "memory://bucket/pictures/")
    assert other == RemoteFile("memory://bucket/pictures/2.png")
    with pytest.raises(OSError):
        fetch(other)
    assert sorted(file.name for file in (cache / "remote").iterdir()) == sorted(
        file.name for file in (cache / "remote").iterdir() if file.suffix in (".png", ".json")
    )  # nothing half
    local = locate(f"file://{path}", "")
    assert fetch(local).read_bytes() == png()


def test_sources_of_media():
    assert locate("/abs/a.png", "folder") == Path("/abs/a.png")
    assert locate("a.png", "folder") == Path("folder/a.png")
    assert locate({"bytes": None, "path": "a.png"}, "folder") == Path("folder/a.png")
    assert locate({"bytes": b"x", "path": "a.png"}, "folder") == EmbeddedFile("<1 bytes>", b"x")
    for source in ({"path": "a"}, 3, None, "", np.zeros(3)):
        with pytest.raises(ValueError, match="a medium must be"):
            locate(source, "folder")
