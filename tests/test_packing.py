"""Packed rows: the same losses and gradients as alone; dealing, batches, the feature cache."""

from __future__ import annotations

import errno
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from conftest import write_numbered_video
from PIL import Image
from tiny_models import (
    TOKENIZER,
    assistant,
    make_config,
    make_image,
    make_llm_config,
    make_model,
    make_processor,
    mixed_conversations,
    user,
)

from apollo.data.collate import BatchMaker, fill_cache, sketch_medium
from apollo.data.features import BrokenFeaturesError, CacheError, FeatureCache
from apollo.data.formats import FORMATS, RECORD_TYPES, Record, make_record
from apollo.data.mixture import Mixture
from apollo.data.packing import ROUND_TO, deal, pack
from apollo.data.stores import EmbeddedFile, TarMember
from apollo.model.connector import RESAMPLERS
from apollo.model.segments import PACKED, Segments, packed_attention, use_packed_attention
from apollo.train.curves import read_log
from apollo.train.trainer import LoopSettings, Schedule, count_items, count_tokens, run_stage
from apollo.video import ClipSampling

torch.set_num_threads(1)

PAD = TOKENIZER.pad_token_id


def loss_and_gradients(model, *batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one optimiser step over these batches."""
    model.zero_grad()
    items = sum(count_items(batch) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = model(**batch, num_items_in_batch=items).loss
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, other) -> None:
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], atol=1e-5, rtol=1e-4, msg=name)


def attend(model, attention: str) -> None:
    use_packed_attention(model.model.llm)
    model.model.llm.config._attn_implementation = attention


def packed(batch: dict) -> dict:
    clips = {name: batch[name] for name in ("pixel_values", "clip_features") if name in batch}
    texts = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return pack(texts, PAD) | clips


# ---- the model


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager"])
@pytest.mark.parametrize("clips", ["pixel_values", "clip_features"])
def test_packed_padded_and_alone_learn_the_same(resampler, attention, clips):
    model = make_model(make_config(resampler=resampler)).train()
    model.requires_grad_(True)
    processor = make_processor(model.config)
    batches = [processor(c, with_labels=True) for c in (mixed_conversations(), *singles())]
    if clips == "clip_features":
        model.parts()["encoders"].requires_grad_(False)
        for batch in batches:
            batch["clip_features"] = model.encode(batch.pop("pixel_values")).detach()
    padded, *alone = [dict(batch) for batch in batches]
    expected = loss_and_gradients_of_trained(model, *alone)
    assert_same(expected, loss_and_gradients_of_trained(model, padded))
    attend(model, attention)
    row = packed(padded)
    assert row["input_ids"].shape[0] == 1 and count_items(row) == count_items(padded)
    assert count_tokens(row) == count_tokens(padded)
    assert_same(expected, loss_and_gradients_of_trained(model, row))
    assert_same(expected, loss_and_gradients_of_trained(model, padded))  # still knows its mask


def singles() -> list[list[list[dict]]]:
    return [[conversation] for conversation in mixed_conversations()]


def loss_and_gradients_of_trained(model, *batches):
    model.zero_grad()
    items = sum(count_items(batch) for batch in batches)
    losses = [model(**batch, num_items_in_batch=items).loss for batch in batches]
    torch.stack(losses).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return sum(loss.item() for loss in losses), {n: p.grad.clone() for n, p in trained.items()}


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_several_packed_rows_with_padding_anywhere(attention):
    model = make_model(make_config())
    processor = make_processor(model.config)
    conversations = mixed_conversations()
    whole = dict(processor(conversations, with_labels=True))
    expected = loss_and_gradients(model, whole)
    attend(model, attention)
    rows = [packed(dict(processor(conversations[i : i + 2], with_labels=True))) for i in (0, 2)]
    length = max(row["input_ids"].shape[1] for row in rows) + 5
    gap = 7  # tokens of padding before the first row's conversations
    batch = {"pixel_values": whole["pixel_values"]}
    for name, filler in (("input_ids", PAD), ("labels", -100), ("segment_ids", 0)):
        stacked = torch.full((2, length), filler)
        for row, start, out in zip(rows, (gap, 0), stacked, strict=True):
            values = row[name][0][: length - start]
            out[start : start + len(values)] = values
        batch[name] = stacked
    assert_same(expected, loss_and_gradients(model, batch))


@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager"])
def test_no_conversation_sees_another(attention):
    model = make_model(make_config())
    attend(model, attention)
    processor = make_processor(model.config)
    conversations = mixed_conversations()
    before = packed(dict(processor(conversations, with_labels=True)))
    conversations[1] = [user(make_image(9), "why?"), assistant("no one")]
    after = packed(dict(processor(conversations, with_labels=True)))
    assert before["segment_ids"].max() == 4
    with torch.no_grad():
        one, other = (model(**{**b, "labels": None}).logits for b in (before, after))
    for number in (1, 2, 3, 4):
        logits = [x[b["segment_ids"] == number] for x, b in ((one, before), (other, after))]
        unchanged = logits[0].shape == logits[1].shape and torch.allclose(*logits, atol=1e-6)
        assert unchanged == (number != 2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_checkpointed_activations_give_the_same_gradients():
    model = make_model(make_config()).train()
    attend(model, PACKED)
    batch = packed(dict(make_processor(model.config)(mixed_conversations(), with_labels=True)))
    expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    assert_same(expected, loss_and_gradients(model, batch))


ANY_BATCH = {
    "text": [0],
    "image": [1],
    "many images": [2],
    "video": [3],
    "text and text": [0, 0],
    "video, text, image": [3, 0, 1],
    "images twice": [2, 1, 2],
}


@pytest.mark.parametrize("chosen", ANY_BATCH.values(), ids=ANY_BATCH.keys())
def test_any_mix_trains_every_parameter_and_adds_nothing(chosen):
    model = make_model(make_config()).train()
    attend(model, PACKED)
    conversations = [mixed_conversations()[i] for i in chosen]
    batch = dict(make_processor(model.config)(conversations, with_labels=True))
    row = packed(batch)
    one, other = loss_and_gradients(model, batch), loss_and_gradients(model, row)  # no grad is None
    assert_same(one, other)
    sees = any(gradient.abs().max() > 0 for name, gradient in other[1].items() if "llm" not in name)
    assert sees == (chosen not in ([0], [0, 0]))
    if not sees:  # text alone: exactly what the LLM by itself says
        row.pop("pixel_values")
        model.eval()  # nor does it run zero clips now
        assert loss_and_gradients_of_eval(model, row) == other[0]


def loss_and_gradients_of_eval(model, batch) -> float:
    with torch.no_grad():
        return model(**batch, num_items_in_batch=count_items(batch)).loss.item()


def test_segments_know_their_positions_and_lengths():
    segments = Segments(torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [0, 5, 5, 5, 5, 4, 4, 4]]))
    assert segments.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 3, 0, 1, 2]]
    assert segments.lengths == [3, 1, 2, 2, 1, 4, 3]
    assert segments.bounds.tolist() == [0, 3, 4, 6, 8, 9, 13, 16]


def test_flash_attention_is_told_where_segments_end():
    class Llm:
        config = make_llm_config()

        def __call__(self, **inputs):
            self.inputs = inputs
            return type("Output", (), {"last_hidden_state": inputs["inputs_embeds"]})()

    llm, embeds = Llm(), torch.randn(2, 4, 3)
    llm.config._attn_implementation_internal = "flash_attention_2"
    ids = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]])
    assert torch.equal(Segments(ids).run(llm, embeds).last_hidden_state, embeds)
    inputs = llm.inputs
    assert (
        inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 2, 3, 4, 5, 8]
    )
    assert inputs["cu_seq_lens_q"].dtype == torch.int32 and inputs["max_length_k"] == 3
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 0, 0, 0, 1, 2]]
    assert inputs["inputs_embeds"].shape == (1, 8, 3) and inputs["attention_mask"] is None


def test_impossible_packed_calls_are_refused():
    model = make_model(make_config())
    attend(model, PACKED)
    row = packed(dict(make_processor(model.config)(mixed_conversations(), with_labels=True)))
    with pytest.raises(ValueError, match="go with no cache"):
        model(**row, use_cache=True)
    with pytest.raises(ValueError, match="segment_ids"):
        model(**row | {"segment_ids": row["segment_ids"][:, 1:]})
    q = torch.randn(1, 1, 6, 2)
    with pytest.raises(ValueError, match="sliding window of 3"):
        packed_attention(torch.nn.Module(), q, q, q, None, segment_lengths=[2, 4], sliding_window=3)


def test_generation_is_the_same_after_training_packed():
    model = make_model(make_config())
    batch = make_processor(model.config)(mixed_conversations()[3][:1], add_generation_prompt=True)
    settings = dict(max_new_tokens=5, do_sample=False)
    expected = model.generate(**batch, **settings)
    attend(model, PACKED)
    assert torch.equal(model.generate(**batch, **settings), expected)


# ---- packing


def test_dealt_batches_are_equally_full():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        num_batches = int(torch.randint(1, 9, (), generator=generator))
        num_records = num_batches + int(torch.randint(0, 60, (), generator=generator))
        lengths = torch.randint(5, 700, (num_records,), generator=generator).tolist()
        batches = deal(lengths, num_batches)
        assert len(batches) == num_batches and all(batches)
        assert sorted(place for batch in batches for place in batch) == list(range(num_records))
        assert batches == deal(list(lengths), num_batches)
        loads = [sum(lengths[place] for place in batch) for batch in batches]
        assert max(loads) - min(loads) <= max(lengths)
        assert (
            max(loads) <= 4 / 3 * max(max(lengths), sum(lengths) / num_batches) + max(lengths) / 3
        )
    assert deal([5, 5, 5], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_packed_row_holds_all_tokens_in_order(side):
    processor = make_processor(make_config())
    batch = dict(processor(mixed_conversations(), with_labels=True, padding_side=side))
    row = packed(batch)
    assert row["input_ids"].shape[1] % ROUND_TO == 0
    for number in range(4):
        (alone,) = processor([mixed_conversations()[number]])["input_ids"]
        assert row["input_ids"][row["segment_ids"] == number + 1].tolist() == alone.tolist()
    padding = row["segment_ids"] == 0
    assert (row["labels"][padding] == -100).all() and (row["input_ids"][padding] == PAD).all()
    assert torch.equal(row["attention_mask"], (~padding).long())


def test_the_first_token_of_a_conversation_is_never_a_label():
    ids = torch.arange(10, 22).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    row = pack(batch, PAD)
    assert row["labels"][0, :9].tolist() == [-100, 11, 12, 13, -100, 15, -100, 19, 20]
    assert count_items(row) == count_items(batch) == 6


# ---- batches of records


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[list[Record]]:
    """For each type some records of different lengths, with real files."""
    folder = tmp_path_factory.mktemp("records")
    for number in range(3):
        write_numbered_video(folder / f"{number}.mp4", range(0, 40 + 90 * number))
        Image.new("RGB", (20, 16), (90 * number, 50, 200)).save(folder / f"{number}.png")
    media = {
        "text": lambda n: [],
        "image": lambda n: [("image", f"{n}.png")],
        "multi_image": lambda n: [("image", "0.png"), ("image", f"{n}.png")],
        "video": lambda n: [("video", f"{n}.mp4")],
    }
    sources = []
    for type_ in RECORD_TYPES:
        lines = []
        for number in range(3):
            parts = [{"type": kind, kind: path} for kind, path in media[type_](number)]
            parts.append({"type": "text", "text": "Say it. " * (1 + 5 * number)})
            turns = [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": f"It is {number}." * (number + 1)},
            ]
            raw = {"id": f"{number}", "type": type_, "messages": turns}
            where = f"{type_}:{number}"
            lines.append(make_record(raw, FORMATS["apollo"], str(folder), number, where))
        sources.append(lines)
    return sources


SAMPLING = ClipSampling(max_clips=3)


def make_batches(sources, batches_per_step=2, batch_size=4, cache=None, **settings) -> BatchMaker:
    return BatchMaker(
        sources,
        Mixture([3] * 4, [1, 2, 1, 2], 24, seed=1),
        make_processor(make_config()),
        batch_size=batch_size,
        sampling=SAMPLING,
        max_tokens=2000,
        cache=cache,
        batches_per_step=batches_per_step,
        **settings,
    )


def test_tokens_are_counted_exactly_without_decoding(sources):
    maker = make_batches(sources)
    for record in (record for source in sources for record in source):
        maker._rows = lambda _, record=record: [[record]]  # type: ignore[method-assign]
        assert maker.num_tokens(record) == int(maker(0)["attention_mask"].sum())
    assert len(sketch_medium("video", Path("absent.mp4"), SAMPLING).spans_s) == 1


def test_packing_changes_neither_the_records_nor_the_loss_of_a_step(sources, tmp_path):
    model = make_model(make_config())
    attend(model, PACKED)
    plain = make_batches(sources, batches_per_step=1, batch_size=8)
    padded, rows = make_batches(sources), make_batches(sources, packed=True)
    cache = FeatureCache(tmp_path, {"a": 1})
    with torch.no_grad():
        fill_cache(cache, [r for s in sources for r in s], SAMPLING, plain.processor, model.encode)
    cached = make_batches(sources, packed=True, cache=cache)
    for step in range(3):
        numbers = (2 * step, 2 * step + 1)
        wanted = sorted(record.where for record in plain.records(step))
        expected = loss_and_gradients_of_eval(model, plain(step))
        for maker, tolerance in ((padded, 1e-5), (rows, 1e-5), (cached, 2e-3)):
            batches = [maker(number) for number in numbers]
            where = [record.where for number in numbers for record in maker.records(number)]
            assert sorted(where) == wanted
            items = sum(map(count_items, batches))
            with torch.no_grad():
                loss = sum(model(**b, num_items_in_batch=items).loss.item() for b in batches)
            assert loss == pytest.approx(expected, abs=tolerance)
        tokens = [int(rows(number)["attention_mask"].sum()) for number in numbers]
        longest = max(rows.num_tokens(record) for record in plain.records(step))
        assert abs(tokens[0] - tokens[1]) <= longest
        assert ("pixel_values" in cached(2 * step)) is False


def test_bounded_rows_change_neither_the_records_nor_the_loss_of_a_step(sources):
    model = make_model(make_config())
    attend(model, PACKED)
    free = make_batches(sources, packed=True)
    longest = max(free.num_tokens(record) for record in free.records(0) + free.records(1))
    bounded = make_batches(sources, packed=True, tokens_per_row=longest)
    for step in range(2):
        numbers = (2 * step, 2 * step + 1)
        wanted = [free(number) for number in numbers]
        got = [bounded(number) for number in numbers]
        assert len(got[0]) == len(got[1]) > 1  # processes take as many rows as each other
        rows = [row for batch in got for row in batch]
        assert max(int(row["attention_mask"].sum()) for row in rows) <= longest
        for maker in (free, bounded):
            records = [record for number in numbers for record in maker.records(number)]
            assert len(records) == len({record.where for record in records}) == 8
        items = sum(map(count_items, wanted))
        assert items == sum(map(count_items, rows))
        with torch.no_grad():
            losses = [
                sum(model(**row, num_items_in_batch=items).loss.item() for row in some)
                for some in (wanted, rows)
            ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_record_too_long_for_a_bounded_row_is_named(sources):
    with pytest.raises(ValueError, match=r"record .* has \d+ tokens, tokens_per_row allows 9"):
        make_batches(sources, packed=True, tokens_per_row=9)(0)


def test_a_packed_batch_is_a_function_of_its_number(sources):
    forwards = [make_batches(sources, packed=True)(number) for number in range(6)]
    one = make_batches(sources, packed=True)
    backwards = [one(number) for number in reversed(range(6))][::-1]
    for first, second in zip(forwards, backwards, strict=True):
        assert first.keys() == second.keys()
        for name in ("input_ids", "labels", "segment_ids", "attention_mask"):
            assert torch.equal(first[name], second[name])
        for first_pixels, second_pixels in zip(
            first["pixel_values"], second["pixel_values"], strict=True
        ):
            assert torch.equal(first_pixels, second_pixels)


def test_the_loop_learns_the_same_from_packed_batches_and_resumes_exactly(sources, tmp_path):
    class StopError(Exception):
        pass

    def train(folder: str, packed: bool, stop_at: int | None = None, resume: bool = False):
        maker = make_batches(sources, packed=packed)

        def batch_at(number: int):
            if number == stop_at:
                raise StopError
            return maker(number)

        model = make_model(make_config())
        attend(model, PACKED)
        rates = {"encoders": 0.0, "connector": 1e-2, "llm": 1e-2}
        schedule = Schedule(name="sft", steps=3, learning_rates=rates)
        loop = LoopSettings(log_every=1, save_every=1, gradient_accumulation=2)
        run_stage(model, batch_at, schedule, loop, tmp_path / folder, resume=resume)
        return model.state_dict()

    train("padded", packed=False)
    straight = train("packed", packed=True)
    with pytest.raises(StopError):
        train("stopped", packed=True, stop_at=3)
    resumed = train("stopped", packed=True, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    logs = [read_log(tmp_path / folder) for folder in ("padded", "packed", "stopped")]
    losses = [[line["loss"] for line in log] for log in logs]
    items = [[line["items"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[1] == losses[2]
    assert items[0] == items[1] == items[2]


def test_a_conversation_too_long_is_named_also_when_packed(sources):
    maker = make_batches(sources, packed=True)
    maker.max_tokens = 20
    with pytest.raises(ValueError, match="has .* tokens, the LLM reads 20"):
        maker(0)


# ---- the cache


@pytest.fixture
def filled(sources, tmp_path):
    """A filled cache, its maker, and how to fill it again."""
    model = make_model(make_config())
    cache = FeatureCache(tmp_path / "cache", {"a": 1})
    maker = make_batches(sources, packed=True, cache=cache)
    records = [record for source in sources for record in source]

    @torch.no_grad()
    def fill() -> int:
        return fill_cache(cache, records, SAMPLING, maker.processor, model.encode)

    assert fill() == 6
    return cache, maker, fill


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "not features": lambda path: path.write_bytes(b"\x00garbage" * 99),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_made_anew_and_stops_nothing(filled, sources, caplog, damage):
    cache, maker, fill = filled
    whole = maker(0)
    damaged = {path for record in maker.records(0) for _, path in record.media}
    for path in damaged:
        damage(cache.file_of(path))
        assert path not in cache
    with caplog.at_level(logging.WARNING):
        batch = maker(0)
    assert "cannot be read" in caplog.text and "\n" not in caplog.messages[0]
    assert torch.equal(batch["input_ids"], whole["input_ids"]) and "clip_features" not in batch
    assert torch.equal(batch["segment_ids"], whole["segment_ids"])
    assert fill() == len(damaged)
    torch.testing.assert_close(maker(0)["clip_features"], whole["clip_features"])


def test_many_writers_leave_one_whole_file(sources, tmp_path):
    cache = FeatureCache(tmp_path / "cache", {})
    ((_, path),) = sources[1][0].media
    versions = [torch.full((1, 4, 5, 5, 8), float(number)) for number in range(8)]
    threads = [
        threading.Thread(target=lambda f=features: [cache.save(path, f, None) for _ in range(10)])
        for features in versions
    ]
    for thread in threads:
        thread.start()
    seen = [cache.load(path).features for _ in range(40) if path in cache]
    for thread in threads:
        thread.join()
    for features in [*seen, cache.load(path).features]:
        assert features.min() == features.max() and features.shape == (1, 4, 5, 5, 8)
    assert [p.suffix for p in (tmp_path / "cache").glob("*/*")] == [".safetensors"]


def test_a_full_disk_is_one_clear_line_and_keeps_what_there_is(filled, tmp_path, monkeypatch):
    cache, _, fill = filled
    size = cache.size()
    victim = next(cache.folder.glob("*/*.safetensors"))
    whole = victim.read_bytes()
    victim.unlink()

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(CacheError, match="the disk is full; 5 files") as error:
            fill()
    assert "\n" not in str(error.value) and "feature_cache_dir" in str(error.value)
    assert not list(cache.folder.glob("*/*.part"))
    assert fill() == 1 and cache.size() == size
    assert victim.stat().st_size == len(whole)


def test_the_key_is_what_a_medium_holds_wherever_it_lies(tmp_path):
    import tarfile

    cache = FeatureCache(tmp_path / "cache", {})
    data = [b"one", b"other"]
    for number in range(2):
        (tmp_path / f"{number}.bin").write_bytes(data[number])
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        shard.add(tmp_path / "0.bin", "a/0.bin")
    places = [
        tmp_path / "0.bin",
        EmbeddedFile("zero", data[0]),
        TarMember(str(tmp_path / "shard.tar"), "a/0.bin"),
    ]
    assert len({cache.file_of(place) for place in places}) == 1
    assert cache.file_of(tmp_path / "1.bin") != cache.file_of(places[0])
    features = torch.randn(1, 4, 2, 2, 8)
    cache.save(places[2], features, None)
    assert places[0] in cache and cache.size().num_files == 1
    assert json.loads(FeatureCache(tmp_path, {"b": 1, "a": 2}).settings) == {"a": 2, "b": 1}
    with pytest.raises(BrokenFeaturesError):
        cache.load(tmp_path / "1.bin")
