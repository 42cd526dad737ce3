"""The diffusers pipeline of an exported model. ``bundle`` copies it, with the code that it uses, into ``pipeline.py``."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from kac.conditioning import check_labels, network_labels
from kac.data.class_names import label_of
from kac.guidance import GuidedVelocity
from kac.networks.diffusers import ConditionedLabels
from kac.networks.network_kinds import SpeedClamp
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
        settings: the fields of the model's config that sampling needs.
    """

    _optional_components = ("unet", "transformer", "network", "guide", "conditions")

    def __init__(
        self,
        scheduler: Any,
        unet: nn.Module | None = None,
        transformer: nn.Module | None = None,
        network: nn.Module | None = None,
        guide: nn.Module | None = None,
        conditions: nn.Module | None = None,
        settings: dict | None = None,  # type: ignore[type-arg]
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            unet=unet,
            transformer=transformer,
            network=network,
            guide=guide,
            conditions=conditions,
        )
        self.register_to_config(settings=settings)
        self.origin: Any = json.loads(json.dumps(settings), object_hook=lambda values: SimpleNamespace(**values))
        self.path = _path(**vars(self.origin.path))
        self.used: WeakKeyDictionary[torch.Generator, tuple[Tensor, int]] = WeakKeyDictionary()
        if conditions is not None:
            for module in (unet or transformer).modules():  # type: ignore[union-attr]
                if type(module) is nn.Embedding:
                    module.__class__ = ConditionedLabels  # the same weights, and still accepts plain labels

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
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
            guidance: scale w of u + w (u - u_weaker); 0: none. diffusers' ``guidance_scale`` is 1 + w.
            generator: only its seed is used. A generator's next call continues with the seed's next images.
            output_type: pil; np: [n, height, width, channels] in [0, 1]; pt: [n, channels, height, width] in [-1, 1].
                Images are rounded to 8 bits. Points have no pil; their np and pt are equal. Default: pil, or np.

        Raises:
            ValueError: the model does not support the classes, the steps or the guidance.
        """
        model, device = self.origin, self._execution_device
        words = [class_labels] if isinstance(class_labels, int | str) else class_labels
        classes = words and [label_of(str(word), model.class_names, model.num_classes) for word in words]
        if classes is not None:
            check_labels(model, classes, "`class_labels`")
        choose: Any = teacher_sampling if model.kind == "teacher" else student_sampling
        how = choose(model, steps=num_inference_steps, guidance=guidance)
        kinds = ("np", "pt", "pil") if is_image(tuple(model.sample_shape)) else ("np", "pt")
        kind = output_type or kinds[-1 if len(kinds) == 3 else 0]
        if kind not in kinds:
            raise ValueError(f"`output_type` is {output_type!r}. Choose {' or '.join(kinds)}.")
        seed, ids = self._next_ids(generator, batch_size or len(classes or [0]))
        x = noise(self.path, seed, ids, model.sample_shape).to(device)
        if classes is None:
            label = network_labels(model, labels(seed, ids, model.class_frequencies)).to(device)
        else:
            label = torch.tensor([classes[i % len(classes)] for i in range(len(ids))], device=device)

        self.scheduler.set_timesteps(sigmas=knot_times(how.steps, how.knot_grid)[:-1].tolist(), device=device)
        times, last = self.scheduler.sigmas.tolist(), None
        for n, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t, h = torch.full((), times[n], device=device), times[n + 1] - times[n]
            values = {"end_time": times[n + 1], "guidance": how.guidance}
            given = {name: torch.full((), values[name], device=device) for name in model.network.conditions}
            w = 0.0 if "guidance" in given else how.guidance
            mean = u = GuidedVelocity(_Network(self), w, label, lambda _, given=given: given)(x, t)  # type: ignore[misc]
            if how.solver == "ab2" and last is not None:  # Adams-Bashforth: extrapolate u to the middle of the step
                mean = u + h / last[1] / 2 * (u - last[0])
            last = u, h
            x = self.scheduler.step(mean, timestep, x, return_dict=False)[0]

        # For a model of latents, decode x here.
        images: Any = delivered(x.float().cpu())
        if kind != "pt" and len(kinds) == 3:
            images = to_bytes(images).permute(0, 2, 3, 1).numpy() / 255
        images = self.numpy_to_pil(images) if kind == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _next_ids(self, generator: torch.Generator | None, count: int) -> tuple[int, range]:
        """Return the seed and the sample ids of a call. A generator without a new seed continues after its last id."""
        if generator is None:
            return int(torch.randint(2**31, ())), range(count)
        state, first = self.used.get(generator, (None, 0))
        first = first if state is not None and torch.equal(state, generator.get_state()) else 0
        torch.rand(1, generator=generator, device=generator.device)  # marks the generator as used
        self.used[generator] = generator.get_state(), first + count
        return generator.initial_seed(), range(first, first + count)


def initial_noise(path: dict[str, Any], seed: int, count: int, sample_shape: Sequence[int]) -> Tensor:
    """Return the noise x at t = 1 of the first samples of a seed: [count, *sample_shape], float32.

    Args:
        path: the fields of the model's ``PathConfig``.
    """
    return noise(_path(**path), seed, range(count), sample_shape)


def _path(kind: str, a: float, c: float, signal: Any, clock: Any) -> KacPath | GaussianPath:
    return KacPath(KacProcess(a, c), signal, clock) if kind == "kac" else GaussianPath()


class _Network:
    """A model of a pipeline, called as a velocity network of this project."""

    def __init__(self, pipeline: KacPipeline, model: Any = None) -> None:
        self.pipeline, self.config = pipeline, pipeline.origin.network
        self.model = model or pipeline.unet or pipeline.transformer or pipeline.network
        self.null_label = pipeline.origin.num_classes if self.config.has_null_label else None
        self.guide = None if model or pipeline.guide is None else _Network(pipeline, pipeline.guide)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **given: Tensor) -> Tensor:
        u = VELOCITIES[self.config.kind](self, x.to(self.model.dtype), t, label, given).float()
        return SpeedClamp(self.pipeline.path)(self.model, (x, t), u) if self.config.bounded else u  # type: ignore[arg-type]


def _call_mlp(network: _Network, x: Tensor, t: Tensor, label: Tensor, given: dict[str, Tensor]) -> Tensor:
    return network.model(x, t, label, **given)  # type: ignore[no-any-return]


def _call_diffusers(network: _Network, x: Tensor, t: Tensor, label: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Call a model of diffusers as ``kac.networks.diffusers`` does, on images with patches folded into channels."""
    conditions, fold = network.pipeline.conditions, network.config.fold
    times = (network.config.time_scale * t.to(torch.float32)).expand(len(x))
    labels = label if conditions is None else (label, conditions(given).to(x.dtype))
    velocity = network.model(nn.functional.pixel_unshuffle(x, fold), times, labels).sample
    return nn.functional.pixel_shuffle(velocity, fold)


VELOCITIES: dict[str, Callable[..., Tensor]] = {"mlp": _call_mlp, "unet": _call_diffusers, "dit": _call_diffusers}
"""How to call a model as a velocity network, by the kind of its network. ``diffusers_folder.COMPONENTS`` writes it."""
