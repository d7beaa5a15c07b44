"""What a user is told who has not the hub's client libraries, which are optional, or no network."""

import importlib.util
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fedkd.data import hub
from fedkd.data.registries import sources
from fedkd.errors import DataError

NAMES = ["cifar10", "cifar100", "cinic10", "femnist"]


@pytest.fixture
def bare(monkeypatch):
    """An installation without the extra."""
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_extra_the_error_says_what_to_install_and_what_else_can_be_done(name, bare):
    with pytest.raises(DataError) as caught:
        sources.get(name)().load()
    for words in (name, "pip install 'fedkd[datasets]'", "folder", f"$FEDKD_DATA/{name}"):
        assert words in str(caught.value)
    assert "pip install 'fedkd[datasets]'" in sources.get(name)().missing()


def test_local_files_need_the_extra_too(tmp_path, bare):
    with pytest.raises(DataError, match=r"reading cifar10 needs an extra: pip install"):
        sources.get("cifar10")(folder=str(tmp_path)).load()


def test_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    assert hub.local_folder("cifar10", "") is None
    (tmp_path / "cifar10").mkdir()
    assert hub.local_folder("cifar10", "") == tmp_path / "cifar10"
    assert sources.get("cifar10")().missing() == ""
    with pytest.raises(DataError, match="folder = 'nowhere' is no folder"):
        hub.local_folder("cifar10", "nowhere")
    assert "nowhere" in sources.get("cifar10")(folder="nowhere").missing()


class Answer(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


class Refusal(Answer):
    status = 404


@pytest.mark.parametrize("handler", [Answer, Refusal])
def test_whoever_answers_is_reachable(monkeypatch, handler):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        assert hub.reachable(f"http://127.0.0.1:{server.server_port}")
    finally:
        thread.join()
        server.server_close()
    assert not hub.reachable(f"http://127.0.0.1:{server.server_port}")


def test_silence_and_nonsense_are_not_reachable(monkeypatch):
    asked = threading.Event()

    def hang(*args, **kwargs):
        asked.wait(20)
        raise OSError

    monkeypatch.setattr(hub.urllib.request, "urlopen", hang)
    assert not hub.reachable("http://example.invalid", seconds=0.05)
    asked.set()
    assert not hub.reachable("nonsense")
