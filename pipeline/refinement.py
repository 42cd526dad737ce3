"""Refinement while distilling: new samples of the student and training images in every update."""

import torch
from torch import Tensor

from kac.conditioning import known_classes, network_labels
from kac.losses import LossTerms
from kac.losses.refinement import DataRefinementConfig, open_spaces, refinement_loss, straight_through
from kac.model import ModelConfig, learned_data
from kac.networks import VelocityNetwork
from kac.sampling import Sampling, integrate
from kac.util.errors import ArgumentError
from kac.util.options import most
from pipeline import store, training
from pipeline.config import DistillSpec


def check_passes(spec: DistillSpec, group: training.WorkerGroup) -> None:
    """Check that every pass of a refinement has two images or more, because their distances enter the loss.

    Raises:
        ArgumentError: a pass has too few images.
    """
    passes = max(1, most(group.workers)) * spec.optimizer.accumulation
    if spec.refine.kind == "data" and min(spec.refine.real_images, spec.optimizer.batch_size) < 2 * passes:
        raise ArgumentError(
            f"`refine.real_images` is {spec.refine.real_images} and `optimizer.batch_size` is "
            f"{spec.optimizer.batch_size}, but {passes} passes per update need at least {2 * passes} of both."
        )


class Refinement:
    """Adds the distance between student and training images to the distillation loss, which is the anchor."""

    def __init__(self, spec: DistillSpec, init: str, model: ModelConfig, device: torch.device) -> None:
        assert isinstance(spec.refine, DataRefinementConfig)
        self.spec, self.options, self.model = spec, spec.refine, model
        data = learned_data(init, model)
        self.path, self.data = model.path.build(), data.train
        self.spaces = open_spaces(self.options.spaces, data, device)
        self.knot_grid = store.open(spec.store).identity.knot_grid
        self.frequencies = torch.tensor(model.class_frequencies)

    def losses(self, network: VelocityNetwork, micro: training.MicroBatch, distillation: LossTerms) -> LossTerms:
        """Return the weighted distillation losses, and the distance keyed by its name. Diagnostics stay unweighted."""
        distance = self._distance(network, micro)
        anchored = {name: self.options.anchor * loss for name, loss in distillation.losses.items()}
        return LossTerms({**anchored, self.options.distance: distance}, distillation.diagnostics)

    def _distance(self, network: VelocityNetwork, micro: training.MicroBatch) -> Tensor:
        spec, options, model, device = self.spec, self.options, self.model, micro.worker.device
        rows = spec.optimizer.batch_size // micro.slots
        draws = training.update_generator(spec.seed, micro.update)
        real_rows = micro.share(torch.randint(len(self.data), (options.real_images,), generator=draws))
        real, real_label = self.data.rows(real_rows)
        label = micro.share(torch.multinomial(self.frequencies, spec.optimizer.batch_size, True, generator=draws))
        label = label.to(device)
        noise = training.slot_generator(spec.seed, micro)
        zeros, ones = torch.zeros(rows, *model.sample_shape, device=device), torch.ones(rows, device=device)
        x_1 = self.path.sample(zeros, ones, noise).x_t
        steps = options.steps[micro.update % len(options.steps)] if "end_time" in network.takes else spec.steps
        sampling = Sampling(0.0, steps, "euler", self.knot_grid)
        x_0 = integrate(network, x_1, network_labels(model, label), sampling).x
        return refinement_loss(
            straight_through(x_0),
            label if known_classes(model) else None,
            real.to(device),
            real_label.to(device),
            self.spaces,
            options.class_weight,
            model.num_classes,
            micro.update,
            options.distance,
        )
