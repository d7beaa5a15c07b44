"""What contradicts itself, or cannot be justified, in privacy options: refused before round 1."""

from __future__ import annotations

import math

from fedkd.errors import ConfigError
from fedkd.privacy.options import Privacy
from fedkd.privacy.population import Population

_BY_LABEL = (
    "clients.participation.availability = 'label' with privacy {}: who takes part follows from the "
    "classes of clients' examples, and the server {}, which no noise hides; set availability to "
    "'power-law' or 'always', or use unit 'client' with trust 'central'"
)


def problems(options: Privacy, population: Population) -> list[str]:
    """Return what contradicts itself, or cannot be justified, in options for a federation."""
    found = _two_of_three(options)
    found += _mean_noise(options)
    if options.secure_mode:
        found.append(
            "privacy.secure_mode = true needs the library torchcsprng, which is not maintained for "
            "this torch; set it to false, and do not deploy what this simulator draws"
        )
    swing = options.swing
    if swing.map not in ("off", "constant") and swing.scorer_options.get("private"):
        found.append(
            "privacy.swing.scorer_options.private = true says that temperatures depend on private "
            "data, but mechanisms take them as public; leave it out where the scorer reads public "
            "data only, else set privacy.swing.map = 'constant', or privacy.unit = 'none'"
        )
    if options.adjacency == "replace-one" and options.unit == "example":
        found.append(
            "privacy.adjacency = 'replace-one' with unit 'example': the amplification of Poisson "
            "sampling is accounted for adding or removing one example; use 'add-remove'"
        )
    if options.unit == "client":
        found += _client_problems(options, population)
    else:
        found += _example_problems(options, population)
    return found


def _two_of_three(options: Privacy) -> list[str]:
    noise, value = "noise_multiplier", options.noise_multiplier
    if options.mean_noise is not None:
        if options.noise_multiplier is not None:
            return [
                "privacy.noise_multiplier and privacy.mean_noise both say how much noise there is "
                "(one is the other times the expected cohort); leave one out"
            ]
        noise, value = "mean_noise", options.mean_noise
    given = {"epsilon": options.epsilon, noise: value, "delta": options.delta}
    names = [name for name, value in given.items() if value is not None]
    if len(names) == 3:
        return [
            f"privacy.epsilon, {noise} and delta are all given, and each follows from the "
            "other two; leave one out"
        ]
    if len(names) < 2:
        listed = f"only privacy.{names[0]}" if names else "none of them"
        return [
            "two of privacy.epsilon, noise_multiplier and delta give the third, but "
            f"{listed} is set; for instance privacy.epsilon = 8.0 and privacy.delta = 1e-5"
        ]
    return []


def _mean_noise(options: Privacy) -> list[str]:
    """Refuse noise on a mean where there is none, or whose meaning would change with the cohort."""
    if options.mean_noise is None:
        return []
    if options.unit != "client" or options.trust != "central":
        there = f"unit {options.unit!r}" if options.unit != "client" else "trust 'local'"
        return [
            f"privacy.mean_noise with {there}: no server adds noise to a mean over clients there; "
            "give privacy.noise_multiplier, or unit 'client' with trust 'central'"
        ]
    if options.clipping.mode == "adaptive" and options.clipping.count_noise is not None:
        return [
            "privacy.mean_noise with privacy.clipping.count_noise: noise of a fixed number of "
            "clients takes another share of the budget in every cohort; leave count_noise out "
            "(it is then the expected cohort / 20), or give privacy.noise_multiplier"
        ]
    return []


