import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedkd.cli.watch import watch
from fedkd.errors import ConfigError
from fedkd.report.page.parts import Live, PageContent, Section, Status
from fedkd.report.watch.build import Build, rendered
from fedkd.report.watch.server import Server
from fedkd.report.watch.state import Keeper, Rendered, fingerprint

PAGE = Rendered(
    "<html>whole</html>", "<main>inside</main>", {"finished": 1, "running": 2}, "default-src 'none'"
)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(lambda: PAGE)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    """Return status, headers and body; ``host=`` replaces the Host header, ``""`` leaves it out."""
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    host = headers.pop("host", f"127.0.0.1:{server.server_port}")
    line.putrequest(method, path, skip_host=True)
    if host:
        line.putheader("Host", host)
    for name, value in headers.items():
        line.putheader(name, value)
    line.endheaders()
    answer = line.getresponse()
    body = answer.read().decode()
    line.close()
    return answer.status, answer.headers, body


def allowed(server: Server) -> dict[str, str]:
    return {"Cookie": f"other=1; {server.cookie}={server.token}"}


def test_the_token_is_changed_for_a_cookie_and_leaves_the_address(server: Server) -> None:
    status, headers, body = ask(server, f"/?token={server.token}")
    assert (status, headers["Location"], body) == (303, "/", "")
    name, _, rest = headers["Set-Cookie"].partition("=")
    assert name == f"fedkd-{server.server_port}"
    value, *flags = rest.split("; ")
    assert set(flags) == {"HttpOnly", "SameSite=Strict", "Path=/"}
    status, _, body = ask(server, "/", Cookie=f"{name}={value}")
    assert (status, body) == (200, PAGE.html)


def test_the_address_is_of_this_machine_and_its_token_of_this_start(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/?token={server.token}"
    other = Server(lambda: PAGE)
    other.server_close()
    assert other.token != server.token
    assert len(server.token) >= 43


@pytest.mark.parametrize(
    ("path", "cookie"),
    [
        ("/", ""),
        ("/", "wrong"),
        ("/?token=", ""),
        ("/?token=wrong", "{token}"),
        ("/main", "{token}x"),
        ("/state", "é"),
        ("/nothing", ""),
        ("/?token=%ff%00", ""),
        ("/?" + "&".join("a=1" for _ in range(20)) + "&token={token}", ""),
        ("//[", ""),
    ],
)
def test_nobody_else_gets_in(server: Server, path: str, cookie: str) -> None:
    cookie = cookie.format(token=server.token)
    headers = {"Cookie": f"{server.cookie}={cookie}"} if cookie else {}
    status, _, body = ask(server, path.format(token=server.token), **headers)
    assert status == 403
    assert server.token not in body
    assert "inside" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", ""]
)
def test_a_page_of_another_name_gets_nothing(server: Server, host: str) -> None:
    host = host.format(port=server.server_port)
    for path in ("/", f"/?token={server.token}"):
        status, headers, _ = ask(server, path, host=host, **allowed(server))
        assert status == 403
        assert "Set-Cookie" not in headers


def test_localhost_is_this_machine_too(server: Server) -> None:
    host = f"localhost:{server.server_port}"
    assert ask(server, "/main", host=host, **allowed(server))[0] == 200


def test_routes(server: Server) -> None:
    status, headers, body = ask(server, "/main", **allowed(server))
    assert (status, body) == (200, PAGE.main)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    status, headers, body = ask(server, "/state", **allowed(server))
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(body) == {"version": PAGE.version, "runs": {"finished": 1, "running": 2}}
    assert ask(server, "/main?x=1", **allowed(server))[0] == 200


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/../../etc/passwd", "/report.html", "/%2e%2e/", "/main/", "/State"]
)
def test_no_path_is_one_of_a_file(server: Server, path: str) -> None:
    assert ask(server, path, **allowed(server))[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
def test_nothing_can_be_changed(server: Server, method: str) -> None:
    status, headers, _ = ask(server, "/", method, **allowed(server))
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_a_body(server: Server) -> None:
    got, headed = (ask(server, "/", method, **allowed(server)) for method in ("GET", "HEAD"))
    assert headed[0] == 200
    assert headed[2] == ""
    assert headed[1]["Content-Length"] == got[1]["Content-Length"] == str(len(PAGE.html))
    assert ask(server, "/", "HEAD")[0] == 403


@pytest.mark.parametrize("path", ["/", "/main", "/state", "/nothing"])
@pytest.mark.parametrize("cookie", [True, False])
def test_every_answer_is_closed_to_other_pages(server: Server, path: str, cookie: bool) -> None:
    _, headers, _ = ask(server, path, **(allowed(server) if cookie else {}))
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Server"] == "fedkd"


def test_a_broken_request_is_answered_and_not_repeated(server: Server) -> None:
    status, headers, body = ask(server, "/", "GET /<script> x")
    assert (status, body) == (400, "Bad Request")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "/main", **allowed(server))[0] == 200


