"""What an epsilon does not cover, in words: printed beside it, so that nobody has to guess."""

from __future__ import annotations

from fedkd.privacy.options import Privacy

ALWAYS = (
    "metrics (losses, accuracies), reported to the server and kept in the run folder: computed on "
    "clients' data without noise",
    "failures: that a client's work raised an error, and a run that ends because of it",
    "checkpoints and failures kept in the run folder: they hold every client's own state",
    "choices made by looking at private data: hyper-parameters, the round to stop at",
    "other runs on the same data: each adds its own epsilon",
    "the noise and the sampling themselves: drawn from the run's seed, so that a run can be "
    "repeated; whoever knows the seed can subtract it, and floating-point attacks are not defended "
    "against",
)


def uncovered(
    options: Privacy, public: bool, *, by_label: bool = False, deadline: bool = False
) -> tuple[str, ...]:
    """Return what the mechanism of ``options`` leaves open; ``public``: there is a public pool.

    ``by_label``: who is there follows from clients' data; ``deadline``: late uploads are lost.
    """
    if options.unit == "none":
        return ()
    found: list[str] = []
    if options.unit == "client":
        if options.trust == "central":
            found.append("the server: it is trusted, and reads every upload in the clear")
            found.append(
                "who takes part, towards the server, whoever sees its connections, and readers of "
                "the run folder"
            )
            if options.release.votes == "confident-gnmax":
                found.append(
                    "an epsilon below max_epsilon: what is spent follows from noisy answers, and "
                    "max_epsilon is what is guaranteed"
                )
        else:
            found.append("who takes part and when: every upload is seen by itself")
            found.append("how many training examples each client has: treated as public")
        found.append("the number of clients and the expected cohort: treated as public")
        found.append(
            "what a client keeps (personal blocks, its own network): made of its own data without "
            "noise, and covered only as long as nobody else gets it"
        )
    else:
        found.append("how many training examples each client has: treated as public")
        found.append("who takes part and when; that all of a client's examples belong together")
        found.append("networks fine-tuned for judging: trained without noise and never sent")
        if options.release.mode == "frozen-encoder":
            found.append("clients' own heads: trained without noise and never sent")
        found.append("examples held by several clients: the units are a client's examples")
    if by_label:
        found.append(
            "who takes part, which follows from the classes of clients' data: to whoever sees it, "
            "it tells of them"
        )
    if deadline:
        found.append(
            "the deadline and who misses it: they follow from how many training examples each "
            "client has, treated as public"
        )
    if public:
        found.append("the public pool: treated as public, wherever it was taken from")
    if options.swing.map != "off":
        found.append("the temperatures of swing distillation: a heuristic without an epsilon")
    return (*found, *ALWAYS)
