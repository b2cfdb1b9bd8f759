"""Serving: everybody gets the answer that they would get alone, by OpenAI's own client too."""

import asyncio
import base64
import json
import time

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from serving import ask, running, show

from apollo.chat import VideoChat, load_model
from apollo.serve.engine import Engine
from apollo.serve.jobs import Event, Job, Prompt, PromptError, Text, Wishes
from apollo.serve.media import MediaLimits, MediaStore
from apollo.serve.rows import Prefix, PrefixCache
from apollo.serve.schema import Reply
from apollo.serve.server import Answer, Settings
from apollo.serve.sources import RefusedError, Source

QUESTIONS = ("What happens first?", "List the events, the last first.", "Describe the video.")
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    for seed in range(3)
]


@pytest.fixture(scope="module")
def model_and_processor():
    return load_model("micro")


@pytest.fixture(scope="module")
def server():
    with running(cache_bytes=2**28) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def video_url(plain_video):
    return "data:video/mp4;base64," + base64.b64encode(plain_video.path.read_bytes()).decode()


# ---- the engine ----------------------------------------------------------------------------------


class Asker:
    """Asks an engine about the images, without a server."""

    def __init__(self, model, processor, **options):
        self.engine = Engine(model, processor, **options)
        self.engine.start()
        self.tokens = [self.engine.encode(self._batch(self.first(i, "x"))[1]) for i in range(3)]

    def first(self, image, question):
        content = [{"type": "image", "image": IMAGES[image]}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    def _batch(self, messages):
        batch = self.engine.processor(messages, add_generation_prompt=True)
        return batch["input_ids"][0], batch["pixel_values"]

    def submit(self, messages, image, wishes):
        ids, _ = self._batch(messages)
        media = [(f"image {image}", self.tokens[image].result())]
        events = []
        job = Job(Prompt.of(self.engine.model, ids, media), wishes, events.append)
        self.engine.submit(job)
        return job, events

    def texts(self, submitted):
        for _, events in submitted:
            while not (events and events[-1].reason):
                time.sleep(0.01)
        return ["".join(event.text for event in events) for _, events in submitted]


# Drawn answers are long and all different, so that a row that is mixed up with another shows.
WISHES = [Wishes(24, temperature=5, seed=7), Wishes(9), Wishes(16, temperature=3, seed=1)]
ASKED = [(i, q, w) for q in QUESTIONS[:2] for i in range(2) for w in WISHES]


def test_answers_do_not_depend_on_their_company_nor_on_what_is_kept(model_and_processor):
    alone = Asker(*model_and_processor, cache_bytes=0)
    expected = []
    for image, question, wishes in ASKED:
        submitted = alone.submit(alone.first(image, question), image, wishes)
        expected += alone.texts([submitted])
        assert submitted[0].num_reused == 0
    assert alone.engine.cache_bytes == 0
    assert len(set(expected)) > len(ASKED) // 2 and max(map(len, expected)) > 40
    together = Asker(*model_and_processor, max_rows=5)
    for _ in range(2):  # the second time, all prompts are known
        submitted = [together.submit(together.first(i, q), i, w) for i, q, w in ASKED]
        assert together.texts(submitted) == expected
    assert all(job.num_reused == len(job.prompt.ids) - 1 for job, _ in submitted)
    assert alone.engine.stop() == together.engine.stop() == 0


def test_answers_are_those_of_the_chat(model_and_processor):
    asker, chat = Asker(*model_and_processor), VideoChat(*model_and_processor)
    messages = asker.first(0, QUESTIONS[0])
    for question in QUESTIONS[1:]:
        (text,) = asker.texts([asker.submit(messages, 0, Wishes(30))])
        assert text == chat.generate(messages, 30)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]
    job, _ = submitted = asker.submit(messages, 0, Wishes(30))
    asker.texts([submitted])
    num_new = len(job.prompt.ids) - job.num_reused
    assert num_new < 40 < job.num_reused  # its own words, and what ends a turn
    asker.engine.stop()


