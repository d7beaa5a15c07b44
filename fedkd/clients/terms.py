"""The loss terms that local training is put together from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.local import Batch, Compared, Occasion, Term
from fedkd.clients.stacked.modules import join
from fedkd.data.federated import UNLABELLED, Split
from fedkd.distill.objectives.base import Inner, Objective, Temperature, divided, squared
from fedkd.distill.targets import Targets, joined
from fedkd.errors import RunError, unknown
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.models.head import make_head
from fedkd.types import Arrays, prefixed, select


def row_mean(values: Tensor, y: Tensor) -> Tensor:
    """Return the mean over the tokens of each row that have a label: (B, L) -> (B,); 0 for none."""
    real = y != UNLABELLED
    return torch.where(real, values, torch.zeros_like(values)).sum(1) / real.sum(1).clamp_min(1)


def alike(owner: type[Term], terms: Sequence[Term], *options: str) -> bool:
    """Return whether all are exactly of type ``owner``, with the same weight and ``options``.

    What :meth:`Term.merged` asks first: a subclass may compute something else, so it says for
    itself how it is merged, or is not.
    """
    first = terms[0]
    return all(
        type(term) is owner
        and all(getattr(term, o) == getattr(first, o) for o in ("weight", *options))
        for term in terms
    )


class OnWeights(Term):
    """What ``weights-only`` terms of K clients become: it reads ``batch.weights``, returns (K,).

    ``parameters`` are those that the clients' own terms read, K by each name in the network.
    """

    dp = "weights-only"

    def __init__(self, weight: float, parameters: Mapping[str, Sequence[Tensor]]) -> None:
        self.weight, self.parameters = weight, parameters

    def of(self, models: Sequence[BlockNet]) -> bool:
        """Return whether those parameters are the networks' own: ``batch.weights`` are these."""
        named = [dict(model.named_parameters()) for model in models]
        return all(
            own.get(name) is p
            for name, members in self.parameters.items()
            for own, p in zip(named, members, strict=True)
        )

    def read(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weights (K', ...) of the clients that still train, the first K' of them.

        Raises:
            RunError: the batch is of one client.
        """
        if batch.weights is None:
            raise RunError("a merged term reads stacked weights, and this batch has none")
        return {name: batch.weights[name] for name in self.parameters}


def widened(values: Tensor) -> Tensor:
    """Return what a module beside the network said, in float32 where autocast made it bfloat16."""
    return values.float() if values.dtype == torch.bfloat16 else values


class Supervised(Term):
    """Cross-entropy with the true label, ``-log softmax(z)_y``, optionally label-smoothed.

    With smoothing s the target is ``(1 - s) onehot(y) + s / C``; s = 0 is plain cross-entropy. A
    row of text costs the mean over its tokens.
    """

    name = "supervised"

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        self.weight, self.label_smoothing = weight, label_smoothing

    def __call__(self, batch: Batch) -> Tensor:
        if batch.y.dim() == 1:
            return functional.cross_entropy(
                batch.logits, batch.y, reduction="none", label_smoothing=self.label_smoothing
            )
        values = functional.cross_entropy(
            batch.logits.flatten(0, 1),
            batch.y.flatten(),
            ignore_index=UNLABELLED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return row_mean(values.view(batch.y.shape), batch.y)

    def mean(self, batch: Batch) -> Tensor:
        if batch.y.dim() > 1:
            return super().mean(batch)
        summed = functional.cross_entropy(
            batch.logits, batch.y, reduction="sum", label_smoothing=self.label_smoothing
        )
        # Over all rows: torch's own mean leaves those out that have the label -100.
        return summed / batch.y.shape[0]

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        same = alike(Supervised, terms, "label_smoothing")
        return Supervised(terms[0].weight, terms[0].label_smoothing) if same else None


class Proximal(Term):
    """``mu/2 * ||w - w0||^2`` over the named parameters (squared; its gradient is mu (w - w0)).

    Source: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, eq. 2.
    mu = 0 is FedAvg: leave the term out.
    """

    dp = "weights-only"
    name = "proximal"

    def __init__(self, model: BlockNet, reference: Mapping[str, Tensor], mu: float) -> None:
        self.weight = mu / 2
        named = dict(model.named_parameters())
        self.reference = {key: value for key, value in reference.items() if key in named}
        self.parameters = {key: named[key] for key in self.reference}

    def __call__(self, batch: Batch) -> Tensor:
        pairs = zip(self.parameters.values(), self.reference.values(), strict=True)
        return torch.stack([(w - w0).square().sum() for w, w0 in pairs]).sum()

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        if not alike(Proximal, terms) or len({tuple(t.reference) for t in terms}) != 1:
            return None
        names = list(terms[0].reference)
        parameters = {n: [t.parameters[n] for t in terms] for n in names}
        references = {n: torch.stack([t.reference[n] for t in terms]) for n in names}
        return Proximals(terms[0].weight, parameters, references)


class Proximals(OnWeights):
    """:class:`Proximal` of K clients: ``1/2 mu ||w_k - w0_k||^2`` each; references (K, ...)."""

    name = "proximal"

    def __init__(
        self,
        weight: float,
        parameters: Mapping[str, Sequence[Tensor]],
        references: Mapping[str, Tensor],
    ) -> None:
        super().__init__(weight, parameters)
        self.references = references

    def __call__(self, batch: Batch) -> Tensor:
        pairs = [(w, self.references[name][: len(w)]) for name, w in self.read(batch).items()]
        return torch.stack([(w - w0).square().flatten(1).sum(1) for w, w0 in pairs]).sum(0)


class HeadSupervised(Term):
    """Cross-entropy of a head that reads the features of one block beside the network."""

    name = "head"

    def __init__(self, head: nn.Module, block: str, weight: float) -> None:
        self.head, self.block, self.weight = head, block, weight

    def __call__(self, batch: Batch) -> Tensor:
        logits = widened(self.head(batch.features[self.block]))
        return functional.cross_entropy(logits, batch.y, reduction="none")

    def at(self) -> frozenset[str]:
        return frozenset({self.block})

    def modules(self) -> Sequence[nn.Module]:
        return (self.head,)

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        head = join([t.head for t in terms]) if alike(HeadSupervised, terms, "block") else None
        return HeadSupervised(head, terms[0].block, terms[0].weight) if head else None


class Distil(Term):
    """An objective between the student's logits and a teacher's soft targets.

    The student is the network's own output, or the given head on the features of ``block``. An
    example without a target (an absent class) contributes nothing: its loss is masked, and not
    that against a target of zeros. Targets are constants: no gradient reaches a teacher.
    ``temperature`` is one number, or (n,) of one for each training example. Without ``rescale`` the
    loss lacks the factor T^2: an example counts the less, the hotter it is taught. ``counts`` (n,)
    multiplies the loss of each training example (none: 1), without making up for it elsewhere. Text
    is taught token by token, with targets (n, L, V) and temperatures and counts of (n, L).

    An objective that wants labels gets those of the examples; where not ``labelled``, none, as on a
    public pool, whose labels are nobody's to use. One that mixes the examples of a batch sees those
    that have a target, and the tokens that have a label, and no others.
    """

    name = "distil"
    teaches = True

    def __init__(
        self,
        objective: Objective,
        targets: Targets,
        temperature: Temperature,
        weight: float,
        head: nn.Module | None = None,
        block: str = "",
        rescale: bool = True,
        counts: Tensor | None = None,
        labelled: bool = True,
    ) -> None:
        self.objective, self.targets, self.labelled = objective, targets, labelled
        self.dp = objective.dp
        self.temperature, self.weight = temperature, weight
        self.head, self.block, self.rescale = head, block, rescale
        self.counts = counts

    def __call__(self, batch: Batch) -> Tensor:
        logits, probs, temperature, mask = self._rows(batch)
        rows, y = batch.y.shape, batch.y.flatten()
        if self.dp == "batch-coupled":
            real = mask if len(rows) == 1 else y != UNLABELLED
            loss = self._among(logits, probs, temperature, y, real)
        else:
            loss = self.loss(logits, probs, temperature, y if self.labelled else None)
        if len(rows) == 2:
            loss = loss.view(rows)
        if self.counts is not None:
            loss = loss * self.counts[batch.index]
        if len(rows) == 2:
            return row_mean(loss, batch.y)
        return torch.where(mask, loss, torch.zeros_like(loss))

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor, Temperature, Tensor]:
        """Return logits, targets and temperatures of examples or tokens, and who has a target."""
        probs, mask = self.targets(batch.y, batch.index)
        logits = batch.logits
        if self.head is not None:
            logits = widened(self.head(batch.features[self.block]))
        given = self.temperature
        temperature = given[batch.index] if isinstance(given, Tensor) else given
        if logits.dim() == 3:
            logits, probs = logits.flatten(0, 1), probs.flatten(0, 1)
            temperature = temperature.flatten() if isinstance(temperature, Tensor) else temperature
        return logits, probs, temperature, mask

    def compared(self, batch: Batch) -> Compared:
        logits, probs, temperature, mask = self._rows(batch)
        real = mask if batch.y.dim() == 1 else batch.y.flatten() != UNLABELLED
        at = temperature[real] if isinstance(temperature, Tensor) else temperature
        point = f"@{self.block}" if self.head is not None else ""
        return Compared(divided(logits[real], at), probs[real], point)

    def placed(self, occasion: Occasion) -> Sequence[Term]:
        inner = self.objective.inner()
        if inner is None or self.head is not None:
            return (self,)
        return (self, *branches(self, inner, occasion))

    def loss(
        self, logits: Tensor, probs: Tensor, temperature: Temperature, labels: Tensor | None
    ) -> Tensor:
        """Return the losses (B,) of rows: (B, C) logits, (B, C) probabilities at (B,) or one T."""
        told = labels if self.objective.labels else None
        return self.scaled(self.objective(logits, probs, temperature, told), temperature)

    def scaled(self, loss: Tensor, temperature: Temperature) -> Tensor:
        """Return what an objective said, without the factor T^2 where that is asked for."""
        if self.rescale or not self.objective.scaled:
            return loss
        return loss / squared(temperature, loss)

    def _among(
        self, logits: Tensor, probs: Tensor, temperature: Temperature, y: Tensor, real: Tensor
    ) -> Tensor:
        """Return the losses (B,) of the ``real`` rows among themselves; 0 for the others."""
        if not bool(real.any()):
            return logits.sum(1) * 0.0
        at = temperature[real] if isinstance(temperature, Tensor) else temperature
        found = self.loss(logits[real], probs[real], at, y[real] if self.labelled else None)
        return logits.new_zeros(len(logits)).masked_scatter(real, found.to(logits.dtype))

    def at(self) -> frozenset[str]:
        return frozenset() if self.head is None else frozenset({self.block})

    def modules(self) -> Sequence[nn.Module]:
        return () if self.head is None else (self.head,)

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        first, heads = terms[0], [t.head for t in terms if t.head is not None]
        temperature = together([t.temperature for t in terms])
        counts = together([t.counts for t in terms])
        targets = joined([t.targets for t in terms], [split.y for split in data])
        head = join(heads) if len(heads) == len(terms) else None
        if (
            not alike(Distil, terms, "objective", "block", "rescale", "labelled")
            or first.dp == "batch-coupled"
            or targets is None
            or temperature is None
            or (counts is None and any(t.counts is not None for t in terms))
            or (head is None and heads)
        ):
            return None
        return Distil(
            first.objective,
            targets,
            temperature,
            first.weight,
            head,
            first.block,
            first.rescale,
            counts if isinstance(counts, Tensor) else None,
            first.labelled,
        )


def together(values: Sequence[float | Tensor | None]) -> float | Tensor | None:
    """Return the number that all clients have, or their tensors end to end; None: neither."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors:
        return torch.cat(tensors) if len(tensors) == len(values) else None
    return values[0] if all(value == values[0] for value in values) else None


class Branch(Distil):
    """What a network is taught at an inner block, by a head that no one predicts with.

    The head is kept in the client's memory from round to round; on a server it begins anew.
    """

    name = "branch"

    def keep(self, state: Arrays) -> None:
        if self.head is not None:
            state.update(prefixed(f"branch/{self.block}", to_arrays(self.head)))

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        return None


def branches(owner: Distil, inner: Inner, occasion: Occasion) -> list[Term]:
    """Return a term for each inner block of a network that is taught what its output is.

    Raises:
        ConfigError: the network has no block of a name.
    """
    known, sizes = occasion.model.block_names, occasion.sizes
    found: list[Term] = []
    for block in inner.blocks or known:
        if block not in known:
            raise unknown("block", block, known)
        rng = occasion.rng.child("branch", block)
        kept = select(occasion.state, f"branch/{block}")
        head = make_head(sizes[block], inner.hidden, sizes[""], rng, kept).to(occasion.device)
        found.append(
            Branch(
                inner.objective,
                owner.targets,
                owner.temperature,
                owner.weight * inner.weight,
                head,
                block,
                owner.rescale,
                owner.counts,
                owner.labelled,
            )
        )
    return found
