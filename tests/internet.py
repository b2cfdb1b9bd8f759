"""The internet, played by one local server: names, their addresses, and hosts that mean harm."""

import http.server
import socket
import ssl
import threading
import time
import urllib.parse

from apollo.serve.sources import resolve

PUBLIC, OTHER = "93.184.216.34", "93.184.216.35"


class PlainContext(ssl.SSLContext):
    """Expects no TLS, so that a test can play the internet."""

    hosts: list[str] = []

    def wrap_socket(self, sock, server_hostname=None, **options):
        self.hosts.append(server_hostname)
        return sock


class Internet:
    """Names, their addresses at each look-up, and one local server that stands for all hosts."""

    def __init__(self, names, answer):
        self.names = {name: list(addresses) for name, addresses in names.items()}
        self.connected = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # whoever is cut off
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def resolve(self, host):
        addresses = self.names[host]
        return addresses.pop(0) if len(addresses) > 1 else addresses[0]

    def connect(self, address, port):
        assert port == 443
        self.connected.append(address)
        return socket.create_connection(self.server.server_address)


def respond(handler, body=b"video", status=200, **headers):
    handler.send_response(status)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in {"Content-Length": len(body), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 4096)


# ---- a whole world of it, for a server in a process of its own -----------------------------------

NAMES = {
    "public.example": [[PUBLIC]],
    "private.example": [["10.0.0.1"]],
    "metadata.example": [["169.254.169.254"]],
    "local.example": [["::1"]],
    "mixed.example": [[PUBLIC, "127.0.0.1"]],
    "nowhere.example": [[]],
}
"""Name -> its addresses at each look-up. Names like N.changing.example are public at the first."""

WAYS = {
    "missing": lambda handler: respond(handler, status=404),
    "empty": lambda handler: respond(handler, b""),
    "page": lambda handler: respond(handler, b"<html>no video</html>"),
    "short": lambda handler: respond(handler, Content_Length=99),
    "huge": lambda handler: respond(handler, Content_Length=10**12),
    "negative": lambda handler: respond(handler, Content_Length=-1),
    "loop": lambda handler: respond(handler, b"", 301, Location=handler.path),
    "nowhere": lambda handler: respond(handler, b"", 302),
    "nonsense": lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"),
    "headers": lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000),
    "silent": lambda handler: time.sleep(20),
    "drip": drip,
    "endless": endless,
}
"""First part of a path -> what such a host does; `/redirect?URL` redirects."""


class WholeInternet(Internet):
    def __init__(self):
        super().__init__(NAMES, self.answer)

    def resolve(self, host):
        if host.endswith(".changing.example"):
            self.names.setdefault(host, [[PUBLIC], ["127.0.0.1"]])
        return super().resolve(host) if host in self.names else resolve(host)

    @staticmethod
    def answer(handler):
        way, _, target = handler.path[1:].partition("?")
        if way == "redirect":
            respond(handler, b"", 307, Location=urllib.parse.unquote(target))
        else:
            WAYS[way](handler)
