"""FedGKT: the network is cut in two, and only features and logits of examples cross the cut.

Clients train a shallow extractor with a head of their own; the server trains the deep rest on the
features that they upload. Each side teaches the other, example by example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.clients.chunk import CHUNK
from fedkd.clients.client import Client, Predictor, Update
from fedkd.clients.guided import distil, guide_of
from fedkd.clients.heads import make_head, soften
from fedkd.clients.local import Term
from fedkd.clients.terms import Supervised
from fedkd.clients.training import Training
from fedkd.clients.transfer import agreed, transfer
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, mixing, problems_of
from fedkd.distill.targets import SampleTargets
from fedkd.errors import nearest
from fedkd.models.base import BlockNet, pool
from fedkd.models.book import ModelBook, load, to_arrays
from fedkd.options import Count, NonNegative, NotNegative, Positive, options
from fedkd.rng import Rng, stream
from fedkd.strategies.averaging import loss_metrics
from fedkd.strategies.base import Setting, Strategy, strategies
from fedkd.strategies.expected import Expected, Form, Group
from fedkd.types import Arrays, ClientInfo, Metrics, Upload, prefixed, select


class Pool(nn.Module):
    """The pooling of features as a layer: ``(batch, ...) -> (batch, d)``."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return :func:`fedkd.models.base.pool` of ``hidden``."""
        return pool(hidden)


