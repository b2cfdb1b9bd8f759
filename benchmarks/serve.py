"""Many clients at once against one after another, and first questions against follow-up ones.

    python benchmarks/serve.py [--clients 64] [--videos 16] [--requests 500]

Starts `apollo serve` as a user does and asks it over HTTP, answers streamed. The videos are made
here, from the micro world; the questions are of the kinds that its model was trained on.

- load: the same list of requests, once one after another (each waits for the end of the one before)
  and once by many clients, each of which asks its next question when its last is answered. Each way
  gets a fresh server with the same settings, the videos uploaded and nothing else known, so both
  decode and encode each video once and may reuse what they have read of it: the gain is of company
  alone. The ways take turns for some rounds; the ratio is the median over rounds. Each answer is
  compared with what the model says alone (`VideoChat`, in this process, without any server).
- follow_up: on an idle server, for each video the time until the first words of an answer come, of
  the first question and of a second one in the same conversation. The upload is not counted. Of the
  first question, its parts are decoding, encoding and reading the prompt.

Both are measured for two models. Of the micro model, whose LLM needs 4 ms for a token and whose
answers have six of them, most of a request is HTTP and videos, which company does not make cheaper.
`larger` has its encoders and an LLM of 15 M weights drawn at random, which writes 16 digits: the
proportions of a useful model are further in that direction.

Seconds of the processor (server and decoders together) are given too, for machines that are shared.
Writes benchmarks/results/serve.json.
"""

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo.messages import question_prompt
from apollo.runtime import environment, read_jsonl

RESULT = Path(__file__).parent / "results" / "serve.json"
RUN = ("-m", "apollo")
MAX_TOKENS = {"micro": 128, "larger": 16}
LISTS = ("List the events with their times.", "List the events, the last first.")
ONE, MANY = "one_after_another", "many_at_once"


@dataclass(frozen=True)
class Request:
    """A question on a video, and what the model says alone."""

    video: Path
    question: str
    expected: str = ""


@dataclass(frozen=True)
class Answer:
    """What came back: the text, when its first words and its end came, and its tokens."""

    text: str
    first_s: float
    total_s: float
    num_tokens: int


@dataclass(frozen=True)
class Model:
    """A model and the most tokens of its answers."""

    path: str
    max_tokens: int


def make_larger(folder: Path) -> str:
    """The micro model with a larger LLM of random weights; returns its folder."""
    import torch

    from apollo.chat import VideoChat
    from apollo.model import ApolloForConditionalGeneration

    micro = VideoChat.load("micro")
    config, text = micro.model.config, micro.model.config.text_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = 384, 8, 1024
    text.num_attention_heads = text.num_key_value_heads = 6
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.tie_word_embeddings = config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = ApolloForConditionalGeneration(config)
    # It writes digits only, each of them the same token when the answer comes back as a turn; all
    # else has 0, which is less than the best of two opposites.
    digits = micro.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        head = torch.zeros_like(model.lm_head.weight)
        head[digits[:5]] = model.lm_head.weight[digits[:5]]
        head[digits[5:]] = -head[digits[:5]]
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    micro.processor.save_pretrained(folder)
    return str(folder)


# ---- the server and its clients ------------------------------------------------------------------