def test_a_prompt_is_read_in_pieces_and_leaves_no_trace_when_cancelled(
    model_and_processor, monkeypatch
):
    whole = Asker(*model_and_processor)
    messages = whole.first(1, "word " * 150)
    (expected,) = whole.texts([whole.submit(messages, 1, WISHES[0])])
    monkeypatch.setattr("apollo.serve.engine.READ_TOKENS", 32)
    pieces = Asker(*model_and_processor)
    cancelled, events = pieces.submit(messages, 1, WISHES[0])
    pieces.engine.cancel(cancelled)
    submitted = [pieces.submit(messages, 1, WISHES[0]), pieces.submit(messages, 1, WISHES[0])]
    assert pieces.texts(submitted) == [expected, expected]
    assert not any(event.reason for event in events)
    whole.engine.stop()
    pieces.engine.stop()


def test_a_fault_ends_its_answers_and_not_the_engine(model_and_processor, monkeypatch):
    asker = Asker(*model_and_processor)
    asker.tokens[0].result()
    write = asker.engine._write
    monkeypatch.setattr(asker.engine, "_write", lambda: 1 / 0)
    _, events = submitted = asker.submit(asker.first(0, "Why?"), 0, Wishes(9))
    asker.texts([submitted])
    assert events[-1].reason == "error" and "fault" in events[-1].message
    monkeypatch.setattr(asker.engine, "_write", write)
    _, events = submitted = asker.submit(asker.first(0, "Why?"), 0, Wishes(9))
    asker.texts([submitted])
    assert events[-1].reason in ("stop", "length")
    asker.engine.stop()


def test_the_window_is_a_limit(model_and_processor):
    model, _ = model_and_processor
    with pytest.raises(PromptError, match="window"):
        Prompt.of(model, torch.zeros(5000, dtype=torch.long), [])


def test_prefixes_are_found_replaced_and_dropped():
    def prefix(*key):
        states = torch.zeros(1, len(key), 4)  # 16 bytes a token
        return Prefix(np.array(key), [(states, states)])

    cache = PrefixCache(max_bytes=32 * 6)
    cache.add(prefix(1, 2, 3))
    assert cache.find(np.array([1, 2, 9]))[1] == 2
    assert cache.find(np.array([1, 2, 3]))[1] == 2  # the last token is always read
    assert cache.find(np.array([5]))[0] is None
    cache.add(prefix(1, 2, 3, 4))
    assert cache.num_bytes == 32 * 4
    cache.add(prefix(7, 8, 9))
    assert cache.num_bytes == 32 * 3 and cache.find(np.array([1, 2, 3]))[0] is None


@pytest.mark.parametrize("stop", [(), ("zz",), ("c d", "e")])
def test_text_comes_in_pieces_that_make_up_the_whole(model_and_processor, stop):
    _, processor = model_and_processor
    tokenizer = processor.tokenizer
    whole = "  heart: aé ☃ b c d e f  "
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    text, found, is_stopped = Text(stop), "", False
    for end in range(1, len(ids) + 1):
        piece, is_stopped = text.add(tokenizer, ids[:end], end == len(ids))
        found += piece
        if is_stopped:
            break
    expected = tokenizer.decode(ids).strip()
    if "e" in stop:
        expected = expected[: expected.index("e")].rstrip()
    assert found == expected and is_stopped == ("e" in stop)


# ---- the server, through OpenAI's client ---------------------------------------------------------


def test_words_are_sent_as_they_come():
    """One by one to who is quick; together to who is not."""

    async def stream():
        answer, sent = Answer(job=None, events=asyncio.Queue()), []
        chunks = answer.chunks(Reply("micro"), with_usage=False)
        sent.append(await anext(chunks))  # the role
        for word in ("white", " arch"):
            answer.events.put_nowait(Event(word))
            sent.append(await anext(chunks))
        for event in (Event(" and"), Event(" ring"), Event("", "stop")):
            answer.events.put_nowait(event)
        return sent + [chunk async for chunk in chunks]

    *data, done = [chunk.removeprefix("data: ").strip() for chunk in asyncio.run(stream())]
    choices = [json.loads(each)["choices"][0] for each in data]
    words = [each["delta"].get("content") for each in choices]
    assert words == ["", "white", " arch", " and ring", None] and done == "[DONE]"
    assert choices[-1]["finish_reason"] == "stop"


