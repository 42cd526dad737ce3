"""Claim: Kac paths make flows that are easier to follow than Gaussian paths (arXiv 2509.21513, 2506.20641).

Teachers that differ only in path and training seed are compared. Teachers with the same path are repeats: each value is
a mean over the repeats, with its range. The Lipschitz constant of a flow is the largest spectral norm of the velocity's
Jacobian in x. It bounds how fast errors grow along a trajectory.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kac.metrics.distances import kernel_distance
from kac.metrics.quality import Reference
from kac.model import load_model
from kac.networks import VelocityNetwork
from kac.precision import Precision
from kac.sampling import TEACHER_STEPS, generate, velocity_of
from kac.solvers import knot_times, solve
from kac.study.solver_steps import MARKERS, STEPS, quality_of_teachers
from kac.study.speed_limit import Speeds
from kac.study.subject import TIME, ClaimResult, Inputs, Subject, Watched, panels, png
from kac.util.device import default_device
from kac.util.images import delivered

KNOTS = (*range(0, TEACHER_STEPS, 5), TEACHER_STEPS - 1)
"""Solver steps at which Jacobians are measured. The last step starts just before the image."""

JACOBIANS = 128
"""Number of trajectories along which Jacobians are measured."""

POWER_ITERATIONS = 20


class Spread(NamedTuple):
    """The mean and range of a value over repeats."""

    mean: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return Spread(fmean(values), min(values), max(values))

    def __str__(self) -> str:
        """Return MEAN (LOWEST to HIGHEST), or only the mean if all values round to the same."""
        mean, lowest, highest = (f"{value:.3g}" for value in self)
        return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


class Stretch(NamedTuple):
    """The spectral norms of Jacobians at one time."""

    t: float
    largest: float
    mean: float


def measure(inputs: Inputs) -> ClaimResult | str:
    """Measure the teacher and its rivals, grouped by path."""
    if not inputs.rivals:
        return "no `rivals`"
    found, real, floor = quality_of_teachers(inputs)
    pixels, held_out = inputs.pixels, {space.name: space(real) for space in inputs.spaces}
    reference = Reference({}, held_out[pixels.name], lambda: pixels.of_training_images(inputs.data))
    models: dict[str, dict[str, dict[str, Any]]] = {}  # the values by path and model
    for model, subject in zip((inputs.teacher, *inputs.rivals), inputs.teachers(), strict=True):
        plain = Precision(compile=False).wrap(load_model(model.path, default_device()).network)
        values: dict[str, Any] = {
            f"frechet_distance_{space}_{point.method}_{point.steps}": distance
            for point in found[subject.name]
            for space, distance in point.distances.items()
        }
        images, of_velocities = follow(
            replace(subject, sampling=subject.sampling._replace(solver="ab2", steps=TEACHER_STEPS))
        )
        for space in inputs.spaces:
            values[f"kid_{space.name}_to_held_out"] = kernel_distance(held_out[space.name], space(images))
        if reference.distance_of_held_out:
            values["memorisation"] = reference.distance_to_train(pixels(images)) / reference.distance_of_held_out
        stretches = lipschitz(subject, plain)
        values |= of_velocities | {
            "lipschitz": max(each.largest for each in stretches),
            "lipschitz_mean": fmean(each.mean for each in stretches),
            "jacobians": [each._asdict() for each in stretches],
        }
        models.setdefault(str(model.config.path), {})[subject.name] = values
    spreads = {path: _spreads(list(repeats.values())) for path, repeats in models.items()}
    shown = inputs.spaces[-1].name
    lines = []
    for path, own in spreads.items():
        few, many = (f"{own[f'frechet_distance_{shown}_ab2_{n}']} in {n}" for n in (STEPS[0], STEPS[-1]))
        lines.append(f"{path}: FD {shown} {few} and {many} steps, largest Lipschitz norm {own['lipschitz']}")
    metrics = {f"{name}/{path}": spread.mean for path, own in spreads.items() for name, spread in own.items()}
    summary = {path: {name: spread._asdict() for name, spread in own.items()} for path, own in spreads.items()}
    picture = _plot(models, spreads, floor, len(real))
    table = _table(models, spreads, floor, len(real))
    return ClaimResult("; ".join(lines), {"paths": summary, "models": models}, metrics, picture, table)


def follow(subject: Subject) -> tuple[Tensor, dict[str, float | None]]:
    """Return delivered samples [count, *sample], with the energy and the speeds of their trajectories.

    Speeds are relative to the speed limit of the subject's own path, and None if it has no limit.
    """
    limit = subject.config.path.build().speed_limit()
    counted, images, energies = Speeds(limit), [], []
    network = Watched(subject.network, lambda x, t, u: counted.see(u))
    for x_1, label in subject.starts():
        solution = generate(network, x_1, label, subject.sampling)
        images.append(delivered(solution.x.cpu()))
        energies.append(solution.kinetic_energy.cpu())
    values: dict[str, float | None] = {"kinetic_energy": torch.cat(energies).double().mean().item()}
    values["largest_of_limit"] = counted.largest / limit if math.isfinite(limit) else None
    values["share_beyond"] = counted.share_beyond if math.isfinite(limit) else None
    return torch.cat(images), values


def lipschitz(subject: Subject, network: VelocityNetwork) -> list[Stretch]:
    """Return the spectral norms of ``network``'s Jacobians along the subject's first trajectories, at ``KNOTS``."""
    norms: list[list[Tensor]] = [[] for _ in KNOTS]
    sampling, times = subject.sampling._replace(solver="ab2", steps=TEACHER_STEPS), knot_times(TEACHER_STEPS)
    for x_1, label in replace(subject, count=min(subject.count, JACOBIANS)).starts():
        velocity = velocity_of(network, x_1, label, sampling)
        with torch.no_grad():
            states = solve(velocity, x_1, times, sampling.solver, KNOTS).knots
        for n, x in enumerate(states):
            t = times[KNOTS[n]].to(x)
            norms[n].append(spectral_norms(lambda x, velocity=velocity, t=t: velocity(x, t), x))  # type: ignore[misc]
    together = [torch.cat(parts) for parts in norms]
    return [Stretch(times[k].item(), n.max().item(), n.mean().item()) for k, n in zip(KNOTS, together, strict=True)]


def spectral_norms(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the spectral norm [batch] of the Jacobian J of each sample's velocity, by power iteration on J^T J.

    The result approaches the norm from below. ``u`` maps x [batch, *sample] to velocities that do not depend on the
    other samples in the batch.
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    x, w = x.clone().requires_grad_(), torch.zeros_like(x, requires_grad=True)
    image: Tensor = v
    # J v is the gradient of (J^T w) v in w. Networks have second derivatives, but not always forward derivatives.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        velocity = u(x)
        (transposed,) = torch.autograd.grad(velocity, x, w, create_graph=True)
        for _ in range(POWER_ITERATIONS):
            lengths = v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
            direction = v / lengths.reshape(-1, *[1] * (x.ndim - 1))
            (image,) = torch.autograd.grad(transposed, w, direction, retain_graph=True)
            (v,) = torch.autograd.grad(velocity, x, image, retain_graph=True)
    norms: Tensor = image.flatten(1).norm(dim=1)
    return norms


def _spreads(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Return the spread of each number that the repeats have."""
    names = [name for name, value in repeats[0].items() if isinstance(value, float)]
    return {name: Spread.of([values[name] for values in repeats]) for name in names}