def test_a_taken_port_is_named(server: Server) -> None:
    with pytest.raises(ConfigError, match=f"port {server.server_port} .*another --port"):
        Server(lambda: PAGE, server.server_port)


class InTurn:
    """Gives or raises what it holds, one after another, the last for ever."""

    def __init__(self, *held: Any) -> None:
        self.held, self.calls = list(held), 0

    def __call__(self) -> Any:
        value = self.held[min(self.calls, len(self.held) - 1)]
        self.calls += 1
        if isinstance(value, Exception):
            raise value
        return value


def test_a_page_is_made_only_when_something_has_changed() -> None:
    second = Rendered("", "<main>new</main>")
    build, changed = InTurn(PAGE, second), InTurn("a", "a", "b", "b")
    keeper = Keeper(Rendered("", "first"), build, changed)
    assert keeper.page.main == "first"
    assert [keeper.look() for _ in range(4)] == [True, False, True, False]
    assert (build.calls, keeper.page) == (2, second)
    assert PAGE.version != second.version


@pytest.mark.parametrize("error", [ValueError("half a file"), OSError("gone"), KeyError("round")])
def test_the_last_good_page_stays(error: Exception) -> None:
    build = InTurn(PAGE, error, PAGE)
    keeper = Keeper(Rendered("", "first"), build, InTurn("a", "b", "c"))
    keeper.look()
    keeper.look()
    assert keeper.page is PAGE
    assert type(error).__name__ in keeper.problem
    keeper.look()
    assert keeper.problem == ""


def test_a_keeper_makes_pages_by_itself_and_ends() -> None:
    made = threading.Event()

    def build() -> Rendered:
        made.set()
        return PAGE

    keeper = Keeper(Rendered("", "first"), build, lambda: "a", every=0.01)
    keeper.start()
    assert made.wait(5)
    keeper.close()
    assert keeper.page is PAGE


def test_a_fingerprint_follows_what_pages_are_made_of(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1"
    (run / "checkpoint").mkdir(parents=True)
    seen = [fingerprint([tmp_path])]

    def differs(act: Callable[[], Any]) -> bool:
        act()
        seen.append(fingerprint([tmp_path]))
        return seen[-1] != seen[-2]

    metrics = run / "metrics.jsonl"
    assert differs(lambda: metrics.write_bytes(b"a"))
    assert differs(lambda: metrics.write_bytes(b"ab"))
    assert not differs(lambda: (run / "events.log").write_bytes(b"a"))
    assert not differs(lambda: (run / "checkpoint" / "summary.json").write_bytes(b"a"))
    assert differs(lambda: (run / "summary.json").write_bytes(b"{}"))
    assert differs(lambda: (run / "failed.json").write_bytes(b"{}"))
    assert differs(metrics.unlink)


def test_what_cannot_be_read_is_said_above_the_last_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = Section("headline", "Results", ("the last good one",))
    good = PageContent(
        name="x", subtitle="", sections=(section,), status=Status(3, 1, 0, 0), live=Live()
    )
    monkeypatch.setattr(Build, "_content", InTurn(good, ValueError("<b>half</b>\na file"), good))
    build = Build([tmp_path], tmp_path, None)
    first, second, third = build(), build(), build()
    assert "could not be brought up to date" in second.main
    assert "&lt;b&gt;half&lt;/b&gt; a file" in second.main
    assert "the last good one" in second.main
    assert second.counts == {"finished": 3, "running": 1, "waiting": 0, "failed": 0}
    assert first == third
    assert second.version != first.version


def test_without_any_run_the_page_says_so(tmp_path: Path) -> None:
    build = Build([tmp_path], tmp_path / "aside", None)
    assert "The page is being made" in build.opening().main
    page = build()
    assert "There is nothing to show yet" in page.main
    assert "holds no run" in page.main
    assert "sha256-" in page.policy, "the page's own script may not run"
    assert "'unsafe-inline'" not in page.policy.split("style-src")[0]


def test_the_policy_is_that_of_the_page_whatever_a_run_is_called() -> None:
    evil = '"><meta http-equiv="Content-Security-Policy" content="default-src *">'
    content = PageContent(name=evil, subtitle=evil, sections=(), live=Live())
    assert "default-src *" not in rendered(content).policy
    assert "default-src 'none'" in rendered(content).policy


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_only_this_machine_is_served(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="on this machine only"):
        watch([tmp_path], 0, tmp_path, host)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        watch([tmp_path / "nothing"], 0, tmp_path)
