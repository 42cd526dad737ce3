"""The diffusers pipeline of an exported model, and its own components. ``bundle`` copies each into one file."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from kac.conditioning import check_labels, network_labels
from kac.data.autoencoder import decode_latents
from kac.data.class_names import label_of
from kac.guidance import GuidedVelocity
from kac.networks.diffusers import ConditionedLabels
from kac.networks.diffusers_model import DiffusersModel
from kac.networks.mlp import ResidualMLP
from kac.networks.network_kinds import SpeedClamp
from kac.networks.velocity import ConditionEmbedding
from kac.noise import labels, noise
from kac.path import GaussianPath, KacPath
from kac.process import KacProcess
from kac.sampling import student_sampling, teacher_sampling
from kac.solvers import knot_times
from kac.util.images import delivered, is_image, to_bytes


class KacPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images from a teacher or a student of DistillKac.

    Args:
        unet, transformer, network: the velocity u(x, t, label); exactly one is given.
        guide: a weaker network of the same kind, for autoguidance of a teacher.
        conditions: embedding of the end time and the guidance scale; an MLP contains its own.
        vae: the autoencoder of a model in latents.
        settings: the model's config.
    """

    _optional_components = ("unet", "transformer", "network", "guide", "conditions", "vae")

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        network: Any = None,
        guide: Any = None,
        conditions: Any = None,
        vae: Any = None,
        settings: Any = None,
    ) -> None:
        super().__init__()
        models = {"unet": unet, "transformer": transformer, "network": network, "guide": guide}
        self.register_modules(scheduler=scheduler, **models, conditions=conditions, vae=vae)
        self.register_to_config(settings=settings)
        self.model: Any = json.loads(json.dumps(settings), object_hook=_namespace)
        self.path = _path(**vars(self.model.path))
        self.used: WeakKeyDictionary[torch.Generator, tuple[Tensor, int]] = WeakKeyDictionary()
        if self.model.network.kind == "diffusers":
            self.converted = DiffusersModel(
                self.model.network, self.model.sample_shape, self.model.num_classes, unet or transformer
            )
            if conditions:
                self.converted.conditions = conditions.embedding
            return
        for module in (unet or transformer).modules() if conditions else ():
            if type(module) is nn.Embedding:
                module.__class__ = ConditionedLabels  # the same weights, and still accepts plain labels

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Draw images. The generator's seed gives the images of ``jobs.sample --seed``.

        Args:
            class_labels: classes by number or name, repeated in turn; default: drawn with the data's frequencies.
            batch_size: number of images; default: the number of labels, or 1.
            num_inference_steps: steps; default: the student's own number, or 100 for a teacher.
            guidance: scale of guidance, as in ``jobs.sample``; 0: none. diffusers' ``guidance_scale`` is this plus 1.
            generator: gives the seed of the noise. Its next call continues with the seed's next images.
            output_type: pil; np: [n, height, width, channels] in [0, 1]; pt: [n, channels, height, width] in [-1, 1].
                Images are rounded to 8 bits. Points have no pil, and the same np as pt. Default: pil, or np.

        Raises:
            ValueError: the model does not support the classes, the steps or the guidance.
        """
        model, device = self.model, self._execution_device
        words = [class_labels] if isinstance(class_labels, int | str) else class_labels
        classes = (
            None if words is None else [label_of(str(word), model.class_names, model.num_classes) for word in words]
        )
        if classes is not None:
            check_labels(model, classes, "`class_labels`")
        how = (teacher_sampling if model.kind == "teacher" else student_sampling)(
            model, steps=num_inference_steps, guidance=guidance
        )
        kinds = ("pil", "np", "pt") if is_image(tuple(model.sample_shape)) else ("np", "pt")
        if (kind := output_type or kinds[0]) not in kinds:
            raise ValueError(f"`output_type` is {output_type!r}. Choose {' or '.join(kinds)}.")
        seed, ids = self._next_ids(generator, batch_size or len(classes or [0]))
        x = noise(self.path, seed, ids, model.sample_shape).to(device)
        label = network_labels(model, labels(seed, ids, model.class_frequencies))
        if classes is not None:
            label = torch.tensor(classes).repeat(len(ids))[: len(ids)]

        self.scheduler.set_timesteps(sigmas=knot_times(how.steps, how.knot_grid)[:-1].tolist(), device=device)
        times, last = self.scheduler.sigmas.tolist(), None
        for n, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t, h = torch.full((), times[n], device=device), times[n + 1] - times[n]
            values = {"end_time": times[n + 1], "guidance": how.guidance}
            given = {name: torch.full((), values[name], device=device) for name in model.network.conditions}
            network: Any = _Network(self, given)
            mean = u = GuidedVelocity(network, 0.0 if "guidance" in given else how.guidance, label.to(device))(x, t)
            if how.solver == "ab2" and last is not None:  # Adams-Bashforth: extrapolate u to the middle of the step
                mean = u.add(u - last[0], alpha=h / last[1] / 2)
            last = u, h
            x = self.scheduler.step(mean, timestep, x, return_dict=False)[0]

        if self.vae:
            x = decode_latents(self.vae, x.to(self.vae.dtype))
        images: Any = delivered(x.float().cpu())
        if kind != "pt":
            images = to_bytes(images).permute(0, 2, 3, 1).numpy() / 255 if "pil" in kinds else images.numpy()
        images = self.numpy_to_pil(images) if kind == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _next_ids(self, generator: torch.Generator | None, count: int) -> tuple[int, range]:
        """Return the seed and the sample ids of a call. A generator without a new seed continues after its last id."""
        if generator is None:
            return int(torch.randint(2**31, ())), range(count)
        state, first = self.used.get(generator, (None, 0))
        first = first if state is not None and torch.equal(state, generator.get_state()) else 0
        torch.rand(1, generator=generator, device=generator.device)  # so that a new seed changes the state
        self.used[generator] = generator.get_state(), first + count
        return generator.initial_seed(), range(first, first + count)


def _namespace(values: dict[str, Any]) -> Any:
    return values if "_class_name" in values else SimpleNamespace(**values)  # configs of diffusers stay dictionaries


class _Network:
    """A model of a pipeline under given conditions, called as a velocity network of this project."""

    def __init__(self, pipeline: KacPipeline, given: dict[str, Tensor], model: Any = None) -> None:
        self.pipeline, self.given, self.config = pipeline, given, pipeline.model.network
        self.model = model or pipeline.unet or pipeline.transformer or pipeline.network
        self.null_label = pipeline.model.num_classes if self.config.has_null_label else None
        self.guide = _Network(pipeline, given, pipeline.guide) if pipeline.guide and not model else None

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        dtype = torch.float32 if self.config.kind == "diffusers" else self.model.dtype
        u = VELOCITIES[self.config.kind](self, x.to(dtype), t, label).float()
        return SpeedClamp(self.pipeline.path)(self.model, (x, t), u) if self.config.bounded else u  # type: ignore[arg-type]


def _call_mlp(network: _Network, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return network.model(x, t, label, **network.given)  # type: ignore[no-any-return]


def _call_dit(network: _Network, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Call a model of diffusers as ``kac.networks.diffusers`` does."""
    conditions, times = network.pipeline.conditions, (network.config.time_scale * t.float()).expand(len(x))
    return network.model(x, times, (label, conditions(network.given)) if conditions else label).sample  # type: ignore[no-any-return]