class Server:
    """A server in a process of its own."""

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, max_tokens: int, videos: Iterable[Path]
    ) -> None:
        self.process, self.port, self.max_tokens = process, port, max_tokens
        self.wait_until_healthy()
        self.ids = {video: self.upload(video) for video in videos}
        self.ask([{"role": "user", "content": "Hello"}])  # the first pass prepares much

    def wait_until_healthy(self) -> None:
        """Wait for the model to be loaded."""
        while True:
            assert self.process.poll() is None, "the server does not start"
            try:
                if self.get("/health"):
                    return
            except OSError:
                time.sleep(0.05)

    def get(self, path: str) -> str:
        """The text at a path."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def upload(self, video: Path) -> str:
        """Store a video there; returns its id."""
        head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(
            "POST",
            "/v1/files",
            head + video.read_bytes() + b"\r\n--B--\r\n",
            {"Content-Type": "multipart/form-data; boundary=B"},
        )
        return json.load(connection.getresponse())["id"]

    def ask(self, messages: list[dict[str, Any]]) -> Answer:
        """Ask, and read the answer as it is written.

        Raises:
            AssertionError: There is no whole answer.
        """
        body = {
            "messages": messages,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        started_s = time.perf_counter()
        first_s, text, reason, num_tokens = 0.0, "", None, 0
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 200, (response.status, response.read())
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content", "")
                reason = choice["finish_reason"] or reason
            if text and not first_s:
                first_s = time.perf_counter() - started_s
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
        total_s = time.perf_counter() - started_s
        connection.close()
        assert reason in ("stop", "length"), "the answer broke off"
        return Answer(text, first_s or total_s, total_s, num_tokens)

    def ask_about(self, request: Request) -> Answer:
        """Ask a question on a video that was uploaded."""
        return self.ask([self.shown(request.video, request.question)])

    def shown(self, video: Path, question: str) -> dict[str, Any]:
        """The message that shows a video and asks."""
        part = {"type": "video_url", "video_url": {"url": self.ids[video]}}
        return {"role": "user", "content": [part, {"type": "text", "text": question}]}

    def cpu_s(self) -> float:
        """Seconds of the processor so far, of the server and of the processes that it started."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(stat.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])))
        ticks = sum(
            spent for pid, (parent, spent) in parents.items() if self.process.pid in (pid, parent)
        )
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(model: Model, videos: Iterable[Path]) -> Iterator[Server]:
    """Run a fresh server that has the videos."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, *RUN, "serve", model.path, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield Server(process, port, model.max_tokens, videos)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode()[-4000:])
            raise
        finally:
            process.terminate()
            process.wait()


# ---- what is asked -------------------------------------------------------------------------------


def make_requests(folder: Path, num_videos: int, num_requests: int) -> list[Request]:
    """Make the videos and questions on them: lists, descriptions of clips, and multiple choice.

    They are dealt so that neighbours in the list are on different videos.
    """
    from apollo.world.make import make_world

    make_world(folder / "world", num_videos, seed=0, split="test")
    asked: dict[Path, list[str]] = {}
    for scene, row in enumerate(read_jsonl(folder / "world" / "scenes.jsonl")):
        video = folder / "world" / "videos" / f"{scene:06d}.mp4"
        starts = range(0, int(row["duration_s"]) - 1, 2)
        spans = [f"{s // 60:02}:{s % 60:02}-{(s + 2) // 60:02}:{(s + 2) % 60:02}" for s in starts]
        asked[video] = [*LISTS, *(f"Describe the clip from {span}." for span in spans)]
    for row in read_jsonl(folder / "world" / "questions.jsonl"):
        asked[folder / "world" / row["video"]].append(
            question_prompt(row["question"], row["options"])
        )
    turns = zip(*(itertools.cycle(questions) for questions in asked.values()), strict=False)
    dealt = (
        Request(video, question)
        for questions in turns
        for video, question in zip(asked, questions, strict=True)
    )
    return list(itertools.islice(dealt, num_requests))


def answer_alone(model: Model, requests: list[Request]) -> list[Request]:
    """Add what the model says to each without a server."""
    from apollo.chat import VideoChat

    chat, known = VideoChat.load(model.path), {}
    clips = {r.video: chat.ask(r.video, "Hello", max_new_tokens=1).clips for r in requests}
    for request in requests:
        key = (request.video, request.question)
        if key not in known:
            answer = chat.ask(
                clips[request.video], request.question, max_new_tokens=model.max_tokens
            )
            known[key] = answer.text
    return [Request(r.video, r.question, known[r.video, r.question]) for r in requests]


# ---- measuring -----------------------------------------------------------------------------------


def measure_load(model: Model, requests: list[Request], num_clients: int) -> dict[str, Any]:
    """Ask all requests of a fresh server by so many clients."""
    videos = list(dict.fromkeys(request.video for request in requests))
    answers: list[Answer | None] = [None] * len(requests)
    places = iter(range(len(requests)))
    lock = threading.Lock()

    def be_a_client(_: int) -> None:
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return
            answers[place] = server.ask_about(requests[place])

    with serving(model, videos) as server:
        cpu_s, started_s = server.cpu_s(), time.perf_counter()
        with ThreadPoolExecutor(num_clients) as pool:
            list(pool.map(be_a_client, range(num_clients)))
        spent_s, cpu_s = time.perf_counter() - started_s, server.cpu_s() - cpu_s
    pairs = list(zip(requests, answers, strict=True))
    come = [answer for answer in answers if answer is not None]
    return {
        "lost": len(answers) - len(come),
        "wrong": sum(a is not None and a.text != request.expected for request, a in pairs),
        "seconds": round(spent_s, 2),
        "cpu_seconds": round(cpu_s, 2),
        "requests_per_s": round(len(requests) / spent_s, 2),
        "tokens_per_s": round(sum(answer.num_tokens for answer in come) / spent_s, 1),
        "first_words_s": percentiles([answer.first_s for answer in come]),
        "whole_answer_s": percentiles([answer.total_s for answer in come]),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and upper percentiles."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{cut}": round(cuts[cut - 1], 4) for cut in (50, 90, 99)}


def compare_loads(
    model: Model, requests: list[Request], num_clients: int, num_rounds: int
) -> dict[str, Any]:
    """Take turns with one client and many."""
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(num_rounds):
        ways = [(ONE, 1), (MANY, num_clients)]
        found = {way: measure_load(model, requests, n) for way, n in ways[:: (-1) ** number]}
        rounds.append(found)
        print(json.dumps(found), flush=True)

    def gain(name: str) -> float:
        return round(statistics.median(r[ONE][name] / r[MANY][name] for r in rounds), 2)

    expected = [request.expected for request in requests]
    return {
        "rounds": rounds,
        "throughput_ratio": gain("seconds"),
        "cpu_ratio": gain("cpu_seconds"),
        "lost": sum(way["lost"] for r in rounds for way in r.values()),
        "wrong": sum(way["wrong"] for r in rounds for way in r.values()),
        "different_requests": len({(r.video, r.question) for r in requests}),
        "different_answers": len(set(expected)),
    }


def measure_follow_ups(model: Model, videos: list[Path]) -> dict[str, Any]:
    """Ask a first and a second question on each video, one after another."""
    first_s, second_s = [], []
    with serving(model, videos) as server:
        for video in videos:
            messages = [server.shown(video, LISTS[0])]
            answer = server.ask(messages)
            messages += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": LISTS[1]},
            ]
            first_s.append(answer.first_s)
            second_s.append(server.ask(messages).first_s)
    shares = [second / first for first, second in zip(first_s, second_s, strict=True)]
    return {
        "videos": len(videos),
        "first_question_s": percentiles(first_s),
        "follow_up_s": percentiles(second_s),
        "follow_up_share": round(statistics.median(shares), 3),
        "largest_share": round(max(shares), 3),
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        asked = make_requests(Path(name), args.videos, args.requests)
        paths = {"micro": "micro", "larger": make_larger(Path(name) / "larger")}
        for which, path in paths.items():
            model = Model(path, MAX_TOKENS[which])
            requests = answer_alone(model, asked)
            videos = list(dict.fromkeys(request.video for request in requests))
            follow_up = measure_follow_ups(model, videos)
            print(which, json.dumps(follow_up), flush=True)
            load = compare_loads(model, requests, args.clients, args.rounds)
            found[which] = {"load": load, "follow_up": follow_up}
    result = {
        "models": found,
        "targets": {"throughput_ratio": ">= 3", "follow_up_share": "<= 0.2", "lost, wrong": 0},
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
