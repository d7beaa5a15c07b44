"""FML: every client's own network and a shared one, the meme, teach each other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedkd.clients.client import Client, Predictor, Update
from fedkd.clients.guided import guide_of
from fedkd.clients.teacher_terms import Peer, mutual, together
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, mixing, problems_of
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.options import Fraction, options
from fedkd.privacy.payload import Payload, Weights
from fedkd.strategies.averaging import ModelAveraging, loss_metrics
from fedkd.strategies.base import Setting, strategies
from fedkd.types import Arrays, ClientInfo, prefixed, select


@strategies.register("fml")
@options
class FML(ModelAveraging):
    """Federated mutual learning: a personal and an averaged network (a reconstruction).

    ``L_personal = alpha CE(p, y) + (1 - alpha) KL(m || p)`` and ``L_meme = beta CE(m, y) +
    (1 - beta) KL(p || m)``, p and m the predictions of the two, each constant in the other's loss;
    one step on a batch moves both. Only the meme travels: its architecture is the federation's
    first, whatever the clients' own. Limits: beta = 1 makes the meme FedAvg's model, alpha = 1 the
    personal networks local-only's, bit for bit.
    Source: Shen et al., Federated Mutual Learning, arXiv:2006.16765.
    """

    source = "Shen et al., arXiv:2006.16765"
    evidence = "reconstruction"
    mixed = True

    alpha: Annotated[
        Fraction, Field(description="weight of the labels for the personal network; 1: local-only")
    ] = 0.5
    beta: Annotated[
        Fraction, Field(description="weight of the labels for the meme; 1: the meme is FedAvg's")
    ] = 0.5
    objective: Annotated[
        Chosen, Field(description="what each learns from the other by, see fedkd list")
    ] = "kl"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None

    def problems(self, setting: Setting) -> list[str]:
        found = problems_of(self.objective, guided=self.policies, offers=())
        if not self.alpha and not self.beta:
            found.append(
                "strategy.alpha = strategy.beta = 0: neither network would ever see a label; set "
                "one of them above 0"
            )
        return found

    def coupled(self) -> list[str]:
        return [*super().coupled(), *mixing(self.objective, guided=self.policies)]

    def broadcast(self, state: Arrays, client: ClientInfo, round_: int, setting: Setting) -> Arrays:
        return prefixed("model", select(state, "model"))

    def local_update(self, client: Client, received: Arrays) -> Update:
        own, meme = self._networks(client, received)
        own_weights, meme_weights = (self.alpha, 1 - self.alpha), (self.beta, 1 - self.beta)
        # Either direction has policies of its own: they learn from other losses.
        guides = (
            guide_of(self.policies, client, place="policies/personal"),
            guide_of(self.policies, client, place="policies/meme"),
        )
        objective = chosen(self.objective)
        terms = mutual(Peer(meme), own_weights, meme_weights, objective=objective, guides=guides)
        result = client.fit(own, terms)
        client.state.update(prefixed("personal", to_arrays(own)))
        arrays = prefixed("model", to_arrays(meme))
        return Update(arrays, together(own, "meme", meme), loss_metrics(result.losses))

    def declare(
        self, received: Arrays, client: ClientInfo, round_: int, setting: Setting
    ) -> Payload | None:
        """Return the meme, whatever the architecture of the client's own network."""
        return (Weights(prefixed("model", select(received, "model"))),)

    def predictor(self, client: Client, received: Arrays) -> Predictor:
        own, meme = self._networks(client, received)
        return together(own, "meme", meme)

    def _networks(self, client: Client, received: Arrays) -> tuple[BlockNet, BlockNet]:
        own = client.model(select(client.state, "personal"))
        label = client.book.labels[0]
        return own, client.book.make(label, select(received, "model"), device=client.device)
