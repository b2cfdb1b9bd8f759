"""Serving strangers: what is hostile is refused with a proper status, and the server goes on."""

import socket
import ssl
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostile import hostile_bodies
from internet import OTHER, PUBLIC, Internet, PlainContext, drip, endless, respond
from serving import ask, running

from apollo.serve.guards import BodyLimits
from apollo.serve.media import MediaLimits
from apollo.serve.server import Settings
from apollo.serve.sources import (
    Fetcher,
    RefusedError,
    Uploads,
    find_under,
    is_public,
    read_data_url,
)

CHAT = "/v1/chat/completions"
LIMITS = BodyLimits(max_body_bytes=2**20, max_upload_bytes=2**21, time_limit_s=3, pause_limit_s=0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    settings = Settings(
        "micro", "sesame", media_root=root, body=LIMITS, media=MediaLimits(time_limit_s=20)
    )
    with running(settings) as running_server:
        yield running_server


def send(server, path, body=None, key="sesame", **headers):
    return server.request(path, body, Authorization=f"Bearer {key}", **headers)


# ---- addresses -----------------------------------------------------------------------------------

PRIVATE = """127.0.0.1 127.8.9.1 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1
192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1
fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
2002:7f00:1:: 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2001:0:0:0:0:0:f5ff:fffe nonsense""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_known(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::808:808"])
def test_public_addresses_are_known(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "path",
    ["../secret.mp4", "..", ".", "", "/etc/passwd", "file:///etc/passwd", "file://host/a.mp4"]
    + ["link.mp4", "folder", "a.mp4/../../secret.mp4", "%2e%2e/secret.mp4", "\0", "a" * 5000]
    + ["file:///%2e%2e/secret.mp4", "loop", "pipe", "/proc/self/environ", "~/a.mp4", "none.mp4"],
)
def test_nothing_outside_the_root_is_opened(tmp_path, path):
    import os

    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "a.mp4").write_bytes(b"a")
    (tmp_path / "secret.mp4").write_bytes(b"s")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    with pytest.raises(RefusedError) as caught:
        find_under(root, path)
    assert caught.value.status == 404 and str(tmp_path) not in str(caught.value)


def test_files_under_the_root_are_found(tmp_path):
    (tmp_path / "a b.mp4").write_bytes(b"a")
    (tmp_path / "link.mp4").symlink_to("a b.mp4")
    for url in ("a b.mp4", f"{tmp_path}/a b.mp4", f"file://{tmp_path}/a%20b.mp4", "link.mp4"):
        assert find_under(tmp_path, url).data == tmp_path / "a b.mp4"
    with pytest.raises(RefusedError, match="upload"):
        find_under(None, "a b.mp4")


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:video/mp4,abc", 400),
        ("data:text/html;base64,YQ==", 400),
        ("data:video/mp4;base64,", 400),
        ("data:video/mp4;base64,a*c=", 400),
        ("data:video/mp4;base64,YQ=", 400),
        ("data:video/mp4;base64,é", 400),
        ("data:" + "video/mp4;" * 1000, 400),
        ("data:video/mp4;base64," + "A" * 4000, 413),
    ],
)
def test_data_urls(url, status):
    with pytest.raises(RefusedError) as caught:
        read_data_url(url, 1000)
    assert caught.value.status == status and len(str(caught.value)) < 100


# ---- fetching ------------------------------------------------------------------------------------


@contextmanager
def fetching(names, answer, max_bytes=1000, time_limit_s=2.0):
    internet = Internet(names, answer)
    uploads = Uploads(max_bytes, 10 * max_bytes)
    context = PlainContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        yield Fetcher(uploads, time_limit_s, internet.resolve, internet.connect, context), internet
    finally:
        internet.server.shutdown()
        internet.server.server_close()
        uploads.close()


def test_public_urls_are_fetched_also_when_redirected():
    def answer(handler):
        if handler.headers["Host"] == "a.example":
            respond(handler, b"", 302, Location="https://b.example/v%20w.mp4?x=1")
        else:
            assert handler.path == "/v%20w.mp4?x=1"
            respond(handler)

    with fetching({"a.example": [[PUBLIC]], "b.example": [[OTHER]]}, answer) as (fetcher, internet):
        upload = fetcher.fetch("https://a.example/")
        assert Path(upload.source.data).read_bytes() == b"video"
        assert internet.connected == [PUBLIC, OTHER]
        assert PlainContext.hosts[-2:] == ["a.example", "b.example"]  # whose certificate it must be


@pytest.mark.parametrize(
    "target",
    ["https://inside.example/", "http://b.example/", "file:///etc/passwd", "https://b.example:22/"]
    + ["https://mixed.example/", "https://u:p@b.example/", "gopher://b.example/"],
)
def test_redirects_lead_nowhere_else(target):
    names = {
        "a.example": [[PUBLIC]],
        "inside.example": [["10.0.0.1"]],
        "mixed.example": [[PUBLIC, "127.0.0.1"]],
        "b.example": [[PUBLIC]],
    }

    def answer(handler):
        respond(handler, b"", 307, Location=target)

    with fetching(names, answer) as (fetcher, internet):
        with pytest.raises(RefusedError) as caught:
            fetcher.fetch("https://a.example/")
        assert caught.value.status in (400, 403)
        assert internet.connected == [PUBLIC]


def test_a_name_that_changes_its_address_gains_nothing():
    names = {"a.example": [[PUBLIC], ["127.0.0.1"]]}
    with fetching(names, respond) as (fetcher, internet):
        fetcher.fetch("https://a.example/")  # looked up once, connected to what was checked
        assert internet.connected == [PUBLIC]
        with pytest.raises(RefusedError, match="not public"):
            fetcher.fetch("https://a.example/")
        assert internet.connected == [PUBLIC]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda h: respond(h, status=404), "status 404"),
        (lambda h: respond(h, b""), "empty"),
        (lambda h: respond(h, Content_Length=99), "breaks off|IncompleteRead"),
        (lambda h: respond(h, Content_Length=10**9), "larger than"),
        (lambda h: respond(h, b"", 301, Location="/"), "redirects too often"),
        (lambda h: h.wfile.write(b"nonsense\r\n\r\n"), "BadStatusLine"),
        (drip, "took too long"),
        (endless, "larger than"),
    ],
)
def test_bad_servers_are_given_up(answer, match):
    names = {"a.example": [[PUBLIC]]}
    with fetching(names, answer, time_limit_s=0.5) as (fetcher, _):
        with pytest.raises(RefusedError, match=match):
            fetcher.fetch("https://a.example/")
        assert not list(Path(fetcher.uploads._folder.name).iterdir())  # nothing half is left


def test_the_oldest_uploads_make_room():
    uploads = Uploads(max_bytes=10, max_total_bytes=25)
    first, second, third = (uploads.save([b"x" * 10], "a") for _ in range(3))
    with pytest.raises(RefusedError):
        uploads.get(first.file_id)
    assert uploads.get(second.file_id).source.data.exists() and uploads.get(third.file_id)
    assert not first.source.data.exists()
    with pytest.raises(RefusedError, match="larger"):
        uploads.save([b"x" * 6, b"x" * 6], "a")
    uploads.close()
    assert not second.source.data.exists()


# ---- the server ----------------------------------------------------------------------------------


def test_the_key_is_needed_and_nothing_is_said_without(server):
    for path in (CHAT, "/v1/models", "/v1/files/file-x", "/metrics", "/openapi.json", "/nothing"):
        assert server.request(path)[0] == 401
        for key in ("", "sesam", "sesame ", "sesame\xe9", "x" * 5000):
            expected = 401 if key != "sesame " else 200
            status, body, headers = send(server, "/v1/models", key=key)
            assert status == expected
            if status == 401:
                assert headers["www-authenticate"] == "Bearer" and "sesame" not in str(body)
    assert server.request("/health")[0] == server.request("/")[0] == 200
    assert send(server, "/v1/models")[0] == 200


def test_hostile_requests_are_refused(server):
    num_bodies = 0
    for name, body, expected in hostile_bodies():
        if len(body) > LIMITS.max_body_bytes:
            expected = 413
        status, answer, headers = send(server, CHAT, body)
        assert status == expected, (name, answer)
        assert set(answer) == {"error"} and len(answer["error"]["message"]) < 600, name
        assert "/tmp" not in str(answer) and "Traceback" not in str(answer)
        assert headers["x-content-type-options"] == "nosniff"
        num_bodies += 1
    assert num_bodies > 150
    server.wait_until_idle()
    assert send(server, CHAT, ask("Hello"))[0] == 200


def test_forms(server):
    def post(body, kind="multipart/form-data; boundary=B"):
        return send(server, "/v1/files", body, **{"Content-Type": kind})[0]

    start = b'--B\r\nContent-Disposition: form-data; name="file"; filename="../../x"\r\n\r\n'
    assert post(start + b"hello\r\n--B--\r\n") == 200
    for body in (
        b"",
        b"--B--",
        b"nonsense",
        start,
        start + b"\r\n--B--\r\n",
        2 * (start + b"a\r\n"),
    ):
        assert post(body) == 400
    assert post(b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--B--\r\n') == 400
    assert post(b"{}", "application/json") == 400
    assert post(start + b"x" * 2**21 + b"x" * 2**17) == 413
    folder = Path(server.server.uploads._folder.name)
    assert [path.parent for path in folder.rglob("*")] == [folder]


def raw(server, *pieces, pause_s=0.0):
    """Send bytes as they are; return what comes back until the server closes."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            found = b""
            while block := connection.recv(65536):
                found += block
                if b"\r\n\r\n" in found and pause_s == 0:
                    break
        except (ConnectionResetError, BrokenPipeError):
            pass
        return found


HEAD = b"POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n"


@pytest.mark.parametrize("path", [CHAT.encode(), b"/v1/files"])
def test_slow_and_endless_bodies_are_ended(server, path):
    head = HEAD % path + b"Content-Type: multipart/form-data; boundary=B\r\n"
    assert b" 408 " in raw(server, head + b"Content-Length: 1000\r\n\r\n--B")
    chunks = [b"%x\r\n%s\r\n" % (2**19, b"x" * 2**19)] * 6
    found = raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks)
    assert b" 413 " in found or b" 400 " in found
    for length in (b"99999999999999", b"-1", b"x"):
        found = raw(server, head + b"Content-Length: %s\r\n\r\n" % length)
        assert b" 413 " in found or b" 400 " in found
    assert send(server, "/health")[0] == 200
    assert not any(server.app._num_bytes.values())


def test_other_sites_and_names_are_refused(server):
    headers = {"Origin": "https://evil.example"}
    assert send(server, CHAT, ask("Hello"), **headers)[0] == 403
    assert send(server, CHAT, ask("Hello"), Origin=server.url)[0] == 200
    with running(Settings("micro", only_local=True)) as local:
        assert local.request("/v1/models")[0] == 200
        assert local.request("/v1/models", Host="localhost:8000")[0] == 200
        assert local.request("/v1/models", Host="evil.example")[0] == 421


def test_the_log_tells_no_contents(server, caplog):
    with caplog.at_level("INFO"):
        send(server, CHAT, ask("my secret question"))
        send(server, "/v1/files/file-0123456789abcdef?token=secret")
        deadline = time.monotonic() + 10
        while "/v1/files/" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)  # the line is written after the answer
    assert "/v1/files/file-..." in caplog.text
    assert "secret" not in caplog.text and "0123456789" not in caplog.text