def _client_problems(options: Privacy, population: Population) -> list[str]:
    found = []
    if options.trust == "local" and options.adjacency == "add-remove":
        found.append(
            "privacy.adjacency = 'add-remove' with trust 'local': the server sees who sends, so "
            "presence is not hidden; use 'zero-out' or 'replace-one'"
        )
    by_label = population.availability == "label"
    if options.trust == "local" and by_label:
        found.append(_BY_LABEL.format("trust 'local'", "sees who sends"))
    if options.trust == "central":
        if population.amplified and options.adjacency == "replace-one":
            found.append(
                "privacy.adjacency = 'replace-one' with Poisson participation: the amplification "
                "is accounted for adding or removing one client; use 'add-remove'"
            )
        refilled = population.scheme == "fixed" and population.displaces and by_label
        if refilled and options.adjacency != "add-remove":
            # Not even at twice the noise: the other one remembers, and sends something else later.
            found.append(
                "clients.participation.availability = 'label' with scheme 'fixed': a client stays "
                "away because of its data, another one takes its place, and what that one keeps "
                "and sends from then on tells of it, which noise for one client does not hide; "
                "use scheme 'poisson', 'cyclic' or 'full'"
            )
        if population.displaces and options.adjacency == "add-remove":
            found.append(
                f"clients.participation.scheme = {population.scheme!r} draws cohorts of a fixed "
                "size, in which one client more or less displaces another; set it to 'poisson' "
                "(amplified), or privacy.adjacency to 'zero-out' or 'replace-one' (not amplified)"
            )
    if options.release.votes == "confident-gnmax" and (
        options.accountant != "rdp" or options.max_epsilon is None
    ):
        found.append(
            "privacy.release.votes = 'confident-gnmax' answers as many queries as the votes allow; "
            "such adaptive costs are covered by a Renyi filter only: set privacy.accountant = "
            "'rdp' and privacy.max_epsilon"
        )
    return found


def _example_problems(options: Privacy, population: Population) -> list[str]:
    release, found = options.release, list[str]()
    if population.availability == "label":
        found.append(_BY_LABEL.format("unit 'example'", "sees who takes part"))
    clipped = math.isfinite(options.dp_sgd.max_grad_norm)
    if not clipped and options.noise_multiplier != 0 and release.mode != "frozen-encoder":
        found.append(
            "privacy.dp_sgd.max_grad_norm = inf bounds nothing, so no noise hides an example; give "
            "a finite norm, for instance 1.0, or noise_multiplier = 0, which claims nothing"
        )
    if population.tables and release.mode == "refuse":
        found.append(
            "this strategy uploads means by class of clients' own examples, which training by "
            "DP-SGD does not cover; set privacy.release.mode = 'dpsgd+release' (both are paid "
            "for) with privacy.release.noise_multiplier, or 'frozen-encoder' where features come "
            "from blocks that are not trained"
        )
    elif population.tables and release.noise_multiplier is None:
        found.append(
            "privacy.release.noise_multiplier is not set: it is the noise of one release of class "
            "sums, in units of what one example can change; for instance 20"
        )
    if not population.tables and release.mode == "frozen-encoder":
        found.append(
            "privacy.release.mode = 'frozen-encoder' is for strategies that release class means "
            "of features (fedproto); this one does not; leave it out"
        )
    return found


def check_delta(options: Privacy, population: Population, delta: float) -> None:
    """Refuse a delta at which giving away one unit in the clear would be allowed."""
    units = population.clients if options.unit == "client" else max(population.examples)
    name = "clients" if options.unit == "client" else "examples of the largest client"
    if delta >= 1 / units:
        origin = "delta" if options.delta is not None else "delta (from epsilon and noise)"
        raise ConfigError(
            f"privacy.{origin} = {delta:.3g} is not below 1 / {units} ({name}): publishing one of "
            "them in the clear would satisfy it; lower delta, for instance to 1e-5"
            + ("" if options.delta is not None else ", by more noise or a larger epsilon")
        )


def check_none(options: Privacy) -> None:
    """Refuse a budget without a mechanism: it would look like a claim."""
    asked = {
        "epsilon": options.epsilon,
        "noise_multiplier": options.noise_multiplier,
        "mean_noise": options.mean_noise,
        "delta": options.delta,
        "max_epsilon": options.max_epsilon,
    }
    given = [f"privacy.{name}" for name, value in asked.items() if value is not None]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} given, but privacy.unit = 'none' uses no mechanism and claims "
            "nothing; set privacy.unit = 'client' or 'example', or leave the rest out"
        )