@strategies.register("fedgkt")
@options
class FedGkt(Strategy):
    """Group knowledge transfer through a split network (a reconstruction).

    With h = e_k(x) the raw output of block ``cut``, g_k the client's head, s the server's part:

    ``client: CE(g_k(h), y) + alpha T^2 KL(softmax(s_i/T) || softmax(g_k(h)/T))``
    ``server: server_alpha CE(s(h), y) + T^2 KL(softmax(g_i/T) || softmax(s(h)/T))``

    s_i and g_i are the other side's logits of the same example, constants; the client's KL stands
    only where s_i exists. The server's part is that of the federation's first model, trained on the
    uploads of the round. ``personal`` is s(e_k(x)), ``client_head`` g_k(e_k(x)).
    Limits: with alpha = 0 what the server does changes nothing on the clients.
    Source: He, Annavaram, Avestimehr, Group Knowledge Transfer, NeurIPS 2020, Algorithm 1.
    """

    source = "He et al., NeurIPS 2020, Algorithm 1, and the official code"
    evidence = "reconstruction"
    mixed = True

    cut: Annotated[
        str, Field(description="last block on the client; empty: each model's first block")
    ] = ""
    alpha: Annotated[NonNegative, Field(description="weight of distillation on the client")] = 1.0
    server_alpha: Annotated[
        NonNegative, Field(description="weight of the labels at the server, beside distillation")
    ] = 1.0
    objective: Annotated[Chosen, Field(description="distillation objective, both ways")] = "kl"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies of the clients, see fedkd list")
    ] = None
    temperature: Annotated[Positive, Field(description="T of both directions")] = 3.0
    head_hidden: Annotated[
        NotNegative, Field(description="hidden units of the client's head; 0: linear")
    ] = 0
    server_epochs: Annotated[Count, Field(description="epochs of the server's part a round")] = 5
    server_lr: Annotated[Positive, Field(description="learning rate of the server's part")] = 0.05
    server_batch_size: Annotated[Count, Field(description="uploads a step at the server")] = 32

    def coupled(self) -> list[str]:
        mixed = mixing(self.objective, guided=self.policies) if self.alpha else []
        return [*super().coupled(), *mixed]

    def problems(self, setting: Setting) -> list[str]:
        """Refuse a cut that a model does not have, and models that differ in shape behind it."""
        book, found, shapes = setting.book, problems_of(self.objective, guided=self.policies), {}
        for label in sorted({book.labels[0], *(c.model for c in setting.clients)}):
            model = book.make(label)
            cut, allowed = self.cut or model.block_names[0], model.block_names
            if cut not in allowed:
                found.append(
                    f"strategy.cut = {cut!r} is no block of model {label!r} before its head"
                    f"{nearest(cut, allowed)} (allowed: {', '.join(allowed)})"
                )
                continue
            shapes[label] = _cut_shape(model, cut, setting)
        if not found and len(set(shapes.values())) > 1:
            listed = ", ".join(f"{label}: {shape}" for label, shape in shapes.items())
            found.append(
                "clients have different architectures, and one server model cannot go on from "
                f"features of different shapes behind the cut ({listed}); give all clients one "
                "model, or set strategy.cut to a block whose output agrees"
            )
        return found

    def init(self, setting: Setting, rng: Rng) -> Arrays:
        return prefixed("model", to_arrays(self._server(setting.book, {})))

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        logits = state.get(f"logits/{client.id}")
        return {"logits/server": logits} if self.alpha and logits is not None else {}

    def judging(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return prefixed("model", select(state, "model"))

    def local_update(self, client: Client, received: Arrays) -> Update:
        edge = self._edge(client)
        terms: list[Term] = [Supervised()]
        if "logits/server" in received:
            logits = torch.tensor(received["logits/server"], device=client.device)
            targets = SampleTargets(soften(logits, self.temperature))
            objective = chosen(self.objective)
            by = guide_of(self.policies, client)
            terms.append(distil(objective, targets, self.temperature, self.alpha, guide=by))
        result = client.fit(edge, terms)
        client.state.update(prefixed("model", to_arrays(edge)))
        arrays = _release(edge, client)
        edge.eval()

        def predict(x: Tensor) -> dict[str, Tensor]:
            # The server's part is not on the client now: its own head is all it can predict with.
            logits = edge(x)
            return {"personal": logits, "client_head": logits}

        return Update(arrays, predict, loss_metrics(result.losses))

    def uploads(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Expected | None:
        """Return raw features, labels and logits of each of a client's examples."""
        n, classes = client.examples, setting.task.classes
        model = setting.book.make(client.model)
        shape = _cut_shape(model, self.cut or model.block_names[0], setting)
        forms = {
            "features/cut": Form("float32", (n, *shape)),
            "features/labels": Form("int32", (n,), 0, classes - 1),
            "logits/client": Form("float32", (n, classes)),
        }
        return (Group((forms,), of_examples=True),)

    def aggregate(
        self, state: Arrays, uploads: Sequence[Upload], round_: int, setting: Setting
    ) -> tuple[Arrays, Metrics]:
        said = {u.client.id: u.arrays for u in uploads if u.arrays}
        if not said:
            return state, {}
        device = setting.device
        hidden = {k: torch.tensor(a["features/cut"], device=device) for k, a in said.items()}
        server = self._server(setting.book, select(state, "model")).to(device)
        training = Training(
            epochs=self.server_epochs, batch_size=self.server_batch_size, lr=self.server_lr
        )
        result = transfer(
            server,
            torch.cat(list(hidden.values())),
            soften(_stacked(said, "logits/client", device), self.temperature),
            objective=chosen(self.objective),
            known=True,
            temperature=self.temperature,
            training=training,
            rng=stream(setting.seed, "fedgkt", "server", round_),
            labels=_stacked(said, "features/labels", device).long(),
            terms=[Supervised(self.server_alpha)] if self.server_alpha else [],
            measure=round_ == setting.rounds,
        )
        state = {**state, **prefixed("model", to_arrays(server))}
        # Answers that nobody is sent are not worth keeping.
        for k, features in hidden.items() if self.alpha else ():
            state[f"logits/{k}"] = _outputs(server, features)
        losses = {f"server_loss/{name}": loss for name, loss in result.losses.items()}
        return state, losses | agreed(result, "server")

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        edge = self._edge(client).eval()
        server = self._server(client.book, select(received, "model")).to(client.device).eval()
        cut = edge.block_names[-1]
        own = edge.behind(cut).eval()

        def predict(x: Tensor) -> dict[str, Tensor]:
            hidden = edge.raw_features(x, cut)
            return {"personal": server(hidden), "client_head": own(hidden)}

        return predict

    def _edge(self, client: Client) -> BlockNet:
        """Return the client's part: the blocks up to the cut and its head on pooled features."""
        model = client.model()
        cut = self.cut or model.block_names[0]
        size = model.feature_size(client.task, cut)
        rng = Rng(client.seed, ("head", cut))
        head = make_head(size, self.head_hidden, client.task.classes, rng, {}).to(client.device)
        edge = model.up_to(cut, nn.Sequential(Pool(), head))
        load(edge, select(client.state, "model"))
        return edge

    def _server(self, book: ModelBook, weights: Arrays) -> BlockNet:
        """Return the server's part: the deeper blocks and the head of the federation's model."""
        model = book.make(book.labels[0], weights)
        return model.behind(self.cut or model.block_names[0])


@torch.no_grad()
def _cut_shape(model: BlockNet, cut: str, setting: Setting) -> tuple[int, ...]:
    """Return the shape of what block ``cut`` makes of one example."""
    return tuple(model.raw_features(torch.zeros(1, *setting.task.input_shape), cut).shape[1:])


@torch.inference_mode()
def _release(edge: BlockNet, client: Client) -> Arrays:
    """Return raw features (n, ...), logits (n, C) and labels (n,) of a client's own examples."""
    train = client.data.train
    if len(train) == 0:
        return {}
    edge.eval()
    cut = edge.block_names[-1]
    hidden = torch.cat([edge.raw_features(part, cut) for part in train.x.split(CHUNK)])
    return {
        "features/cut": hidden.cpu().contiguous().numpy(),
        "features/labels": train.y.cpu().numpy().astype(np.int32),
        "logits/client": _outputs(edge.behind(cut), hidden),
    }


@torch.inference_mode()
def _outputs(model: BlockNet, hidden: Tensor) -> np.ndarray:
    """Return the logits (n, C) of raw features, in evaluation mode, in chunks."""
    model.eval()
    return torch.cat([model(part) for part in hidden.split(CHUNK)]).cpu().numpy()


def _stacked(said: dict[int, Arrays], key: str, device: torch.device | str) -> Tensor:
    joined = np.concatenate([arrays[key] for arrays in said.values()])
    return torch.from_numpy(joined).to(device)