def test_a_conversation_plain_and_streamed(server, client, plain_video, model_and_processor):
    (listed,) = client.models.list().data
    stored = client.files.create(file=plain_video.path.open("rb"), purpose="user_data")
    assert stored.bytes == plain_video.path.stat().st_size
    chat = VideoChat(*model_and_processor)
    expected = [chat.ask(plain_video.path, QUESTIONS[0]).text, chat.ask(None, QUESTIONS[1]).text]

    messages = ask(QUESTIONS[0], show(stored.id))["messages"]
    first = client.chat.completions.create(model=listed.id, messages=messages)
    assert first.choices[0].message.content == expected[0]
    assert first.choices[0].finish_reason == "stop"
    messages += [first.choices[0].message, {"role": "user", "content": QUESTIONS[1]}]
    num_clips = server.engine.counts["clips_encoded"]
    chunks = list(
        client.chat.completions.create(
            model=listed.id, messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected[1]
    assert chunks[-2].choices[0].finish_reason == "stop"
    usage = chunks[-1].usage
    assert server.engine.counts["clips_encoded"] == num_clips  # the video was not encoded again
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 40


def test_one_video_in_many_ways_is_one_video(server, client, plain_video, video_url):
    stored = client.files.create(file=plain_video.path.open("rb"), purpose="user_data")
    num_loaded = server.server.store.num_loaded
    parts = [show(video_url), show(stored.id), {"type": "file", "file": {"file_id": stored.id}}]
    answers = [server.request("/v1/chat/completions", ask("Why?", part)) for part in parts]
    assert {status for status, *_ in answers} == {200}
    assert len({body["choices"][0]["message"]["content"] for _, body, _ in answers}) == 1
    assert server.server.store.num_loaded <= num_loaded + 1


def test_the_page_learns_what_the_model_sees(server, client, plain_video):
    stored = client.files.create(file=plain_video.path.open("rb"), purpose="user_data")
    status, body, _ = server.request(f"/v1/files/{stored.id}/clips")
    assert status == 200 and body["duration_s"] == 12.0
    assert [clip["start_s"] for clip in body["clips"]] == [0, 2, 4, 6, 8, 10]
    assert all(frame.startswith("data:image/jpeg") for frame in body["clips"][0]["frames"])
    client.files.delete(stored.id)
    with pytest.raises(openai.NotFoundError, match="upload it again"):
        client.files.retrieve(stored.id)


def test_images_and_text_alone(server, tmp_path):
    IMAGES[0].save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    image = show(f"data:image/png;base64,{data}", "image")
    for body in (ask("What is it?", image, image), ask("Hello"), ask("Hi", temperature=1, seed=3)):
        status, answer, _ = server.request("/v1/chat/completions", body)
        assert status == 200 and answer["usage"]["prompt_tokens"] > 3


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "there is only the model 'micro'"),
        ({"n": 2}, openai.BadRequestError, "n: Input should be 1"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"tools": []}, openai.BadRequestError, "tools: this server has no such setting"),
        ({"extra_body": {"sampling": "x"}}, openai.BadRequestError, "choose from fps"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "x", "content": "a"}]}, openai.BadRequestError, "role must be"),
        (ask("<|im_end|>"), openai.BadRequestError, "reserved token"),
        (ask("word " * 3000), openai.BadRequestError, "window is 2048"),
        (ask("a", {"type": "video", "video": "/etc/passwd"}), openai.BadRequestError, "video_url"),
    ],
)
def test_mistakes_are_named(client, settings, error, match):
    settings = {"model": "micro", **ask("Hello"), **settings}
    with pytest.raises(error, match=match):
        client.chat.completions.create(**settings)


@pytest.mark.parametrize("streams", [True, False])
def test_who_leaves_costs_nothing_more(streams, monkeypatch):
    with running() as server:
        server.engine._ends = set()  # answers never end by themselves
        write = server.engine._write
        monkeypatch.setattr(server.engine, "_write", lambda: (time.sleep(0.01), write()))
        options = {"model": "micro", "max_tokens": 1000, **ask("Talk.")}
        url = f"{server.url}/v1"
        if streams:
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            with client.chat.completions.create(stream=True, **options) as stream:
                next(iter(stream))
        else:
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=0.5)
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(**options)
        server.wait_until_idle()
        assert 0 < server.engine.counts["tokens_written"] < 500


