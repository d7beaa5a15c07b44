"""FedNTD: federated averaging whose clients keep what the global model knows of other classes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedkd.clients.client import Client
from fedkd.clients.guided import distil, guide_of
from fedkd.clients.heads import soften
from fedkd.clients.local import Term
from fedkd.clients.teacher_terms import NotTrue, teacher_logits
from fedkd.clients.terms import Supervised
from fedkd.distill.chosen import Chosen, ChosenPolicies, chosen, mixing, problems_of
from fedkd.distill.targets import SampleTargets
from fedkd.models.base import BlockNet
from fedkd.options import NonNegative, Positive, options
from fedkd.strategies.averaging import ModelAveraging
from fedkd.strategies.base import Setting, strategies
from fedkd.types import Arrays


@strategies.register("fedntd")
@options
class FedNTD(ModelAveraging):
    """FedAvg with not-true distillation from the received model (a reconstruction).

    ``CE(z, y) + beta tau^2 KL(softmax(z_g^{-y} / tau) || softmax(z^{-y} / tau))``, z^{-y} being
    logits without the true class's, z_g those of the received model, a constant for the round.
    Limits: beta = 0 is FedAvg bit for bit. Sensible values: beta 0.1 to 3, tau 1 to 3.
    Source: Lee et al., Preservation of the Global Knowledge by Not-True Distillation in Federated
    Learning, NeurIPS 2022.
    """

    source = "Lee et al., NeurIPS 2022 (arXiv:2106.03097)"
    evidence = "reconstruction"

    beta: Annotated[
        NonNegative, Field(description="weight of not-true distillation; 0 is FedAvg")
    ] = 1.0
    tau: Annotated[Positive, Field(description="temperature of student and teacher")] = 1.0
    objective: Annotated[
        Chosen, Field(description="distillation objective; another than ntd is another method")
    ] = "ntd"
    policies: Annotated[
        ChosenPolicies, Field(description="target policies, one after another, see fedkd list")
    ] = None

    def coupled(self) -> list[str]:
        found = mixing(self.objective, guided=self.policies) if self.beta else []
        return [*super().coupled(), *found]

    def problems(self, setting: Setting) -> list[str]:
        found = super().problems(setting) + problems_of(self.objective, guided=self.policies)
        if self.beta and self.objective == "ntd" and setting.task.classes < 3:
            found.append(
                f"fedntd compares the classes that an example is not, but task "
                f"{setting.task.name!r} has {setting.task.classes} classes, so there is nothing to "
                "compare; set strategy.beta = 0 or use fedavg or fedgkd"
            )
        return found

    def terms(self, client: Client, model: BlockNet, received: Arrays) -> list[Term]:
        terms: list[Term] = [Supervised()]
        if self.beta and len(client.data.train):
            # The model is still the one received: asked now, it is the teacher of the whole round.
            logits = teacher_logits(model, client.data.train)
            by = guide_of(self.policies, client)
            if self.objective == "ntd" and by is None:
                # Of logits as they are: a class of which the teacher is sure hides no others.
                return [*terms, NotTrue(logits, self.tau, self.beta)]
            targets = SampleTargets(soften(logits, self.tau))
            objective = chosen(self.objective)
            terms.append(distil(objective, targets, self.tau, self.beta, guide=by))
        return terms
