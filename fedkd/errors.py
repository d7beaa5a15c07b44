"""Errors that a user can act on: what is wrong, where, what is allowed, the nearest match, the fix.

The command line prints these as one message without a traceback; anything else that escapes is a
defect of ours and keeps its traceback in the run's ``events.log``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedkdError(Exception):
    """Base of every error that is meant for the user.

    ``exit_code`` is what the command line exits with: 2 for bad input, 1 for a run that failed.
    """

    exit_code = 1


class ConfigError(FedkdError):
    """Bad input: an unknown key, a wrong type, an impossible value or combination."""

    exit_code = 2


class DataError(ConfigError):
    """A data set that is missing, damaged or too small for what was asked."""


class CheckpointError(ConfigError):
    """A checkpoint that is damaged or belongs to another experiment."""


class RunError(FedkdError):
    """A run that could not go on; what had finished is on disk."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest allowed word, or an empty string.

    >>> nearest("fedavgg", ["fedavg", "fedprox"])
    "; did you mean 'fedavg'?"
    >>> nearest("zzz", ["fedavg"])
    ''
    """
    match = difflib.get_close_matches(str(word).lower(), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def unknown(kind: str, word: str, allowed: Iterable[str], where: str = "") -> ConfigError:
    """Build the error for a name that does not exist.

    >>> print(unknown("strategy", "fedprx", ["fedavg", "fedprox"]))
    unknown strategy 'fedprx'; did you mean 'fedprox'? (allowed: fedavg, fedprox)
    """
    names = sorted(allowed)
    place = f" in {where}" if where else ""
    listed = ", ".join(names) or "none"
    return ConfigError(f"unknown {kind} {word!r}{place}{nearest(word, names)} (allowed: {listed})")
