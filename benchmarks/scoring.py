"""How fast canaries and references are scored: batches against one sequence at a time.

``python benchmarks/scoring.py`` scores 10,000 references of the text scenario under both models,
in alternating passes of one session, and writes ``benchmarks/scoring.json``: sequences a second and
the ratio of both ways, median and range. The scores are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkd.audit.scoring import Scores, score
from fedkd.clients.client import personal
from fedkd.data.dataset import Dataset
from fedkd.data.federated import Split, as_split
from fedkd.data.text_sources import PydocTopics
from fedkd.models.base import build
from fedkd.privacy.canaries.draw import draw
from fedkd.privacy.canaries.options import Canaries
from fedkd.rng import Rng

ONE_BY_ONE = 400
"""Sequences of a pass without batches: enough to time, few enough to wait for."""


def references(dataset: Dataset, count: int) -> Split:
    """Return the references of the text scenario as examples."""
    options = Canaries(kind="text", references=count)
    found = draw(options, dataset, None, [100], Rng(0), Rng(1))
    return as_split(found.reference_x, found.reference_y, dataset.task())


def timed(model: str, examples: Split, dataset: Dataset, batch_size: int) -> tuple[float, Scores]:
    """Return seconds and scores."""
    predict = personal(build(model, {}, dataset.task(), Rng(0)))
    start = time.perf_counter()
    scores = score(predict, "personal", examples, batch_size, model)
    return time.perf_counter() - start, scores


def measure(passes: int, count: int) -> dict[str, Any]:
    """Return the figures of both models."""
    dataset = PydocTopics(topics=10, rows_per_topic=20, length=32).load()
    examples = references(dataset, count)
    few = Split(examples.x[:ONE_BY_ONE], examples.y[:ONE_BY_ONE])
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "sequences": count, "length": 32}
    for model in ("gpt-tiny", "lstm"):
        rates: dict[str, list[float]] = {"batched": [], "single": []}
        for _ in range(passes):
            seconds, together = timed(model, examples, dataset, 512)
            rates["batched"].append(count / seconds)
            seconds, apart = timed(model, few, dataset, 1)
            rates["single"].append(ONE_BY_ONE / seconds)
            np.testing.assert_allclose(together.bits[:ONE_BY_ONE], apart.bits, rtol=1e-5)
        ratios = [b / s for b, s in zip(rates["batched"], rates["single"], strict=True)]
        found[model] = {
            "sequences a second": summary(rates["batched"]),
            "one at a time": summary(rates["single"]),
            "ratio": summary(ratios),
        }
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Return median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--references", type=int, default=10_000)
    given = parser.parse_args()
    figures = {"passes": given.passes, **measure(given.passes, given.references)}
    text = json.dumps(figures, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(text)
