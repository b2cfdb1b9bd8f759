"""Many processes, shards, recomputed and compiled layers: the numbers stay those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_training import (
    TwoPartModel,
    interrupted,
    rows,
    text_or_video,
    tiny_apollo,
    train,
    train_apollo,
    weights,
    without_dropout,
)
from torch import nn

from apollo.train import scale
from apollo.train.checkpoint import list_checkpoints
from apollo.train.curves import read_log
from apollo.train.scale import recomputed

HERE = Path(__file__).parent


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=0, msg=name)


# ---- two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of what two processes over gloo have trained, see train_on_two.py."""
    folder = tmp_path_factory.mktemp("two")
    for sharding in ("no", "fsdp2"):  # runs of one process, to be resumed by two
        run_dir, model = folder / f"from_one_{sharding}", without_dropout()
        interrupted(run_dir, at_batch=3, batch=8, save_every=1, model=model)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    subprocess.run(
        [*command, str(HERE / "train_on_two.py"), str(folder)],
        check=True,
        env=environment,
        timeout=600,  # a hang is a failure
    )
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same run in one process, which gets the batches of both."""
    folder = tmp_path_factory.mktemp("one")
    return folder, weights(train_apollo(folder, gradient_accumulation=2))


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["no", "fsdp2"])
def test_text_on_one_process_and_videos_on_the_other_equal_one_process(one, two, sharding):
    folder, expected = one
    assert_close(torch.load(two / f"{sharding}.pt"), expected)  # as the second process has them
    logs = read_log(folder), read_log(two / sharding)
    assert len(logs[0]) == 55
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["items"]) == (b["step"], b["items"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)
    for a, b in zip(list_checkpoints(folder), list_checkpoints(two / sharding), strict=True):
        model = tiny_apollo()
        b.load_weights(model)
        found = weights(model)
        a.load_weights(model)
        assert_close(found, weights(model))
        gradients = [torch.load(c.path / "optimizer.pt")["state"] for c in (a, b)]
        assert gradients[0].keys() == gradients[1].keys()
        for number, state in gradients[0].items():  # the mean of the gradients, and its square
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, gradients[1][number][name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_resumes_with_more_or_fewer_processes(two, tmp_path):
    straight = train(tmp_path, batch=8, model=without_dropout())
    for name in ("from_one_no", "from_one_fsdp2", "from_two"):
        # Two processes finished the first two; the last one is theirs, and one process ends it.
        resumed = train(two / name, batch=8, model=without_dropout(), resume=True)
        assert_close(weights(resumed), weights(straight))
        for a, b in zip(read_log(tmp_path), read_log(two / name), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


# ---- recomputed and compiled layers


def test_recomputed_layers_change_nothing_but_memory(tmp_path):
    """Also in a frozen LLM, which is in evaluation mode, and through which gradients pass."""

    class Counting(nn.Identity):
        count = 0

        def forward(self, hidden):
            Counting.count += 1
            return hidden

    counts, results = [], []
    for enabled in (False, True):
        model = without_dropout()
        for layer in model.llm.model.layers:
            layer.mlp = nn.Sequential(Counting(), layer.mlp)
        Counting.count = 0
        train(
            tmp_path / str(enabled),
            model=model,
            rates={"embedding": 1e-2, "llm": 0.0},
            gradient_checkpointing=enabled,
        )
        counts.append(Counting.count)
        results.append(weights(model))
        assert not any(layer.gradient_checkpointing for layer in model.llm.model.layers)
    assert counts == [12, 24]  # 2 layers, 6 steps
    assert_close(*results)


def test_all_of_apollo_recomputes():
    gradients = []
    for enabled in (False, True):
        model = tiny_apollo().train()
        with recomputed(model, enabled):
            model(**text_or_video(1)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(*gradients)


def test_a_model_without_layers_cannot_recompute(tmp_path):
    with (
        pytest.raises(ValueError, match="no layers of transformers' kind"),
        recomputed(nn.Linear(2, 2), True),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_layers_learn_the_same(tmp_path, monkeypatch, gradient_checkpointing):
    # Graphs are captured and differentiated as always, but not turned into C++: that takes minutes.
    monkeypatch.setattr(scale.torch, "compile", partial(torch.compile, backend="aot_eager"))
    eager = train(tmp_path / "eager", model=without_dropout())
    compiled = train(
        tmp_path / "compiled",
        model=without_dropout(),
        compile=True,
        gradient_checkpointing=gradient_checkpointing,
    )
    assert_close(weights(eager), weights(compiled))
    assert not any("forward" in vars(layer) for layer in compiled.llm.model.layers)


# ---- what is refused, and trackers


def test_sharding_needs_several_processes(tmp_path):
    with pytest.raises(ValueError, match="needs torchrun"):
        train(tmp_path, sharding="fsdp2")


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_other_engines_are_refused_with_the_way_out(tmp_path, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=f"asks for {engine}.*loop.sharding=fsdp2"):
        train(tmp_path)


def test_a_missing_tracker_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(scale.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train(tmp_path, tracker="wandb")


def test_tensorboard_gets_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, steps=3, tracker="tensorboard")
    (events,) = (tmp_path / "tensorboard").rglob("events.*")
    found = EventAccumulator(str(events)).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("tiny/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in read_log(tmp_path)]
    assert "tiny/learning_rates/llm" in found.Tags()["scalars"]


def test_the_log_says_memory_and_position(tmp_path):
    train(tmp_path, steps=2, model=TwoPartModel(), batch_at=lambda i: rows(i, 1))
    for line in read_log(tmp_path):
        assert line["peak_memory_gib"] > 0.01 and 0 <= line["data_wait"] <= 1
