"""Apollo inside lmms-eval (its own classes where it is installed) and inside VLMEvalKit."""

import importlib
import importlib.metadata
import importlib.util
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apollo.chat import VideoChat
from apollo.messages import question_prompt

ROOT = Path(__file__).parent.parent
QUESTION, OPTIONS = "Which shape moves?", ["circle", "square", "the star", "ring"]


# ---- lmms-eval's interface, as in its version 0.7.3, for where it is not installed


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.arguments


@dataclass
class GenerationResult:
    text: str


class Lmms:
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self) -> int:
        return self._rank


def stand_in(monkeypatch, name: str, **attributes: Any) -> None:
    """Put a module, and the packages it is in, where imports find it."""
    pieces = name.split(".")
    for end in range(1, len(pieces)):
        monkeypatch.setitem(sys.modules, ".".join(pieces[:end]), ModuleType(pieces[end - 1]))
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def lmms_eval(monkeypatch) -> ModuleType:
    """Our module, on lmms-eval's own classes if it is installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        stand_in(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=SimpleNamespace)
        stand_in(monkeypatch, "lmms_eval.api.model", lmms=Lmms)
        stand_in(
            monkeypatch,
            "lmms_eval.api.instance",
            Instance=Instance,
            GenerationResult=GenerationResult,
        )
    sys.modules.pop("apollo.eval.lmms_eval", None)
    yield importlib.import_module("apollo.eval.lmms_eval")
    sys.modules.pop("apollo.eval.lmms_eval", None)


def request(module: ModuleType, kind: str, *arguments: Any) -> Any:
    metadata = {"task": "t", "doc_id": arguments[3], "repeats": 1}
    return module.Instance(kind, arguments, 0, metadata)


def loaded(module: ModuleType, name: str, docs: list[dict], **options: Any) -> Any:
    model = getattr(module, name)(pretrained="micro", batch_size=1, **options)
    model.task_dict = {"t": {"test": docs}}
    return model


@pytest.fixture
def docs(plain_video) -> list[dict]:
    picture = Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8))
    prompt = question_prompt(QUESTION, OPTIONS)
    return [
        {"visuals": [str(plain_video.path)], "text": prompt},
        {"visuals": [picture], "text": prompt},
        {"visuals": [], "text": prompt},
    ]


def messages_of(doc: dict) -> list[dict]:
    """As lmms-eval's tasks write them."""
    media = [
        {"type": kind, "url": v}
        for v in doc["visuals"]
        for kind in ["video" if isinstance(v, str) else "image"]
    ]
    return [{"role": "user", "content": [*media, {"type": "text", "text": doc["text"]}]}]


def visuals_of(doc: dict) -> list:
    return doc["visuals"]


