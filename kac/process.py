"""The Kac process of one coordinate: a particle of speed c that reverses at the events of a Poisson process of rate a.

Its density solves the damped wave equation p_tt + 2 a p_t = c^2 p_xx (arXiv 2506.20641, section 2).
This module uses r = sqrt((ct - x)(ct + x)) and z = a r / c.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SERIES_LIMIT = 0.25
"""Below this z^2, ratios of Bessel functions are computed from power series, because the closed form divides by z."""

CDF_NODES, CDF_REACH = 96, 12.0
"""Number of quadrature nodes for the cdf, and their range in standard deviations. The mass outside is below 1e-30."""


class KacNoise(NamedTuple):
    """One draw of the process: a particle's displacement, and whether the particle has made no reversal yet."""

    displacement: Tensor  # K_t, same shape as t, |K_t| <= c t
    is_atom: Tensor  # bool, same shape as t; True: no reversal yet, so |K_t| = c t


@dataclass(frozen=True)
class KacProcess:
    """The Kac process with reversal rate ``a`` (1/time) and speed ``c`` (length/time).

    Example:
        >>> noise = KacProcess(a=9, c=3).sample(torch.ones(1000), torch.Generator().manual_seed(0))
        >>> bool((noise.displacement.abs() <= 3).all())  # nothing moves faster than c
        True

    Raises:
        ValueError: ``a`` or ``c`` is not a positive finite number.
    """

    a: float = 25.0
    c: float = 5.0

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("c", self.c)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` is {value}, but must be positive and finite.")

    def sample(self, t: Tensor | float, generator: torch.Generator | None = None) -> KacNoise:
        """Draw K_t exactly, one independent particle per element of ``t`` (any shape, t >= 0).

        With N ~ Poisson(a t) reversals, the particle moves in its first direction for a fraction
        B ~ Beta(floor(N/2) + 1, ceil(N/2)) of the time, so K = +-ct (2B - 1). Because both signs are equally likely,
        Beta(k + 1, k) and Beta(k, k) with k = ceil(N/2) give the same distribution of K. A symmetric beta variable
        is a function of two uniforms (G. Ulrich, Appl. Stat. 33, 1984): 2B - 1 = sqrt(1 - U^(2/(2k - 1))) cos(2 pi V).

        Args:
            generator: generator of all random numbers, on the same device as ``t``.

        Raises:
            ValueError: a time is negative or not finite. Times on a GPU are not checked, to avoid a synchronisation.
        """
        t = _as_times(t)
        if not t.is_cuda and not bool(((t >= 0) & (t < math.inf)).all()):
            raise ValueError("`t` contains negative or non-finite times. All times must be finite and at least 0.")
        reversals = torch.poisson(self.a * t, generator=generator)
        u = torch.rand(t.shape, generator=generator, dtype=t.dtype, device=t.device)
        angle = torch.rand(t.shape, generator=generator, dtype=t.dtype, device=t.device).mul_(2 * math.pi)
        is_atom = reversals == 0
        # 2k - 1 with k = ceil(N/2): 1, 1, 3, 3, 5, 5, ... for N = 1, 2, 3, ...; not used for atoms (N = 0).
        exponent = reversals.clamp_(min=1).add_(1).div_(2, rounding_mode="floor").mul_(2).sub_(1)
        inside = u.log_().mul_(2).div_(exponent).expm1_().neg_().sqrt_().mul_(angle.cos())
        coin = torch.where(angle < math.pi, 1.0, -1.0).to(t.dtype)
        return KacNoise(torch.where(is_atom, coin, inside).mul_(self.c * t), is_atom)

    def from_uniforms(self, uniforms: Tensor, t: float) -> Tensor:
        """Return K_t at a common time ``t``, computed from three uniforms per particle: [*shape], float64.

        A particle's result depends only on the particle's own uniforms, so a counter-based generator can reproduce it.

        Args:
            uniforms: [3, *shape] in (0, 1), float64. They determine the number of reversals, the radius and the angle.
        """
        rate = self.a * t
        most = int(rate + 12 * math.sqrt(rate) + 40)
        counts = torch.arange(most, dtype=torch.float64)
        poisson_cdf = torch.special.gammaincc(counts + 1, torch.tensor(rate, dtype=torch.float64))
        reversals = torch.searchsorted(poisson_cdf, uniforms[0].contiguous())
        exponent = 2 * ((reversals + 1) // 2) - 1
        angle = 2 * math.pi * uniforms[2]
        inside = torch.sqrt(-torch.expm1(2 * torch.log(uniforms[1]) / exponent.clamp(min=1))) * torch.cos(angle)
        coin = torch.where(uniforms[2] < 0.5, 1.0, -1.0).to(torch.float64)
        return self.c * t * torch.where(reversals == 0, coin, inside)

    def velocity(self, x: Tensor, t: Tensor | float, is_atom: Tensor | None = None) -> Tensor:
        """Return the conditional velocity v = E[dK_t/dt | K_t = x], broadcast over x and t, where |v| <= c.

        In the cone |x| <= ct, v = a x / (a t + h(z)) with h(z) = z I0(z) / I1(z). On an atom, v = sign(x) c. Outside
        the cone, where the density is 0, v keeps its value at the edge, so rounding errors in x or ct cannot raise v
        above c. Gradients are finite everywhere.

        Args:
            is_atom: bool, true for particles that have never reversed; None if no particle is an atom.
        """
        t = _as_times(t, like=x)
        edge = self.c * t
        x_inside = torch.minimum(torch.maximum(x, -edge), edge)
        # Rounding can move x beyond the edge, where z^2 < 0 and h would fall below 2. Use z = 0 there.
        v = self.a * x_inside / (self.a * t + _h(self._z_squared(x, t).clamp(min=0)))
        return v if is_atom is None else torch.where(is_atom, torch.sign(x) * self.c, v)

    def density(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the density of the continuous part, whose mass is 1 - exp(-a t). The density is 0 outside the cone.

        p = a exp(-a t) / (2 c) (I0(z) + (c t / r) I1(z)), evaluated with scaled Bessel functions.
        """
        t = _as_times(t, like=x)
        at = self.a * t
        z_squared = self._z_squared(x, t).clamp(min=0)
        q = z_squared.clamp(max=SERIES_LIMIT)
        i0 = 1 + q / 4 * (1 + q / 16 * (1 + q / 36 * (1 + q / 64)))
        i1_over_z = 0.5 * (1 + q / 8 * (1 + q / 24 * (1 + q / 48 * (1 + q / 80))))
        near_edge = torch.exp(-at) * (i0 + at * i1_over_z)
        z = z_squared.clamp(min=SERIES_LIMIT).sqrt()
        # Compute exp(z - a t) from z - a t = -(a x / c)^2 / (a t + z), because the plain difference would cancel.
        scale = torch.exp(-((self.a * x / self.c) ** 2) / (at + z))
        inside = scale * (torch.special.i0e(z) + at * torch.special.i1e(z) / z)
        density = self.a / (2 * self.c) * torch.where(z_squared < SERIES_LIMIT, near_edge, inside)
        return torch.where(x.abs() <= self.c * t, density, torch.zeros_like(density))

    def cdf(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return P(K_t <= x), including the atoms. Gauss-Legendre quadrature needs CDF_NODES times the memory of x."""
        t = _as_times(t, like=x)
        nodes, weights = _gauss_legendre(CDF_NODES, x)
        reach = torch.minimum(torch.minimum(x.abs(), self.c * t), CDF_REACH * self.variance(t).sqrt())
        t_nodes = torch.broadcast_to(t, reach.shape)[..., None]
        half_mass = (self.density(reach[..., None] * nodes, t_nodes) * weights).sum(-1) * reach
        edge, lower_atom = self.c * t, 0.5 * torch.exp(-self.a * t)
        inside = torch.where(x == -edge, lower_atom, 0.5 + torch.sign(x) * half_mass)
        return torch.where(x >= edge, 1.0, torch.where(x < -edge, 0.0, inside)).to(x.dtype)

    def variance(self, t: Tensor | float) -> Tensor:
        """Return Var K_t = (c^2 / 2 a^2) (2 a t - 1 + exp(-2 a t)), with the shape of t."""
        t = _as_times(t)
        u = 2 * self.a * t
        tail = 1 - u / 6 * (1 - u / 7 * (1 - u / 8 * (1 - u / 9)))
        series = u * u / 2 * (1 - u / 3 * (1 - u / 4 * (1 - u / 5 * tail)))
        return self.c**2 / (2 * self.a**2) * torch.where(u < SERIES_LIMIT, series, u + torch.expm1(-u))

    def _z_squared(self, x: Tensor, t: Tensor) -> Tensor:
        # Use float64, because near the cone's edge ct - x cancels, and a float32 ct would lose the last digits.
        edge, x_wide = self.c * t.double(), x.double()
        return ((self.a / self.c) ** 2 * ((edge - x_wide) * (edge + x_wide))).to(x.dtype)


def _as_times(t: Tensor | float, like: Tensor | None = None) -> Tensor:
    if isinstance(t, Tensor):
        return t
    return torch.as_tensor(t, dtype=like.dtype, device=like.device) if like is not None else torch.tensor(float(t))


def _h(z_squared: Tensor) -> Tensor:
    """Return h(z) = z I0(z) / I1(z) = 2 + z^2/4 - z^4/96 + z^6/1536 - ... for z^2 >= 0."""
    q = z_squared.clamp(max=SERIES_LIMIT)
    series = 2 + q / 4 * (1 - q / 24 * (1 - q / 16 * (1 - q / 15 * (1 - q * 13 / 192))))
    # The slope of sqrt is infinite at 0, which would make the gradient NaN even in the branch that is not selected.
    z = z_squared.clamp(min=SERIES_LIMIT).sqrt()
    return torch.where(z_squared < SERIES_LIMIT, series, z * torch.special.i0e(z) / torch.special.i1e(z))


def _gauss_legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2).to(like), torch.from_numpy(weights / 2).to(like)
