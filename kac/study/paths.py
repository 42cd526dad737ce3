"""Claim: Kac paths make flows that are easier to follow than Gaussian paths (arXiv 2509.21513, 2506.20641).

Teachers that differ only in path and training seed are compared. Teachers with the same path are repeats: each value is
a mean over the repeats, with its range. The Lipschitz constant of a flow is the largest spectral norm of the velocity's
Jacobian in x. It bounds how fast errors grow along a trajectory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kac.metrics.distances import kernel_distance
from kac.metrics.quality import Reference
from kac.model import deliver, load_model
from kac.networks import VelocityNetwork
from kac.path import KacPath
from kac.precision import Precision
from kac.sampling import TEACHER_STEPS, generate, velocity_of
from kac.solvers import knot_times, solve
from kac.study.solver_steps import MARKERS, STEPS, TeacherQuality, quality_of_teachers, set_nfe_axes
from kac.study.speed_limit import Speeds
from kac.study.subject import TIME, ClaimResult, Inputs, Subject, Watched, panels, png
from kac.util.device import default_device

KNOTS = (*range(0, TEACHER_STEPS, 5), TEACHER_STEPS - 1)
"""Solver steps at which Jacobians are measured. The last step starts just before the image."""

TIMES = tuple(knot_times(TEACHER_STEPS)[list(KNOTS)].tolist())

JACOBIANS = 128
"""Number of trajectories along which Jacobians are measured."""

POWER_ITERATIONS = 20


class Spread(NamedTuple):
    """The mean and range of a value over repeats."""

    mean: float
    lowest: float
    highest: float
    repeats: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return Spread(fmean(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        """Return MEAN (LOWEST to HIGHEST), or only the mean if all values round to the same."""
        mean, lowest, highest = (f"{value:.3g}" for value in self[:3])
        return mean if lowest == highest else f"{mean} ({lowest} to {highest})"


def measure(inputs: Inputs) -> ClaimResult | str:
    """Measure the teacher and its rivals, grouped by path."""
    if not inputs.rivals:
        return "no `rivals`"
    quality, pixels = quality_of_teachers(inputs), inputs.pixels
    reference = Reference({}, pixels(quality.real), lambda: pixels.of_training_images(inputs.images))
    models: dict[str, dict[str, dict[str, float]]] = {}  # the values by path and model
    for model, teacher in zip((inputs.teacher, *inputs.rivals), inputs.teachers(), strict=True):
        sampling = teacher.sampling._replace(solver="ab2", steps=TEACHER_STEPS, knot_grid="uniform")
        subject = replace(teacher, sampling=sampling)
        images, values = follow(subject)
        values |= {
            f"frechet_distance_{space}_{point.method}_{point.steps}": distance
            for point in quality.found[subject.name]
            for space, distance in point.distances.items()
        }
        for space in inputs.spaces:
            values[f"kid_{space.name}_to_held_out"] = kernel_distance(space(quality.real), space(images))
        if reference.distance_of_held_out:
            values["memorisation"] = reference.distance_to_train(pixels(images)) / reference.distance_of_held_out
        values |= lipschitz(subject, Precision(compile=False).wrap(load_model(model.path, default_device()).network))
        models.setdefault(str(model.config.path), {})[subject.name] = values
    spreads = {}
    for path, repeats in models.items():
        first, *others = repeats.values()
        spreads[path] = {name: Spread.of([first[name], *(other[name] for other in others)]) for name in first}
    shown, lines = inputs.spaces[-1].name, []
    for path, own in spreads.items():
        few, many = (f"{own[f'frechet_distance_{shown}_ab2_{n}']} in {n}" for n in (STEPS[0], STEPS[-1]))
        lines.append(f"{path}: FD {shown} {few} and {many} steps, largest Lipschitz norm {own['lipschitz']}")
    metrics = {f"{name}/{path}": spread.mean for path, own in spreads.items() for name, spread in own.items()}
    summary = {path: {name: spread._asdict() for name, spread in own.items()} for path, own in spreads.items()}
    values_of_claim = {"held_out": quality.floor, "paths": summary, "models": models}
    return ClaimResult("; ".join(lines), values_of_claim, metrics, _plot(spreads, quality), _table(spreads, quality))


def follow(subject: Subject) -> tuple[Tensor, dict[str, float]]:
    """Return delivered samples [count, *sample], with the energy and the speeds of their trajectories.

    Speeds are relative to the speed limit of the subject's own path. They are left out without a limit.
    """
    path, images, energies, network = subject.config.path.build(), [], [], subject.network
    counted = Speeds(path) if isinstance(path, KacPath) and not subject.config.data.autoencoder else None
    if counted:
        network = Watched(network, lambda x, t, u: counted.see(t, u))
    for x_1, label in subject.starts():
        solution = generate(network, x_1, label, subject.sampling)
        images.append(deliver(subject.config, solution.x))
        energies.append(solution.kinetic_energy.cpu())
    values = {"kinetic_energy": torch.cat(energies).double().mean().item()}
    if counted:
        values |= {"largest_of_limit": counted.largest / counted.limit, "percent_beyond": 100 * counted.share_beyond}
        values |= {"percent_beyond_now": 100 * counted.share_beyond_now}
    return torch.cat(images), values


def lipschitz(subject: Subject, network: VelocityNetwork) -> dict[str, float]:
    """Return the largest and mean spectral norm of ``network``'s Jacobians along the first ``JACOBIANS`` trajectories.

    The names ``lipschitz`` and ``lipschitz_mean`` are for all ``KNOTS``. For one knot, ``_t=0.5`` follows the name.
    """
    norms: list[list[Tensor]] = [[] for _ in KNOTS]
    for x_1, label in replace(subject, count=min(subject.count, JACOBIANS)).starts():
        velocity = velocity_of(network, x_1, label, subject.sampling)
        with torch.no_grad():
            states = solve(velocity, x_1, knot_times(TEACHER_STEPS), "ab2", KNOTS).knots
        for time, x, own in zip(TIMES, states, norms, strict=True):
            own.append(spectral_norms(partial(velocity, t=torch.tensor(time).to(x)), x))
    each = torch.stack([torch.cat(own) for own in norms]).double().cpu()  # [knots, trajectories]
    values = {"lipschitz": each.max().item(), "lipschitz_mean": each.mean().item()}
    for time, own in zip(TIMES, each, strict=True):
        values |= {f"lipschitz_t={time:g}": own.max().item(), f"lipschitz_mean_t={time:g}": own.mean().item()}
    return values


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


def _table(spreads: Mapping[str, Mapping[str, Spread]], quality: TeacherQuality) -> str:
    """Return two Markdown tables with one row per path: Frechet distances, and all other values."""
    *others, shown = quality.floor
    chosen = [("ab2", "AB-2", STEPS), ("euler", "Euler", (20, 100)), ("heun", "Heun", (20, 100))]
    distances = {
        f"{title} {n}": f"frechet_distance_{shown}_{method}_{n}" for method, title, counts in chosen for n in counts
    }
    rest = {f"FD {space}": f"frechet_distance_{space}_ab2_{STEPS[-1]}" for space in others}
    rest |= {f"KID {shown}": f"kid_{shown}_to_held_out", "memory ratio": "memorisation"}
    rest |= {"beyond the limit, %": "percent_beyond", "beyond it at their time, %": "percent_beyond_now"}
    rest |= {"largest speed / limit": "largest_of_limit"}
    rest |= {"energy": "kinetic_energy", "Lipschitz, largest": "lipschitz", "Lipschitz, mean": "lipschitz_mean"}
    tables = []
    for columns in (distances, rest):
        lines = [["path", "models", *columns], ["---"] * (len(columns) + 2)]
        for path, own in spreads.items():
            cells = (str(own.get(name, "none")) for name in columns.values())
            lines.append([path, str(own["lipschitz"].repeats), *cells])
        if columns is distances:
            lines.append(["held-out images", str(len(quality.real)), *[f"{quality.floor[shown]:.3g}"] * len(columns)])
        tables.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return (
        f"Frechet distance of delivered samples to the training images in {shown} features, by solver and steps. "
        f"Values are means over training seeds, with their range.\n\n{tables[0]}\n"
        f"Samples of AB-2 in {STEPS[-1]} steps. KID is the distance to held-out images.\n\n{tables[1]}"
    )


def _plot(spreads: Mapping[str, Mapping[str, Spread]], quality: TeacherQuality) -> bytes:
    """Plot Frechet distances of AB-2 in at most two feature spaces, and the Jacobians' norms. Bands are ranges."""
    spaces = list(quality.floor)[-2:]
    figure, (*distances, norms) = panels(1, len(spaces) + 1)
    curves = [(axis, f"frechet_distance_{s}_ab2_{{:g}}", STEPS, "-") for axis, s in zip(distances, spaces, strict=True)]
    curves += [(norms, "lipschitz_t={:g}", TIMES, "-"), (norms, "lipschitz_mean_t={:g}", TIMES, ":")]
    for number, (path, own) in enumerate(spreads.items()):
        for axis, name, x, line in curves:
            mean, lowest, highest, _ = zip(*(own[name.format(each)] for each in x), strict=True)
            marker = MARKERS[number % len(MARKERS)] if line == "-" else ""
            axis.plot(x, mean, marker + line, color=f"C{number}", label=path, markersize=5)
            axis.fill_between(x, lowest, highest, color=f"C{number}", alpha=0.2, linewidth=0)
    for axis, space in zip(distances, spaces, strict=True):
        axis.axhline(quality.floor[space], color="black", linewidth=0.8, label=f"real images ({len(quality.real):,})")
        set_nfe_axes(axis, space, STEPS)
    norms.set(yscale="log", ylabel="spectral norm of du/dx", **TIME)
    norms.set_title("Lipschitz norm: largest (solid), mean (dotted)")
    figure.legend(*distances[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Paths at equal budget, AB-2, w = 0: mean and range over training seeds")
    return png(figure)