def _table(
    models: Mapping[str, Any], spreads: Mapping[str, Mapping[str, Spread]], floor: Mapping[str, float], count: int
) -> str:
    """Return two Markdown tables with one row per path: Frechet distances, and all other values."""
    *others, shown = floor
    chosen = [("ab2", "AB-2", STEPS), ("euler", "Euler", (20, 100)), ("heun", "Heun", (20, 100))]
    distances = {
        f"{title} {n}": f"frechet_distance_{shown}_{method}_{n}" for method, title, counts in chosen for n in counts
    }
    rest = {f"FD {space}": f"frechet_distance_{space}_ab2_{STEPS[-1]}" for space in others}
    rest |= {f"KID {shown}": f"kid_{shown}_to_held_out", "memory ratio": "memorisation"}
    rest |= {"beyond the limit": "share_beyond", "largest speed / limit": "largest_of_limit"}
    rest |= {"energy": "kinetic_energy", "Lipschitz, largest": "lipschitz", "Lipschitz, mean": "lipschitz_mean"}

    def rows(columns: Mapping[str, str]) -> list[list[str]]:
        return [
            [path, str(len(models[path])), *(str(own.get(name, "none")) for name in columns.values())]
            for path, own in spreads.items()
        ]

    first = [*rows(distances), [f"held-out images ({count:,})", "", *[f"{floor[shown]:.3g}"] * len(distances)]]
    tables = []
    for columns, body in ((distances, first), (rest, rows(rest))):
        lines = [["path", "trained", *columns], ["---"] * (len(columns) + 2), *body]
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return (
        f"Frechet distance of delivered samples to the training images in {shown} features, by solver and steps. "
        f"Values are means over training seeds, with their range.\n\n{tables[0]}\n"
        f"The same samples of AB-2 in {STEPS[-1]} steps. KID is the distance to held-out images.\n\n{tables[1]}"
    )


def _plot(
    models: Mapping[str, Any], spreads: Mapping[str, Mapping[str, Spread]], floor: Mapping[str, float], count: int
) -> bytes:
    """Plot Frechet distances of AB-2 in at most two feature spaces, and the Jacobians' norms. Bands are ranges."""
    spaces = list(floor)[-2:]
    figure, (*quality, norms) = panels(1, len(spaces) + 1)

    def draw(axis: Any, x: Sequence[float], values: Sequence[Spread], style: str, number: int, label: str) -> None:
        axis.plot(x, [each.mean for each in values], style, color=f"C{number}", label=label, markersize=5)
        lowest, highest = [each.lowest for each in values], [each.highest for each in values]
        axis.fill_between(x, lowest, highest, color=f"C{number}", alpha=0.2, linewidth=0)

    for number, (path, own) in enumerate(spreads.items()):
        marker = MARKERS[number % len(MARKERS)]
        for axis, space in zip(quality, spaces, strict=True):
            distances = [own[f"frechet_distance_{space}_ab2_{n}"] for n in STEPS]
            draw(axis, STEPS, distances, f"{marker}-", number, path)
        at_knots = list(zip(*(values["jacobians"] for values in models[path].values()), strict=True))
        for field, style in (("largest", f"{marker}-"), ("mean", ":")):
            values = [Spread.of([repeat[field] for repeat in repeats]) for repeats in at_knots]
            draw(norms, [repeats[0]["t"] for repeats in at_knots], values, style, number, "")
    for axis, space in zip(quality, spaces, strict=True):
        axis.axhline(floor[space], color="black", linewidth=0.8, label=f"held-out images ({count:,})")
        axis.set(
            xscale="log", yscale="log", xlabel="network evaluations (NFE) per sample, AB-2", title=f"features: {space}"
        )
        axis.set_ylabel("Frechet distance to training images")
        axis.set_xticks(STEPS)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    norms.set(
        yscale="log", ylabel="spectral norm of du/dx", title="largest (solid) and mean (dotted) Lipschitz norm", **TIME
    )
    figure.legend(*quality[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Paths at equal budget: means over training seeds, with their range")
    return png(figure)
