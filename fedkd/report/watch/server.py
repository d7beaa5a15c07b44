"""A web server for one page, for the one user of this machine who has the token; it reads nothing.

Anyone on the machine, and any page that is open in a browser, can send requests to a local port.
So: 127.0.0.1 only, a token for each start, the Host header checked (DNS rebinding), no path of a
request ever used as a path of a file, nothing embedded or read by other pages.
"""

from __future__ import annotations

import json
import os
import secrets
import socketserver
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fedkd.errors import ConfigError
from fedkd.report.watch.state import Rendered

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
TEXT_ONLY = "default-src 'none'; base-uri 'none'; form-action 'none'"
NO_FRAMES = "frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": f"{TEXT_ONLY}; {NO_FRAMES}",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
REFUSED = "No access: open the address that fedkd watch has printed, with its token."


class Server(ThreadingHTTPServer):
    """Serves ``page()`` at ``url``; a free port is taken where ``port`` is 0.

    Raises:
        ConfigError: the port is taken, or may not be used.
    """

    daemon_threads = True
    # Elsewhere it lets a port be taken that is free again; on Windows one that is in use.
    allow_reuse_address = os.name != "nt"

    def __init__(self, page: Callable[[], Rendered], port: int = 0) -> None:
        self.page, self.token = page, secrets.token_urlsafe(32)
        try:
            super().__init__((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on port {port} of {LOOPBACK}: {error}; give another --port, or "
                "leave it out for a free one"
            ) from None

    @property
    def url(self) -> str:
        """The address that lets a browser in."""
        return f"http://{LOOPBACK}:{self.server_port}/?token={self.token}"

    @property
    def hosts(self) -> set[str]:
        """What the Host header of a request may be."""
        bare = NAMES if self.server_port == 80 else ()
        return {f"{name}:{self.server_port}" for name in NAMES} | set(bare)

    @property
    def cookie(self) -> str:
        """The name of the cookie; cookies are shared by all ports, so it holds the port."""
        return f"fedkd-{self.server_port}"

    def server_bind(self) -> None:
        """Bind without looking up a name for the address, which might ask the network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass by browsers that went away; anything else is a defect and is shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = 10.0

    def parse_request(self) -> bool:
        """Read the request; methods other than GET and HEAD end here."""
        if not super().parse_request():
            return False
        if self.command not in ("GET", "HEAD"):
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "Read only.", {"Allow": "GET, HEAD"})
            return False
        return True

    def do_GET(self) -> None:
        """Answer: 403 without a token or cookie, else what the path names."""
        path, given = self._asked()
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            self._answer(HTTPStatus.FORBIDDEN, "No access: wrong host.")
        elif given is not None and self._right(given):
            cookie = f"{self.server.cookie}={self.server.token}"
            kept = f"{cookie}; HttpOnly; SameSite=Strict; Path=/"
            # So that the token leaves the address bar and the history.
            self._answer(HTTPStatus.SEE_OTHER, "", {"Set-Cookie": kept, "Location": "/"})
        elif given is not None or not self._right(self._cookie()):
            self._answer(HTTPStatus.FORBIDDEN, REFUSED)
        else:
            self._show(path)

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self.do_GET()

    def _show(self, path: str) -> None:
        page = self.server.page()
        if path == "/":
            more = {"Content-Security-Policy": f"{page.policy or TEXT_ONLY}; {NO_FRAMES}"}
            self._answer(HTTPStatus.OK, page.html, more, kind="text/html")
        elif path == "/main":
            self._answer(HTTPStatus.OK, page.main, kind="text/html")
        elif path == "/state":
            state = {"version": page.version, "runs": page.counts}
            self._answer(HTTPStatus.OK, json.dumps(state), kind="application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _asked(self) -> tuple[str, str | None]:
        """Return the path and the token in the address, None where there is none."""
        try:
            parts = urlsplit(self.path)
            tokens = parse_qs(parts.query, keep_blank_values=True, max_num_fields=8).get("token")
        except ValueError:
            return "", None
        return parts.path, tokens[0] if tokens else None

    def _cookie(self) -> str:
        try:
            found = SimpleCookie("; ".join(self.headers.get_all("Cookie", [])))
        except CookieError:
            return ""
        return found[self.server.cookie].value if self.server.cookie in found else ""

    def _right(self, given: str) -> bool:
        # In a time that does not tell how much of it is right.
        return secrets.compare_digest(
            given.encode(errors="surrogateescape"), self.server.token.encode()
        )

    def _answer(
        self,
        status: HTTPStatus,
        text: str,
        more: dict[str, str] | None = None,
        kind: str = "text/plain",
    ) -> None:
        body = text.encode(errors="replace")
        self.send_response(status)
        for name, value in {**HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is none; nothing of it is repeated."""
        self.close_connection = True
        self._answer(HTTPStatus(code), HTTPStatus(code).phrase)

    def version_string(self) -> str:
        """Say no version of anything."""
        return "fedkd"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: addresses hold the token."""