def _call_unet(network: _Network, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    patch = network.config.patch
    return nn.functional.pixel_shuffle(_call_dit(network, nn.functional.pixel_unshuffle(x, patch), t, label), patch)


def _call_converted(network: _Network, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return network.pipeline.converted.to(x.device)(x, t, label, **network.given)  # type: ignore[no-any-return]


VELOCITIES: dict[str, Callable[..., Tensor]] = {
    "mlp": _call_mlp,
    "unet": _call_unet,
    "dit": _call_dit,
    "diffusers": _call_converted,
}
"""How to call a model, by the kind of its network. ``formats.component`` makes the model."""


def initial_noise(path: dict[str, Any], seed: int, count: int, sample_shape: Sequence[int]) -> Tensor:
    """Return a seed's first noise x at t = 1: [count, *sample_shape]. ``path`` has the fields of ``PathConfig``."""
    return noise(_path(**path), seed, range(count), sample_shape)


def _path(kind: str, a: float, c: float, signal: Any, clock: Any) -> KacPath | GaussianPath:
    return KacPath(KacProcess(a, c), signal, clock) if kind == "kac" else GaussianPath()


class KacMLP(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A residual MLP as a component of a pipeline."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, options: dict[str, Any], sample_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        config: Any = SimpleNamespace(**options)
        self.network = ResidualMLP(config, tuple(sample_shape), num_classes)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity at x [batch, *sample_shape], t (scalar or [batch]) and label [batch]."""
        return self.network(x, t, label, **conditions)  # type: ignore[no-any-return]


class KacConditions(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The embedding of a step's end time and of the guidance scale, which is added to a model's class embedding."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, conditions: Any, width: int) -> None:
        super().__init__()
        self.embedding = ConditionEmbedding(conditions, width)

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        """Return the embedding [batch or 1, width] of the conditions, each a scalar or [batch]."""
        zeros = torch.zeros(1, self.config.width, dtype=self.dtype, device=self.device)
        return self.embedding(zeros, given)  # type: ignore[no-any-return]
