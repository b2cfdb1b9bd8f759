"""The end of `apollo serve`: answers are finished, or it says that not, and nothing remains."""

import json
import signal
import socket
import threading
import time

import pytest
from serving import Process, ask, show

from apollo.cli import main

CHAT = "/v1/chat/completions"


class Stream:
    """An answer that is read in a thread while it is written."""

    def __init__(self, server, **settings):
        body = json.dumps(ask("Talk.", **settings, stream=True)).encode()
        self.connection = server.connect()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.sendall(head.encode() + body)
        self.text = ""
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self):
        with self.connection:
            while block := self.connection.recv(65536):
                self.text += block.decode()

    def wait_for_words(self):
        while self.text.count('"content"') < 3:
            assert self.thread.is_alive(), self.text
            time.sleep(0.01)

    def end(self):
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.text


def assert_nothing_remains(server):
    assert server.pids() == []
    assert list(server.temporary.glob("apollo-*")) == []
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_sigterm_lets_answers_finish(tmp_path, plain_video):
    with Process(tmp_path, prepared=("endless answers",)) as server:
        form = (
            b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n--B--'
        )
        kind = {"Content-Type": "multipart/form-data; boundary=B"}
        assert server.request("/v1/files", form % plain_video.path.read_bytes(), **kind)[0] == 200
        assert list(server.temporary.glob("apollo-*/file-*"))
        streams = [Stream(server, max_tokens=60), Stream(server, max_tokens=50)]
        for stream in streams:
            stream.wait_for_words()
        server.process.send_signal(signal.SIGTERM)
        while True:  # no more connections
            try:
                server.connect().close()
                time.sleep(0.01)
            except ConnectionRefusedError:
                break
        assert any(stream.thread.is_alive() for stream in streams)
        assert [stream.end().count("[DONE]") for stream in streams] == [1, 1]
        assert server.end() == 0
        assert_nothing_remains(server)
        assert "could not be finished" not in server.log and "Traceback" not in server.log


@pytest.mark.slow
def test_what_cannot_be_finished_is_told(tmp_path, plain_video):
    (tmp_path / "a.mp4").write_bytes(plain_video.path.read_bytes())
    options = ("--grace", "1", "--media-root", str(tmp_path))
    prepared = ("endless answers", "endless videos")
    with Process(tmp_path, *options, prepared=prepared) as server:
        streams = [Stream(server, max_tokens=1000) for _ in range(3)]
        for stream in streams:
            stream.wait_for_words()
        found = []
        waiting = threading.Thread(
            target=lambda: found.append(server.request(CHAT, ask("Why?", show("a.mp4"))))
        )
        waiting.start()
        uploading = server.connect()  # a form that never comes to its end
        uploading.sendall(b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n")
        uploading.sendall(b"Content-Type: multipart/form-data; boundary=B\r\n\r\n--B\r\n")
        while len(server.pids()) < 2:  # the process that decodes, which will be busy
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            assert "the server is stopping" in stream.end() and "[DONE]" not in stream.text
        waiting.join()
        ((status, body, _),) = found
        assert status == 503 and body["error"]["code"] == "stopping"
        assert b" 503 " in uploading.recv(65536)
        assert server.end() == 0
        assert "stopped: 4 requests could not be finished" in server.log
        assert "Traceback" not in server.log
        assert_nothing_remains(server)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(tmp_path, number):
    with Process(tmp_path, "--grace", "1000", prepared=("endless answers",)) as server:
        stream = Stream(server, max_tokens=1000)
        deaf = server.connect()  # asks and reads nothing
        deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        stream.wait_for_words()
        server.process.send_signal(number)
        with pytest.raises(ConnectionRefusedError):
            while True:
                server.connect().close()
                time.sleep(0.01)
        length = len(stream.text)
        while len(stream.text) == length:  # it goes on
            assert stream.thread.is_alive()
            time.sleep(0.01)
        server.process.send_signal(number)
        assert "the server is stopping" in stream.end()
        assert server.end() == 0
        assert "could not be finished" in server.log and "Traceback" not in server.log
        assert_nothing_remains(server)
        deaf.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "{taken}"], "cannot listen at 127.0.0.1 port {taken}: Address already in use"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid port 8000"),
        (["--media-root", "{folder}/none"], "--media-root {folder}/none is no folder"),
        (["{folder}/none", "--port", "{free}"], "there is no model '{folder}/none'"),
    ],
)
def test_what_keeps_it_from_starting_is_told_in_one_line(options, words, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("", 0)) as other:
        names = {"taken": taken.getsockname()[1], "folder": tmp_path, "free": 0}
        names["free"] = other.getsockname()[1]
        other.close()
        assert main(["serve", *(option.format(**names) for option in options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("apollo: error: ") and words.format(**names) in line
