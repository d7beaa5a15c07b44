"""``fedkd watch``: serve the page of runs under way until Ctrl-C; it writes nothing beside them."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkd.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost")


def watch(folders: Sequence[Path], port: int, workspace: Path, host: str = LOOPBACK[0]) -> int:
    """Serve the page of some folders; return 0 when stopped by Ctrl-C or SIGTERM.

    Raises:
        ConfigError: a folder does not exist, the port is taken, or the host is another machine's.
    """
    if host not in LOOPBACK:
        raise ConfigError(
            f"--host {host}: the page is served on this machine only ({' or '.join(LOOPBACK)}); "
            "from another one go through ssh -L PORT:127.0.0.1:PORT"
        )
    if not folders:
        raise ConfigError("name the folder of a run, a comparison or a sweep")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"there is no folder {folder}; name that of a run, a comparison or a sweep (it is "
                "there from the first moment of fedkd run or fedkd sweep)"
            )
    try:
        with terminable():
            serve(folders, port, workspace)
    except KeyboardInterrupt:
        print("stopped watching; runs under way go on", file=sys.stderr)
    return 0


def serve(folders: Sequence[Path], port: int, workspace: Path) -> None:
    """Print the address and serve until interrupted; what was drawn is removed then.

    Raises:
        ConfigError: the port is taken.
    """
    from fedkd.report.watch.build import Build
    from fedkd.report.watch.server import Server
    from fedkd.report.watch.state import Keeper

    place = tempfile.TemporaryDirectory(prefix="fedkd-watch-", ignore_cleanup_errors=True)
    with place as aside:
        build = Build(folders, Path(aside), workspace)
        keeper = Keeper(build.opening(), build, build.changed)
        server = Server(lambda: keeper.page, port)
        try:
            keeper.start()
            print(server.url, flush=True)
            print("Open it in a browser on this machine; Ctrl-C ends it.", file=sys.stderr)
            server.serve_forever()
        finally:
            server.server_close()
            keeper.close()


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end what is inside as Ctrl-C does, so that everything is tidied up.

    Ctrl-C too, which a shell script has its background jobs ignore.
    """

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
