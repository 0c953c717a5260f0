"""Downloads end: whatever a server sends, or does not send, within a limit of time and size, and over http only."""

import contextlib
import http.server
import threading
import time

import pytest

from tnt_timm.evaluation import downloads
from tnt_timm.evaluation.downloads import download
from tnt_timm.evaluation.image_files import NamedImages, find, unknown_scheme

PATIENCE_S = 20  # servers stop dribbling after that


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one of the situations below, by path."""

    def do_GET(self):
        getattr(self, self.path.strip("/").partition("/")[0].partition("?")[0])()

    def head(self, status=200, **fields):
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def good(self):
        self.head(Content_Length=4)
        self.wfile.write(b"good")

    def without_length(self):
        self.head()
        self.wfile.write(b"good")

    def cut(self):
        self.head(Content_Length=1000)
        self.wfile.write(b"cut")

    def dribble(self, what=b"x"):
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and not self.server.closing.wait(0.05):
            self.wfile.write(what)
            self.wfile.flush()

    def slow_body(self):
        self.head(Content_Length=10_000)
        self.dribble()

    def slow_head(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        self.dribble()

    def silent(self):
        self.server.closing.wait(PATIENCE_S)

    def endless(self):
        self.head()
        self.dribble(b"x" * 2**20)

    def elsewhere(self):
        self.head(302, Location=self.path.partition("?")[2])

    def in_circles(self):
        self.head(302, Location=self.path)

    def no_http(self):
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the client is gone
            super().handle()


@pytest.fixture(scope="module")
def url():
    """url(path) on a local server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.closing = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda path: f"http://127.0.0.1:{server.server_port}/{path}"
        server.closing.set()
        server.shutdown()


@pytest.mark.parametrize("path", ["good", "without_length", "elsewhere?/good", "good/a b/ä.png", "good#part"])
def test_good_downloads(url, path):
    assert download(url(path)) == b"good"
    assert download(url(path).replace("http://", "HTTP://")) == b"good"


@pytest.mark.parametrize(
    "path, reason",
    [
        ("cut", "download incomplete: 997 bytes are missing"),
        ("elsewhere?file:///etc/hostname", "not allowed"),
        ("elsewhere?ftp://127.0.0.1/x.png", "unknown url type: ftp"),
        ("elsewhere?data:image/png;base64,AAAA", "not allowed"),
        ("in_circles", "redirect"),
        ("no_http", "BadStatusLine"),
        ("missing", "cannot be downloaded"),
        ("endless", "larger than 3 MiB"),
        ("slow_body", "not complete after 0.5 s"),
        ("slow_head", "not complete after 0.5 s"),
        ("silent", "not complete after 0.5 s"),
    ],
)
def test_bad_downloads_end_soon_with_a_reason(url, path, reason, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_BYTES", 3 * 2**20)
    start = time.monotonic()
    with pytest.raises(OSError, match=reason) as caught:
        download(url(path), total_s=0.5 if "after" in reason else 10)
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://", "http://[::1", "http://127.0.0.1:port/", "https://127.0.0.1:9/x.png"])
def test_wrong_addresses(address):
    with pytest.raises(OSError, match="cannot be downloaded"):
        download(address, total_s=10)


@pytest.mark.parametrize(
    "name", ["ftp://host/a.png", "data:image/png;base64,AAAA", "file:///tmp/a.png", "s3://b/a.png"]
)
def test_other_schemes(name):
    assert f"not {name.partition(':')[0]}:" in unknown_scheme(name)


def test_names_that_are_no_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:x.png").write_bytes(b"")
    assert [unknown_scheme(name) for name in ("data:x.png", "a.png", "HTTPS://host/a.png")] == ["", "", ""]
    assert find(["HTTP://host/a.png"])[0] == ["HTTP://host/a.png"]
    assert NamedImages(["HTTP://host/a.png"]).name(0) == "HTTP://host/a.png"
