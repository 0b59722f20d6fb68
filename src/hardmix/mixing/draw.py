"""The random draws behind the plans. All on the CPU, so that every device, worker and rank sees the same plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from hardmix import _check
from hardmix._math import CPU, is_transformed, settled

PAIRINGS = ("shift", "permutation", "reversal", "matching")
PER = ("batch", "pair", "sample")


class Pairing(NamedTuple):
    """(N,) partner rows on the CPU, and the cyclic shift that made them, if one did."""

    partner: Tensor
    shift: int | None


class LabelPairing:
    """A way to draw partners that looks at the labels; stands where the name of a pairing may."""

    def draw(self, who: str, y: Tensor | None, rows: int, generator: Generator | None) -> Pairing:
        """Partners of `rows` rows with labels `y`."""
        raise NotImplementedError


def cpu_generator(who: str, generator: Generator | None) -> Generator | None:
    """Plans are drawn on the CPU, so the generator has to live there."""
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"{who}: generator is a {type(generator).__name__}; pass a torch.Generator or None.")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"{who}: generator is on {generator.device}; pass a CPU torch.Generator, the plan is drawn there and moved "
            "once."
        )
    return generator


def draw_partner(n: int, pairing: str, generator: Generator | None) -> Pairing:
    """Who is mixed with whom.

    shift: partner[i] = (i + k) mod n with one k drawn from 1..n-1: each other row equally likely, never the row itself,
        and on a CPU two contiguous blocks are blended instead of rows gathered. n = 1 gives the row itself.
    permutation: a random permutation; a row meets itself with probability 1 / n.
    reversal: partner[i] = n - 1 - i; the middle row of an odd batch meets itself. Nothing is drawn.
    matching: a random perfect matching, partner[partner[i]] = i; one row of an odd batch meets itself.
    """
    if pairing == "shift":
        if n == 1:
            return Pairing(torch.zeros(1, dtype=torch.long, device=CPU), 0)
        # Not randint, which would be compiled anew for each batch size; in float64 the product stays below n - 1.
        unit = _of(generator, torch.rand, 1, dtype=torch.float64)
        # Neither the compiler, which fuses a gather with the blend, nor torch.func.vmap lets k be read on the host.
        if torch.compiler.is_compiling() or is_transformed():
            return Pairing(settled((row_numbers(n) + (unit * (n - 1)).long() + 1) % n), None)
        shift = int(unit.item() * (n - 1)) + 1
        return Pairing(torch.arange(shift, shift + n, device=CPU).remainder_(n), shift)
    if pairing == "permutation":
        return Pairing(_of(generator, torch.randperm, n), None)
    if pairing == "reversal":
        return Pairing(torch.arange(n - 1, -1, -1, device=CPU), None)
    order = _of(generator, torch.randperm, n)
    half = n // 2
    first, second = order[:half], order[half : 2 * half]
    partner = row_numbers(n).index_put((first,), second).index_put((second,), first)
    return Pairing(partner, None)


def given_partner(who: str, partner: Tensor, n: int) -> Pairing:
    """A partner handed in by the caller: (n,) integer rows in range."""
    partner = _check.tensor(who, "partner", partner)
    if partner.shape != (n,) or partner.is_floating_point() or partner.dtype == torch.bool:
        raise ValueError(
            f"{who}: partner has shape {tuple(partner.shape)} and dtype {partner.dtype}; "
            f"pass ({n},) integer row numbers."
        )
    partner = partner.to("cpu", torch.long)
    if not torch.compiler.is_compiling() and bool(((partner < 0) | (partner >= n)).any()):
        raise ValueError(f"{who}: partner holds {partner.tolist()}; pass row numbers from 0 to {n - 1}.")
    return Pairing(partner, None)


def draw_beta(a: float, b: float, n: int, generator: Generator | None) -> Tensor:
    """(n,) float32 draws of Beta(a, b), true to it for parameters from 1e-4 to 1e4 and never NaN for other finite ones.

    Gamma(a) is drawn as Gamma(a + 1) u^(1/a) and the ratio is formed from logarithms: for small parameters both
    gammas underflow to 0 and their plain ratio is 0 / 0. Beta(1, 1) is the uniform distribution and drawn as such.
    """
    if a == 1.0 and b == 1.0:
        return _of(generator, torch.rand, n, dtype=torch.float32)
    # Below 1e-306 the logarithms would overflow, and their difference be NaN.
    shape = torch.tensor([[max(a, 1e-300)], [max(b, 1e-300)]], dtype=torch.float64, device=CPU)
    gamma = draw_gamma((shape + 1.0).expand(2, n), generator)
    # rand can return 0, whose logarithm is -inf for both gammas and their difference NaN.
    uniform = _of(generator, torch.rand, (2, n), dtype=torch.float64).clamp_(min=2.0**-60)
    log_gamma = gamma.log_().add_(uniform.log_().div_(shape))
    return torch.sigmoid(log_gamma[0] - log_gamma[1]).to(torch.float32)


def draw_gamma(shape: Tensor, generator: Generator | None) -> Tensor:
    """Draws of Gamma(shape), one for each of the positive numbers `shape` on the CPU."""
    if torch.compiler.is_compiling() and generator is None:
        return torch.ops.hardmix.standard_gamma(shape)
    return torch._standard_gamma(shape, generator=generator)


if not hasattr(torch.ops.hardmix, "standard_gamma"):  # the module may be imported anew, an operation defined once
    # torch's own operation has no form for the compiler before torch 2.13. The tag keeps two draws from becoming one.
    torch.library.define(
        "hardmix::standard_gamma", "(Tensor shape) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
    )
    torch.library.impl("hardmix::standard_gamma", "cpu", torch._standard_gamma)
    torch.library.register_fake("hardmix::standard_gamma", lambda shape: shape.new_empty(shape.shape))


def draw_lam(alpha: float, pairing: Pairing, per: str, generator: Generator | None) -> Tensor:
    """(N,) float32 shares of the own sample, lam ~ Beta(alpha, alpha), drawn once per batch, pair or sample.

    Per pair, rows i and partner[i] share one lambda: the lower row's.
    """
    n = pairing.partner.shape[0]
    if per == "batch":
        return draw_beta(alpha, alpha, 1, generator).expand(n).contiguous()
    lam = draw_beta(alpha, alpha, n, generator)
    if per == "pair":
        lam = lam[torch.minimum(row_numbers(n), pairing.partner)]
    return lam


def uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """float32 draws, uniform in [low, high)."""
    draws = _of(generator, torch.rand, shape, dtype=torch.float32)
    return draws if (low, high) == (0.0, 1.0) else draws.mul_(high - low).add_(low)


def normal(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """float32 standard normal draws."""
    return _of(generator, torch.randn, shape, dtype=torch.float32)


def row_numbers(count: int) -> Tensor:
    """0 to count - 1 on the CPU, as long."""
    return torch.arange(count, device=CPU)


def move(value: Tensor, device: torch.device | str) -> Tensor:
    """A draw on another device, without waiting for the work queued there."""
    return value.to(device, non_blocking=torch.device(device).type == "cuda")


def _of(generator: Generator | None, draw: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """draw(*args) on the CPU, from `generator` where there is one."""
    # Naming a generator, even None, picks an overload that torch.compile compiles anew for each batch size.
    if generator is None:
        return draw(*args, **kwargs, device=CPU)
    return draw(*args, **kwargs, device=CPU, generator=generator)
