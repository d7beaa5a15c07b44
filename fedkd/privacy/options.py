"""What a run says about privacy: unit, mechanism, budget; nothing here is estimated or guessed."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from fedkd.options import NonNegative, NotNegative, Positive, Ratio, options


@options
class Clipping:
    """How a client's update is bounded before it is summed (unit ``client``)."""

    mode: Annotated[
        Literal["flat", "per-layer", "adaptive"],
        Field(description="one norm; one for each array; or one that follows a quantile"),
    ] = "flat"
    norm: Annotated[
        float, Field(gt=0, description="L2 norm of a client's whole update; inf does not clip")
    ] = 1.0
    quantile: Annotated[
        float, Field(gt=0, lt=1, description="adaptive: share of clients left unclipped")
    ] = 0.5
    rate: Annotated[Positive, Field(description="adaptive: learning rate of the norm")] = 0.2
    count_noise: Annotated[
        Positive | None,
        Field(description="adaptive: noise std on the count; none: expected cohort / 20"),
    ] = None


@options
class DpSgd:
    """DP-SGD on the clients (unit ``example``); clients.training.batch_size is the expected one."""

    max_grad_norm: Annotated[
        float, Field(gt=0, description="L2 norm of one example's gradient; inf does not clip")
    ] = 1.0
    grad_sample_mode: Annotated[
        Literal["auto", "bookkeeping", "hooks", "functorch", "ghost"],
        Field(
            description="how gradients of examples are clipped: book-keeping, one pass without "
            "forming them; by Opacus' hooks, functorch or ghost clipping; auto: the fastest"
        ),
    ] = "auto"
    max_physical_batch_size: Annotated[
        NotNegative, Field(description="examples in memory at once; 0: the whole Poisson batch")
    ] = 0


@options
class Release:
    """How knowledge beside weights is bounded: soft targets, prototypes, label counts."""

    mode: Annotated[
        Literal["refuse", "frozen-encoder", "dpsgd+release"],
        Field(description="unit example: what makes class means of clients' own data releasable"),
    ] = "refuse"
    noise_multiplier: Annotated[
        NonNegative | None, Field(description="unit example: noise of one release of class sums")
    ] = None
    share: Annotated[
        Ratio, Field(description="unit client: share of a round's budget beside weights")
    ] = 0.5
    logit_clip: Annotated[Positive, Field(description="centred logits lie in [-C, C]")] = 5.0
    row_norm: Annotated[
        Positive, Field(description="L2 norm of one feature row, or of a row of logits")
    ] = 1.0
    count_share: Annotated[
        Ratio, Field(description="share of a table's budget that goes to its counts")
    ] = 0.25
    min_count: Annotated[
        NonNegative, Field(description="a class below this noisy count is left out")
    ] = 1.0
    votes: Annotated[
        Literal["none", "gnmax", "confident-gnmax"],
        Field(description="public queries: clients vote for a class in place of soft targets"),
    ] = "none"
    vote_threshold: Annotated[
        Ratio, Field(description="confident-gnmax: answered above this share of expected votes")
    ] = 0.6
    threshold_share: Annotated[
        Ratio, Field(description="confident-gnmax: share of the budget of an answered query")
    ] = 0.3


@options
class Swing:
    """Swing distillation (a reconstruction): hotter, noisier targets where it is more private."""

    map: Annotated[
        Literal["off", "adaptive", "reverse", "constant"],
        Field(description="private items hotter; colder (ablation); or all at t_max"),
    ] = "off"
    scorer: Annotated[
        str, Field(description="what says how private an item is, see fedkd list scorers")
    ] = "knn"
    scorer_options: Annotated[
        dict[str, Any], Field(description="options of the scorer, as in { k = 5 }")
    ] = dataclasses.field(default_factory=dict)
    t_min: Annotated[Positive, Field(description="temperature where p = 0")] = 1.0
    t_max: Annotated[Positive, Field(description="temperature where p = 1")] = 10.0
    gamma: Annotated[Positive, Field(description="T = t_min + (t_max - t_min) p^gamma")] = 1.0
    noise: Annotated[
        NonNegative,
        Field(description="std of noise on targets, in units of the sensitivity at T"),
    ] = 0.0
    rescale: Annotated[bool, Field(description="multiply an item's loss by its T^2")] = True
    weights: Annotated[
        Literal["equal", "open"],
        Field(description="weight of an item's distillation: 1, or 1 - p, less where private"),
    ] = "equal"


@options
class Privacy:
    """What is protected, against whom, at which cost; two of epsilon, noise, delta give the third.

    ``unit = "client"``: a client's whole contribution; ``"example"``: one training example of a
    client; ``"none"`` claims nothing. ``trust = "central"``: the server sums clipped uploads and
    adds noise once; ``"local"``: each client adds it to what it sends.

    ``mean_noise`` (unit client, central) is the noise multiplier over the expected cohort n: the
    std on the mean of a round in units of the clipping norm, the same at every participation ratio.
    Parts of an upload, and the count of adaptive clipping, share it as they share a multiplier.
    """

    unit: Annotated[
        Literal["none", "client", "example"], Field(description="whose contribution is hidden")
    ] = "none"
    trust: Annotated[
        Literal["central", "local"],
        Field(description="unit client: who adds the noise, the server or each client"),
    ] = "central"
    adjacency: Annotated[
        Literal["add-remove", "zero-out", "replace-one"],
        Field(description="neighbours differ by one unit there or not, silent, or another"),
    ] = "add-remove"
    accountant: Annotated[
        Literal["rdp", "prv"], Field(description="Opacus' Renyi or numerical accountant")
    ] = "rdp"
    epsilon: Annotated[
        Positive | None, Field(description="target after all rounds: the noise is calibrated")
    ] = None
    noise_multiplier: Annotated[
        NonNegative | None, Field(description="noise std in units of the clipping norm")
    ] = None
    mean_noise: Annotated[
        NonNegative | None,
        Field(description="in its place: noise std on the mean over the expected cohort"),
    ] = None
    delta: Annotated[
        float | None, Field(gt=0, lt=1, description="failure probability; below 1 / units")
    ] = None
    max_epsilon: Annotated[
        Positive | None, Field(description="stop before the round that would exceed this")
    ] = None
    secure_mode: Annotated[
        bool, Field(description="cryptographic noise; refused: its library is not maintained")
    ] = False
    clipping: Clipping = Clipping()
    dp_sgd: DpSgd = DpSgd()
    release: Release = Release()
    swing: Swing = Swing()
