"""FedFTG: the averaged model is fine-tuned on samples that are hard for it, made without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fedkd.clients.local import Term
from fedkd.clients.synthesis import Answers, Disagreement, Diversity, TeacherFidelity
from fedkd.distill.generator import Codes
from fedkd.models.base import BlockNet
from fedkd.options import NonNegative, NotNegative, Positive, options
from fedkd.strategies.alternating import Alternating
from fedkd.strategies.base import strategies


@strategies.register("fedftg")
@options
class FedFTG(Alternating):
    """FedAvg, then fine-tuning on generated hard samples (a reconstruction).

    Generator: ``min E_y,e [ sum_k a_ky (f CE(t_k, y) - h mean_c |s_c - t_kc|) ] + d/K div`` with
    ``a_ky = n_ky / sum_k n_ky``, s and t_k the logits of student and teacher k on G(e, y), and the
    labels y drawn from the participants' summed counts. Student: ``min T^2 KL(sum_k a_ky
    softmax(t_k / T) || softmax(s / T))``. Limits: ``server_steps = 0`` is FedAvg bit for bit; one
    client is its own only teacher.
    Source: Zhang et al., Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID
    Federated Learning, CVPR 2022, and its released code.
    """

    source = "Zhang et al., CVPR 2022, and its released code"
    evidence = "reconstruction"

    server_steps: Annotated[
        NotNegative, Field(description="steps of the student a round; 0 is FedAvg")
    ] = 50
    server_lr: Annotated[Positive, Field(description="learning rate of the student")] = 3e-4
    generator_lr: Annotated[Positive, Field(description="learning rate of the generator")] = 5e-3
    hard_weight: Annotated[
        NonNegative, Field(description="h, weight of samples on which student and teachers differ")
    ] = 1.0
    diversity_weight: Annotated[
        NonNegative, Field(description="d, weight of diversity, divided by the teachers' number")
    ] = 1.0

    def generator_terms(
        self, answers: Answers, codes: Codes, students: Sequence[BlockNet]
    ) -> list[Term]:
        share = 1 / len(students)
        terms: list[Term] = [Disagreement(answers, s, self.hard_weight * share) for s in students]
        terms.append(TeacherFidelity(answers, self.fidelity_weight))
        teachers = len(answers.ensemble.teachers)
        terms.append(Diversity(codes, self.diversity_weight / teachers))
        return [term for term in terms if term.weight]
