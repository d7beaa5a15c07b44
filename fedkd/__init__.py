"""fedkd: federated, privacy-preserving knowledge distillation, simulated on one machine.

>>> import fedkd
>>> experiment = fedkd.experiment({"strategy": "fedd2s", "rounds": 5, "clients": {"count": 4}})
>>> experiment.strategy.name, experiment.rounds
('fedd2s', 5)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkd.audit.run import audit_run as audit_run
    from fedkd.audit.study import audit_study as audit_study
    from fedkd.config import Experiment as Experiment
    from fedkd.config import experiment as experiment
    from fedkd.config import load as load
    from fedkd.engine.simulate import simulate as simulate
    from fedkd.engine.simulation import run as run
    from fedkd.engine.study import run_study as run_study
    from fedkd.report.collection import collect as collect
    from fedkd.report.full import full as full_report
    from fedkd.strategies.base import Strategy as Strategy
    from fedkd.sweep.run import run_sweep as run_sweep

__version__ = "0.1.0"

_WHERE = {
    "Experiment": "fedkd.config",
    "audit_run": "fedkd.audit.run",
    "audit_study": "fedkd.audit.study",
    "collect": "fedkd.report.collection",
    "experiment": "fedkd.config",
    "full_report": "fedkd.report.full",
    "load": "fedkd.config",
    "run": "fedkd.engine.simulation",
    "run_study": "fedkd.engine.study",
    "run_sweep": "fedkd.sweep.run",
    "simulate": "fedkd.engine.simulate",
    "Strategy": "fedkd.strategies.base",
}
_CALLED = {"full_report": "full"}
__all__ = [
    "Experiment",
    "Strategy",
    "audit_run",
    "audit_study",
    "collect",
    "experiment",
    "full_report",
    "load",
    "run",
    "run_study",
    "run_sweep",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: ``import fedkd`` itself is cheap."""
    if name not in _WHERE:
        raise AttributeError(f"module 'fedkd' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), _CALLED.get(name, name))
