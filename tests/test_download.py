"""Downloads, against a server on this machine: good, truncated, altered, refusing, stalling."""

import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import ex3_convnet
import utils

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Mirror(BaseHTTPRequestHandler):
    """The first part of the path says how the mirror behaves."""

    def do_GET(self):
        behaviour = self.path.split("/")[1]
        if behaviour == "503":
            return self.send_error(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if behaviour == "other":
            self.wfile.write(CONTENT[::-1])
        elif behaviour == "truncates":
            self.wfile.write(CONTENT[:1000])
        elif behaviour == "stalls":
            self.wfile.write(CONTENT[:1000])
            self.wfile.flush()
            self.server.stop.wait(30)
        else:
            self.wfile.write(CONTENT)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    """The address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.stop = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stop.set()
    server.shutdown()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(utils, "STALL_SECONDS", 1)


def download(server, path, *behaviours):
    return utils.download([f"{server}/{b}/{path.name}" for b in behaviours], path, SHA256)


def test_a_good_mirror_is_named_and_used(server, tmp_path, capsys):
    path = tmp_path / "new" / "archive"
    assert download(server, path, "good") == path
    assert (tmp_path / "new" / "archive").read_bytes() == CONTENT
    assert f"from {server.split('/')[2]}" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["503", "other", "truncates", "stalls"])
def test_after_a_bad_mirror_the_next_is_tried(server, tmp_path, bad):
    start = time.perf_counter()
    download(server, tmp_path / "archive", bad, "good")
    assert (tmp_path / "archive").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["archive"]
    assert time.perf_counter() - start < 10
    assert socket.getdefaulttimeout() is None


def test_no_mirror_leaves_nothing_and_names_the_ways_on(server, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with pytest.raises(utils.Problem) as problem:
        download(server, path, "503", "other", "truncates", "stalls")
    for way in (f"put {path.name} into", "point --dataset to an image folder",
                "--dataset=synthetic"):
        assert way in str(problem.value)
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_never_answers_ends_by_time_out(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, but says nothing
        start = time.perf_counter()
        with pytest.raises(utils.Problem, match="timed out"):
            download(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path / "archive", "x")
    assert time.perf_counter() - start < 10


def test_without_network_the_script_ends_with_one_sentence(folder, monkeypatch, capsys):
    for proxy in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    start = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        utils.run_script(ex3_convnet.main)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--dataset=synthetic" in error
    assert time.perf_counter() - start < 60
