"""`apollo ask` and `apollo chat` with `--server`: the same answers, and mistakes in one line."""

import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import running

from apollo import cli
from apollo.chat import VideoChat
from apollo.serve.api import Settings

QUESTIONS = ("What happens first?", "Which of these is it?", "And then?")


@pytest.fixture(scope="module")
def server():
    with running(Settings("micro", "sesame")) as running_server:
        yield running_server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("APOLLO_API_KEY", "sesame")


def test_the_answers_are_those_of_the_model_here(server, plain_video, capsys, monkeypatch):
    chat = VideoChat.load("micro")
    path = str(plain_video.path)
    first, _, second = (
        chat.ask(video, question, max_new_tokens=30).text
        for video, question in zip((path, None, None), QUESTIONS, strict=True)
    )
    line = ["ask", path, QUESTIONS[0], "--server", server.url, "--max-new-tokens", "30"]
    assert cli.main(line) == 0
    assert capsys.readouterr().out.strip() == first
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join((QUESTIONS[0], "", *QUESTIONS[1:]))))
    assert cli.main(["chat", path, *line[3:]]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 3 and (lines[0], lines[2]) == (first, second)
    assert err.count("the question is empty") == 1
    assert cli.main([*line, "--sampling", "center", "--options", "yes", "no"]) == 0
    assert not server.server.uploads._uploads  # nothing is left there


def test_mistakes_end_in_one_line(server, plain_video, tmp_path, capsys, monkeypatch):
    path, bad = str(plain_video.path), tmp_path / "bad.mp4"
    bad.write_bytes(b"nonsense")
    for video, options, expected in (
        (path, ["--server", "localhost:8000"], "is no URL"),
        (path, ["--server", "http://127.0.0.1:9"], "is the server running?"),
        (path, ["--server", server.url, "--model", "gpt"], "only the model 'micro'"),
        (str(bad), ["--server", server.url], "bad.mp4"),
    ):
        assert cli.main(["ask", video, "Why?", *options]) != 0
        out, err = capsys.readouterr()
        assert not out and expected in err and err.count("\n") == 1
    monkeypatch.delenv("APOLLO_API_KEY")
    assert cli.main(["ask", path, "Why?", "--server", server.url]) != 0
    assert "set the environment variable APOLLO_API_KEY" in capsys.readouterr().err


@contextmanager
def other_server(replies):
    """A server that knows models and chat completions only, and keeps what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}))

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.path.endswith("/chat/completions"):
                self.reply("{}", 404)
                return
            asked.append(json.loads(body))
            self.reply("".join(f"data: {reply}\n\n" for reply in replies), kind="event-stream")

        def reply(self, text, status=200, kind="json"):
            self.send_response(status)
            self.send_header(
                "Content-Type", "application/json" if kind == "json" else f"text/{kind}"
            )
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_a_server_without_uploads_gets_the_video_in_the_request(plain_video, capsys):
    def chunk(text):
        return json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})

    with other_server([chunk("a "), chunk("ball"), "[DONE]"]) as (url, asked):
        assert cli.main(["ask", str(plain_video.path), "Why?", "--server", url]) == 0
    assert capsys.readouterr().out == "a ball\n"
    assert asked[0]["model"] == "m" and "sampling" not in asked[0]
    assert asked[0]["messages"][0]["content"][0]["video_url"]["url"].startswith("data:video/mp4;")


def test_an_error_in_the_middle_is_told(plain_video, capsys):
    error = json.dumps({"error": {"message": "the server is stopping", "type": "server_error"}})
    with other_server([error]) as (url, _):
        assert cli.main(["ask", str(plain_video.path), "Why?", "--server", url]) != 0
    assert "answers: the server is stopping" in capsys.readouterr().err
