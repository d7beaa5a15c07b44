"""The command line: it reads arguments, calls the library and prints; it has no logic of its own.

Exit codes: 0 fine, 1 a run failed (or a defect of ours), 2 bad input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from fedkd.errors import FedkdError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors become one message on stderr."""
    import click

    from fedkd.cli.commands import app

    try:
        code = app(None if arguments is None else list(arguments), standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except FedkdError as error:
        complain(str(error))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        return _nobody_reads()
    except Exception as error:
        complain(f"{unexpected(error)}\n{traceback.format_exc()}")
        return 1


def complain(message: str) -> None:
    """Print one message on stderr."""
    import click

    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)


def unexpected(error: BaseException) -> str:
    """Say that an error is not the user's."""
    kind = type(error).__name__
    return f"{kind}: {error} (this is a defect of fedkd, or of a drop-in file)"


def _nobody_reads() -> int:
    """End quietly when the reader of our output has gone, as in ``fedkd list | head -1``."""
    # Python would complain about the broken pipe once more when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
