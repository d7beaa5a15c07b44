"""Heads beside a network: they turn the features of one block into soft labels.

The same small network serves on the client (beside its own blocks) and on the server (the global
head of a cut), and is trained through the one loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.chunk import rows_at_once
from fedkd.clients.client import ByNetworks, Client, Predictor
from fedkd.clients.local import Batch, Compared, Occasion, Term, fit
from fedkd.clients.terms import Distil, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.objectives.base import Objective
from fedkd.distill.targets import SampleTargets
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.models.head import make_head
from fedkd.rng import Rng
from fedkd.types import Arrays, kind_of, prefixed, select


class Weighted(Term):
    """Another term with a weight for each example, ``w_i * term_i``; w has mean 1.

    The mean is one over all examples, so that these are coupled: refused under DP-SGD.
    """

    dp = "batch-coupled"

    def __init__(self, term: Term, weights: Tensor) -> None:
        self.term, self.weights, self.weight = term, weights / weights.mean(), term.weight
        self.teaches = term.teaches

    def __call__(self, batch: Batch) -> Tensor:
        return self.term(batch) * self.weights[batch.index]

    def compared(self, batch: Batch) -> Compared | None:
        return self.term.compared(batch)

    def placed(self, occasion: Occasion) -> Sequence[Term]:
        inside = self.term.placed(occasion)
        return [self if term is self.term else Weighted(term, self.weights) for term in inside]

    def begins(self) -> None:
        self.term.begins()

    def keep(self, state: Arrays) -> None:
        self.term.keep(state)

    def at(self) -> frozenset[str]:
        return self.term.at()

    def modules(self) -> Sequence[nn.Module]:
        return self.term.modules()


def train_head(
    head: BlockNet,
    features: Tensor,
    labels: Tensor,
    probs: Tensor,
    weights: Tensor,
    *,
    objective: Objective,
    temperature: float,
    kd_weight: float,
    training: Training,
    rng: Rng,
) -> None:
    """Train a global head on what clients uploaded: ``CE + b T^2 D(p || softmax(G(h)/T))``.

    ``features`` (n, d), ``labels`` (n,), ``probs`` (n, C) at ``temperature``, ``weights`` (n,).

    Raises:
        RunError: the loss is not finite.
    """
    terms: list[Term] = [Weighted(Supervised(), weights)]
    if kd_weight:
        distil = Distil(objective, SampleTargets(probs), temperature, kd_weight)
        terms.append(Weighted(distil, weights))
    try:
        fit(head, Split(features, labels), terms, training, training.lr, rng)
    except RunError:
        raise RunError(
            f"training of a global head diverged; lower strategy.server_lr (now {training.lr:.4g}) "
            "or set strategy.head_max_grad_norm = 2.0"
        ) from None


@torch.inference_mode()
def infer(model: BlockNet, x: Tensor, at: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits (n, C) and pooled features (n, d) by block, in evaluation mode, in chunks."""
    model.eval()
    parts = [model.forward_with_features(part, at) for part in x.split(rows_at_once(x))]
    logits = torch.cat([p[0] for p in parts])
    return logits, {b: torch.cat([p[1][b] for p in parts]) for b in at}


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return soft labels ``softmax(z / T)``, (..., C), as a constant."""
    return functional.softmax(logits.detach() / temperature, dim=-1)


def with_heads(
    model: BlockNet, own: Mapping[str, nn.Module], shared: Mapping[str, nn.Module]
) -> Predictor:
    """Return the predictors of a network with heads, from one pass through the network.

    ``personal``: the network's own output; ``global_head``: the deepest of ``shared``;
    ``ensemble``: mean probability of the network and all of ``shared``; ``own_heads``: likewise
    with the client's ``own`` heads, the control that no communication is needed for.
    """
    at = frozenset({*own, *shared})

    def predict(x: Tensor) -> dict[str, Tensor]:
        if not at:
            return {"personal": model(x)}
        logits, features = model.forward_with_features(x, at)
        found = {"personal": logits}
        taught = [head(features[block]) for block, head in shared.items()]
        if taught:
            found["global_head"] = taught[-1]
            found["ensemble"] = mixed([logits, *taught])
        if own:
            found["own_heads"] = mixed([logits, *(h(features[b]) for b, h in own.items())])
        return found

    rule = f"heads own={','.join(own)} shared={','.join(shared)}" if at else "personal"
    return ByNetworks(rule, (model, *own.values(), *shared.values()), predict)


def mixed(logits: Sequence[Tensor]) -> Tensor:
    """Return log-probabilities (B, C) of the mean of the given outputs' probabilities."""
    logps = torch.stack([functional.log_softmax(z, dim=1) for z in logits])
    return logps.logsumexp(0) - math.log(len(logits))


def client_head(client: Client, block: str, size: int, hidden: int) -> BlockNet:
    """Return a client's own head of a block: the one it kept, or the common fresh one."""
    rng = Rng(client.seed, ("head", block))
    kept = select(client.state, f"head/{block}")
    return make_head(size, hidden, client.task.classes, rng, kept).to(client.device)


def keep_heads(client: Client, heads: Mapping[str, nn.Module]) -> None:
    """Keep a client's ``heads`` for the next round; those of a former cut are forgotten."""
    for key in [k for k in client.state if kind_of(k) == "head"]:
        del client.state[key]
    for block, head in heads.items():
        client.state.update(prefixed(f"head/{block}", to_arrays(head)))