SETTINGS = {"max_new_tokens": 12, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def test_the_entry_point_names_classes_that_exist(lmms_eval):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["lmms_eval.models"]["apollo"]
    point = importlib.metadata.EntryPoint("apollo", entry, "lmms_eval.models")
    manifest = point.load()()
    assert manifest.model_id == "apollo"
    for path, is_simple in ((manifest.chat_class_path, False), (manifest.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert found.is_simple is is_simple
        assert issubclass(found, sys.modules["lmms_eval.api.model"].lmms)


def test_both_forms_write_what_the_chat_writes(lmms_eval, docs):
    chat = VideoChat.load("micro")
    expected = [
        chat.ask(docs[0]["visuals"][0], docs[0]["text"], max_new_tokens=12).text,
        chat.generate(messages_of(docs[1]), 12),
        chat.generate(messages_of(docs[2]), 12),
    ]
    simple = loaded(lmms_eval, "ApolloSimple", docs)
    requests = [
        request(lmms_eval, "generate_until", doc["text"], SETTINGS, visuals_of, i, "t", "test")
        for i, doc in enumerate(docs)
    ]
    assert simple.generate_until(requests) == expected
    conversing = loaded(lmms_eval, "ApolloChat", docs)
    requests = [
        request(lmms_eval, "generate_until", doc["text"], messages_of, SETTINGS, i, "t", "test")
        for i, doc in enumerate(docs)
    ]
    assert conversing.generate_until(requests) == expected


def test_loss_is_the_chats_score_by_token(lmms_eval, docs):
    model = loaded(lmms_eval, "ApolloSimple", docs)
    chat, end = model.chat, 1  # token: the end of the turn
    for index, doc in enumerate(docs):
        requests = [
            request(
                lmms_eval, "loglikelihood", doc["text"], f" {o}", visuals_of, index, "t", "test"
            )
            for o in OPTIONS
        ]
        results = [result.text for result in model.loglikelihood(requests)]
        expected = chat.score_options(messages_of(doc), OPTIONS)
        for (loss, greedy), option, score in zip(results, OPTIONS, expected, strict=True):
            ids = chat.processor.tokenizer(option, add_special_tokens=False)["input_ids"]
            assert loss * (len(ids) + end) == pytest.approx(-score, abs=2e-3)
            assert greedy is (chat.generate(messages_of(doc), 12) == option)


def test_a_target_may_be_a_function_of_the_document(lmms_eval, docs):
    model = loaded(lmms_eval, "ApolloSimple", docs)
    pair = [
        request(lmms_eval, "loglikelihood", docs[2]["text"], target, visuals_of, 2, "t", "test")
        for target in ("ring", lambda doc: doc["text"].split()[-1])
    ]
    one, two = model.loglikelihood(pair)
    assert one == two


def test_a_video_is_decoded_once_for_questions_in_succession(lmms_eval, docs, monkeypatch):
    decoded = []
    original = lmms_eval.load_video
    monkeypatch.setattr(
        lmms_eval, "load_video", lambda *args: decoded.append(args[0]) or original(*args)
    )
    model = loaded(lmms_eval, "ApolloSimple", docs, sampling="uniform")
    arguments = ("What?", SETTINGS, visuals_of, 0, "t", "test")
    model.generate_until([request(lmms_eval, "generate_until", *arguments)] * 3)
    assert len(decoded) == 1


def test_an_unreadable_video_is_named_and_answered_with_nothing(lmms_eval, docs, tmp_path, caplog):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    model = loaded(lmms_eval, "ApolloChat", [docs[2], {"visuals": [str(bad)], "text": "What?"}])
    requests = [
        request(lmms_eval, "generate_until", "", messages_of, SETTINGS, i, "t", "test")
        for i in (1, 0)
    ]
    nothing, answer = model.generate_until(requests)
    assert nothing == "" and answer and "bad.mp4" in caplog.text


def test_what_cannot_be_done_is_said(lmms_eval, docs, caplog):
    with pytest.raises(ValueError, match="one by one"):
        lmms_eval.ApolloChat(batch_size=4)
    with pytest.raises(ValueError, match="samplig.*uniform"):
        lmms_eval.ApolloChat(sampling="samplig")
    model = loaded(lmms_eval, "ApolloChat", docs)

    def part_of_it(doc):
        (message,) = messages_of(doc)
        return [{**message, "content": [message["content"][0] | {"start_time": 3.0}]}]

    part = request(lmms_eval, "generate_until", "", part_of_it, SETTINGS, 0, "t", "test")
    with pytest.raises(ValueError, match="whole videos"):
        model.generate_until([part])
    hot = SETTINGS | {"temperature": 0.7}
    model.generate_until(
        [request(lmms_eval, "generate_until", "", messages_of, hot, 2, "t", "test")]
    )
    assert "temperature=0.7 is ignored" in caplog.text


@pytest.mark.parametrize(
    ("until", "expected"),
    [(None, "B. a\n\nC"), (["\n\n"], "B. a"), ("a", "B."), ([""], "B. a\n\nC")],
)
def test_a_text_ends_where_the_task_says(lmms_eval, until, expected):
    assert lmms_eval._cut("B. a\n\nC", until) == expected


# ---- VLMEvalKit


def test_vlmevalkit_file(monkeypatch, plain_video, tmp_path, docs):
    class BaseModel:  # vlmeval/vlm/base.py
        INTERLEAVE = False
        allowed_types = ["text", "image"]

        def generate(self, message, dataset=None):
            assert all(item["type"] in self.allowed_types for item in message)
            return self.generate_inner(message, dataset)

    stand_in(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    path = ROOT / "docs" / "vlmevalkit" / "apollo.py"
    spec = importlib.util.spec_from_file_location("vlmeval.vlm.apollo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Apollo(max_new_tokens=12)
    assert model.VIDEO_LLM is True and getattr(model, "nframe", None) is None
    video = {"type": "video", "value": str(plain_video.path)}
    text = {"type": "text", "value": docs[0]["text"]}
    expected = VideoChat.load("micro").ask(plain_video.path, text["value"], max_new_tokens=12).text
    for _ in range(2):
        assert model.generate([video, text], dataset="Video-MME_64frame") == expected
    picture = tmp_path / "picture.png"
    docs[1]["visuals"][0].save(picture)
    assert model.generate([{"type": "image", "value": str(picture)}, text])