def test_many_clients_at_once(server, video_url, model_and_processor):
    expected = {}
    chat = VideoChat(*model_and_processor)
    data = base64.b64decode(video_url.partition(",")[2])
    for question in QUESTIONS:
        expected[question] = chat.ask(data, question, max_new_tokens=40).text

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [*QUESTIONS] * 8
            return asked, await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="micro", max_tokens=40, **ask(question, show(video_url))
                    )
                    for question in asked
                )
            )

    for question, answer in zip(*asyncio.run(ask_all()), strict=True):
        assert answer.choices[0].message.content == expected[question]


def test_a_full_house_asks_to_come_back(server):
    gate = server.server.gate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "num_open", gate.max_open)
        status, body, headers = server.request("/v1/chat/completions", ask("Hello"))
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert body["error"]["code"] == "queue_full"
    assert server.request("/v1/chat/completions", ask("Hello"))[0] == 200


def test_health_metrics_and_page(server):
    assert server.request("/health")[:2] == (200, {"status": "ok"})
    status, text, _ = server.request("/metrics")
    assert status == 200 and "apollo_tokens_written_total" in text
    status, page, headers = server.request("/")
    assert status == 200 and "<title>" in page
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert "http://" not in page and "https://" not in page  # no outside resource


def test_stopping_tells_those_who_wait(monkeypatch):
    with running() as server:
        server.engine._ends = set()
        write = server.engine._write
        monkeypatch.setattr(server.engine, "_write", lambda: (time.sleep(0.01), write()))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="micro", stream=True, max_tokens=1000, **ask("Talk.")
        )
        next(iter(stream))
        assert server.engine.stop() == 1
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert server.request("/health")[0] == 503


# ---- media ---------------------------------------------------------------------------------------


def test_media_are_shared_kept_and_dropped(model_and_processor, plain_video):
    engine = Engine(*model_and_processor)
    engine.start()

    async def use() -> None:
        store = MediaStore(engine, MediaLimits(), num_processes=1, max_bytes=10**6)
        source = Source("it", "a", plain_video.path)
        both = await asyncio.gather(store.get("video", source), store.get("video", source))
        assert both[0] is both[1] and store.num_loaded == 1
        assert await store.get("video", source) is both[0]
        assert (await store.get("video", source, "center")).tokens.shape[0] == 1
        store.max_bytes = 1
        await store.get("video", Source("it", "b", plain_video.path))
        assert not store._media
        await store.close()

    asyncio.run(use())
    engine.stop()


def test_a_load_that_nobody_wants_is_stopped(model_and_processor, plain_video):
    engine = Engine(*model_and_processor)
    engine.start()

    async def use() -> None:
        store = MediaStore(engine, MediaLimits(), num_processes=1)
        (loader,) = store._loaders
        task = asyncio.create_task(store.get("video", Source("it", "a", plain_video.path)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        await store.get("video", Source("it", "a", plain_video.path))
        assert loader not in store._loaders and len(store._loaders) == 1
        await store.close()

    asyncio.run(use())
    engine.stop()


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (MediaLimits(max_duration_s=5), "lasts 12 s, and at most 5 s"),
        (MediaLimits(max_pixels=100), "160 x 32 pixels"),
    ],
)
def test_media_beyond_the_limits_are_refused(model_and_processor, plain_video, limits, match):
    async def use() -> None:
        store = MediaStore(Engine(*model_and_processor), limits, num_processes=1)
        try:
            with pytest.raises(RefusedError, match=match) as caught:
                await store.get("video", Source("it", "a", plain_video.path))
            assert caught.value.status == 413 and str(plain_video.path) not in str(caught.value)
        finally:
            await store.close()

    asyncio.run(use())


def test_settings_keep_the_key_to_themselves():
    assert "secret" not in repr(Settings(api_key="secret"))
