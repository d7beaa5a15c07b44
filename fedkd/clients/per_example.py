"""Per-example gradients by Opacus, attached to networks for one fit and taken off without a trace.

Opacus hooks the layers and leaves marks on parameters and modules. All of that is set back before
each batch, so that nothing stale is ever released, and one example a fit is compared with autograd,
because a sampler that misreads a layer is silently wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedkd.clients.noise import Noise, Taker
from fedkd.errors import ConfigError

ByOpacus = Literal["hooks", "functorch", "ghost"]

ON_PARAMETERS = (
    "grad_sample",
    "summed_grad",
    "_current_grad_sample",
    "_forward_counter",
    "_norm_sample",
)
ON_MODULES = ("activations", "max_batch_len", "ft_compute_sample_grad")


class PerExample:
    """What Opacus is asked for in each batch: gradients of single examples, or their norms.

    Made by :func:`attached`. A batch is ``clear()``, a forward pass, ``backward(losses)``; or
    ``nothing()`` for an empty one. What a parameter's optimizer then finds is ``p.grad_sample``
    (B, ...), in mode ``ghost`` ``p.grad``, the sum of clipped gradients. A parameter that no loss
    reaches has gradient zero, and so gets its noise like all others.
    """

    def __init__(self, root: nn.Module, mode: ByOpacus, hooks: Any) -> None:
        self.ghost, self.hooks, self.modules = mode == "ghost", hooks, list(root.modules())
        self.trained = [(name, p) for name, p in root.named_parameters() if p.requires_grad]
        self._checked = False

    def clear(self) -> None:
        """Forget the last batch, also one that ended in an error or skipped some layer."""
        for module in self.modules:
            for mark in ("activations", "max_batch_len"):
                vars(module).pop(mark, None)
        for _, p in self.trained:
            vars(p).pop("_current_grad_sample", None)
            vars(p).update(grad_sample=None, _forward_counter=0, _norm_sample=None)
            p.grad = None

    def nothing(self) -> None:
        """Leave what a batch without examples has: gradients of nobody, which sum to zero."""
        self.clear()
        for _, p in self.trained:
            if self.ghost:
                p.grad = torch.zeros_like(p)
            else:
                vars(p)["grad_sample"] = p.new_zeros(0, *p.shape)

    def backward(self, losses: Tensor) -> Tensor:
        """Find the gradients of ``losses`` (B,); return which examples are finite (B,).

        Where some are not, nothing may be used: clear, and go again without them.

        Raises:
            ConfigError: Opacus does not follow a layer, or examples are not apart.
        """
        for module in self.modules:
            for inputs in vars(module).get("activations", ()):
                if len(inputs[0]) != len(losses):
                    raise _lost(f"a layer {type(module).__name__}")
        truth = None if self._checked else self._of_the_first(losses)
        losses.sum().backward(retain_graph=self.ghost)
        mark = "_norm_sample" if self.ghost else "grad_sample"
        for name, p in self.trained:
            found = vars(p)[mark]
            if p.grad is None:
                shape = (len(losses),) if self.ghost else (len(losses), *p.shape)
                vars(p)[mark] = p.new_zeros(shape)
            elif not isinstance(found, Tensor) or len(found) != len(losses):
                raise _lost(f"the parameter {name!r}")
        finite = self._finite(losses) & torch.isfinite(losses.detach())
        if not finite.all():
            return finite
        if truth is not None:
            self._check(truth)
        if self.ghost:
            coefficients = self.hooks.get_clipping_coef()
            for _, p in self.trained:
                p.grad = None
            with self.paused():
                (coefficients * losses).sum().backward()
            for _, p in self.trained:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return finite

    def form(self) -> bool:
        """Form gradients in mode ``ghost``, too, and keep their norms; False: that is done already.

        Opacus refuses norms alone for a layer that a batch goes through twice, such as a head that
        two terms share: the norm of a sum is not known from the summands' norms.
        """
        before = self.ghost and self.hooks.use_ghost_clipping
        self.hooks.use_ghost_clipping = False
        return bool(before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run networks on something that is not the batch's examples."""
        self.hooks.disable_hooks()
        try:
            yield
        finally:
            self.hooks.enable_hooks()

    def _finite(self, losses: Tensor) -> Tensor:
        if self.ghost:
            return torch.isfinite(self.hooks.get_norm_sample())
        # A sum is finite only if its summands are: a look at p.grad saves one at every example.
        used = [p for _, p in self.trained if p.grad is not None]
        if all(bool(torch.isfinite(_gradient(p)).all()) for p in used):
            return torch.ones_like(losses, dtype=torch.bool)
        samples = [vars(p)["grad_sample"].flatten(1) for p in used]
        return torch.stack([torch.isfinite(g).all(1) for g in samples]).all(0)

    def _of_the_first(self, losses: Tensor) -> list[Tensor]:
        """Return the gradient of the first example as autograd finds it, by parameter."""
        parameters = [p for _, p in self.trained]
        with self.paused():
            found = torch.autograd.grad(losses[0], parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _check(self, truth: list[Tensor]) -> None:
        """Compare with autograd, once a fit; the tolerance leaves room for reduced precision."""
        joint = torch.stack([g.norm() for g in truth]).norm()
        for (name, p), gradient in zip(self.trained, truth, strict=True):
            if self.ghost:
                apart = (vars(p)["_norm_sample"][0] - gradient.norm()).abs()
            else:
                apart = (vars(p)["grad_sample"][0] - gradient).norm()
            if not apart <= 0.01 * joint:
                raise _lost(f"the parameter {name!r}")
        self._checked = True


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def _lost(what: str) -> ConfigError:
    return ConfigError(
        f"DP-SGD: Opacus does not follow {what}: what it takes for the gradient of one example is "
        "another, and clipping it would bound nothing. Either a loss of one example depends on "
        "others, or a layer is not called as a module with one row for each example of the batch; "
        "if neither, try privacy.dp_sgd.grad_sample_mode = 'functorch'"
    )


@contextmanager
def attached(
    parts: Sequence[nn.Module], mode: ByOpacus, max_grad_norm: float
) -> Iterator[PerExample]:
    """Attach Opacus to the trainable layers of ``parts``; take it off again, come what may.

    Kernels are in torch's contiguous format inside, see :func:`~fedkd.models.base.row_major`, and
    in their own afterwards; gradients are gone.

    """
    from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping

    # The first layer has no input to differentiate: torch says so in every process, once.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    # Token numbers are no floats, which functorch remarks on.
    warnings.filterwarnings("ignore", message="In C[A-Z]+ autocast", category=UserWarning)
    root = nn.ModuleList(parts)
    strides = [(p, p.stride()) for p in root.parameters()]
    hooks: Any = None
    try:
        root.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if mode == "ghost":
            hooks = GradSampleHooksFastGradientClipping(
                root, loss_reduction="sum", max_grad_norm=max_grad_norm
            )
            hooks.NORM_SAMPLERS = {**hooks.NORM_SAMPLERS, nn.Linear: linear_norms}
        else:
            hooks = GradSampleHooks(root, loss_reduction="sum", force_functorch=mode == "functorch")
        yield PerExample(root, mode, hooks)
    finally:
        if hooks is not None:
            hooks.disable_hooks()
        for handle in vars(root).pop("autograd_grad_sample_hooks", ()):
            handle.remove()
        _forget(root)
        for p, stride in strides:
            if p.stride() != stride:
                p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(
                    p.data
                )


def clipping(
    parameters: Sequence[nn.Parameter], max_grad_norm: float, noise: Noise, expected: float
) -> Taker:
    """Return Opacus' optimizer, which clips ``p.grad_sample`` and sums it, with addressed noise."""
    from opacus.optimizers import DPOptimizer

    class Addressed(DPOptimizer):
        """Does all but the update."""

        def take(self, last: bool) -> None:
            self.signal_skip_step(do_skip=not last)
            self.pre_step()
            if last:
                for p in self.params:
                    p.summed_grad = None

        def add_noise(self) -> None:
            super().add_noise()
            noise.add([p.grad for p in self.params])

    taker: Taker = Addressed(
        torch.optim.SGD(parameters),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=expected,
        loss_reduction="mean",
    )
    return taker


def _forget(root: nn.Module) -> None:
    for module in root.modules():
        for mark in ON_MODULES:
            vars(module).pop(mark, None)
    for p in root.parameters():
        for mark in ON_PARAMETERS:
            vars(p).pop(mark, None)
        p.grad = None


def separate(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the parts without those that are inside others; each layer is then there once.

    Raises:
        ConfigError: two parts share some layers but not all, which would be counted twice.
    """
    unique = list({id(part): part for part in parts}.values())
    inside = {id(m) for part in unique for m in part.modules() if m is not part}
    kept = [part for part in unique if id(part) not in inside]
    seen: set[int] = set()
    for part in kept:
        layers = {id(m) for m in part.modules() if any(True for _ in m.parameters(recurse=False))}
        if layers & seen:
            raise ConfigError(
                "DP-SGD: two networks that train together share some of their layers, so their "
                "per-example gradients would be counted twice; share all layers or none"
            )
        seen |= layers
    return kept


def linear_norms(
    layer: nn.Linear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the norm (B,) of each example's gradient of weight and bias of a linear layer.

    A vector an example: ``||g|| ||a||`` without forming the product. Where an example has several
    rows, gradients are formed: Opacus' trick with Gram matrices subtracts large numbers, which can
    round a norm down, and it returns nothing at all for more than two dimensions.
    """
    from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample

    sampler: Callable[..., dict[nn.Parameter, Tensor]] = compute_linear_norm_sample
    if backprops.dim() == 2:
        return sampler(layer, activations, backprops)
    samples = compute_linear_grad_sample(layer, activations, backprops)
    return {p: g.flatten(1).norm(dim=1) for p, g in samples.items()}
