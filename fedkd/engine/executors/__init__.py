"""How the client work of one exchange is run: a choice that must never change its result.

An executor gets independent pieces of work and returns their outcomes in the order asked for.
"""

from fedkd.engine.executors.base import Executor, Homed, Outcome, attempt, cores, one_torch_thread
from fedkd.engine.executors.choice import Choice, choose, make_executor
from fedkd.engine.executors.cohort import Cohort
from fedkd.engine.executors.process import Processes
from fedkd.engine.executors.serial import Serial
from fedkd.engine.executors.thread import Threads

__all__ = [
    "Choice",
    "Cohort",
    "Executor",
    "Homed",
    "Outcome",
    "Processes",
    "Serial",
    "Threads",
    "attempt",
    "choose",
    "cores",
    "make_executor",
    "one_torch_thread",
]
