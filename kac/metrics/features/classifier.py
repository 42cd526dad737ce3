"""A small network trained here on the data set's own labels: features, and whether samples show their labels.

It learns from the training images alone and is cached by the data's hash. Larger images are averaged down to 32 x 32
first: finer detail is for the pretrained spaces to judge.
"""

import hashlib
import itertools
import json
import math
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from kac.data import Dataset
from kac.data.splits import Split
from kac.metrics.features.space import averaged_down
from kac.util import files
from kac.util.cache import cache_folder
from kac.util.errors import ArgumentError
from kac.util.fingerprint import fingerprint
from kac.util.images import delivered, is_image

FEATURES = 64
RECIPE = {"version": 1, "features": FEATURES, "batch_size": 128, "learning_rate": 3e-3, "epochs": 4}
MIN_UPDATES, MAX_UPDATES = 500, 1500
TEST_BATCH = 1000


class ClassifierRecipe(NamedTuple):
    """What makes one classifier of a data set another one than the next."""

    width: int = 32  # channels of the first layer
    seed: int = 0

    def identity(self, data_sha256: str) -> str:
        """The name of the classifier of this data; whatever has changed since keeps its neutral value out of it."""
        return fingerprint(
            {**RECIPE, "width": self.width, "data": data_sha256, **({"seed": self.seed} if self.seed else {})}
        )


JUDGE = ClassifierRecipe()
"""The one that evaluations judge by: nothing else is ever trained with it."""


class Classifier(nn.Module):
    """Samples to features, and features to classes.

    Args:
        sample_shape: images [channels, height, width] get convolutions, points two linear layers.
        width: channels of the first convolution.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int, width: int = JUDGE.width) -> None:
        super().__init__()
        with torch.device("meta"):
            shape = tuple(averaged_down(torch.empty(1, *sample_shape)).shape[1:])
        self.body = _convolutions(shape, width) if is_image(shape) else _linear(math.prod(shape))
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, FEATURES], what the last layer sees."""
        features: Tensor = self.body(averaged_down(samples))
        return features

    @torch.no_grad()
    def labels(self, features: Tensor) -> Tensor:
        """[batch, FEATURES] -> [batch], the likeliest class."""
        return self.head(features.to(self.head.weight.device)).argmax(1).cpu()  # type: ignore[no-any-return]


def _convolutions(shape: tuple[int, ...], out: int) -> nn.Sequential:
    """Halve the sides until they are at most 4, doubling the channels; the first layer spares images of up to 8."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    stride = 1 if max(height, width) <= 8 else 2
    while True:
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, height, width = out, -(-height // stride), -(-width // stride)
        if max(height, width) <= 4:
            break
        out, stride = 2 * out, 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, FEATURES), nn.ReLU())


def _linear(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, FEATURES), nn.ReLU())


def open_classifier(data: Dataset, recipe: ClassifierRecipe = JUDGE) -> tuple[Classifier, dict[str, float], str]:
    """The recipe's classifier of this data, its held-out accuracy, and the sha256 of its weights; cached.

    Raises:
        ArgumentError: data of a single class.
    """
    known = data.description
    if known.num_classes < 2:
        raise ArgumentError("`features` classifier: expected data of several classes, found one: choose other features")
    place = files.join(cache_folder("classifiers"), recipe.identity(known.sha256))
    weights_path, record_path = (f"{place}.{ending}" for ending in ("safetensors", "json"))
    try:
        record, weights = json.loads(files.read_bytes(record_path)), files.read_bytes(weights_path)
    except FileNotFoundError:
        network = train_classifier(data, recipe)
        weights = safetensors.torch.save(network.state_dict())
        # The first one that is published is everybody's.
        if not files.write_bytes(weights_path, weights, if_absent=True):
            weights = files.read_bytes(weights_path)
            network.load_state_dict(safetensors.torch.load(weights))
        record = {"held_out_accuracy": accuracy(network, data.held_out)}
        files.write_bytes(record_path, json.dumps(record).encode())
    network = Classifier(known.sample_shape, known.num_classes, recipe.width)
    network.load_state_dict(safetensors.torch.load(weights))
    return network.eval(), record, hashlib.sha256(weights).hexdigest()


def train_classifier(data: Dataset, recipe: ClassifierRecipe = JUDGE) -> Classifier:
    """AdamW on shuffled delivered training images; the same on every run with the same threads."""
    known, split = data.description, data.train
    updates = max(MIN_UPDATES, min(MAX_UPDATES, int(RECIPE["epochs"] * len(split) / RECIPE["batch_size"])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Classifier(known.sample_shape, known.num_classes, recipe.width)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["learning_rate"], total_steps=updates)
    for ids in itertools.islice(_batches(len(split), recipe.seed), updates):
        images, labels = split.rows(ids)
        loss = nn.functional.cross_entropy(network.head(network(delivered(images))), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network.eval()


def _batches(count: int, seed: int) -> itertools.chain[Tensor]:
    """Endless batches of row numbers, shuffled anew each epoch; the short last batch of an epoch is left out."""
    generator, size = torch.Generator().manual_seed(seed), min(count, int(RECIPE["batch_size"]))
    epochs = (torch.randperm(count, generator=generator) for _ in itertools.count())
    return itertools.chain.from_iterable(epoch[: count - count % size].reshape(-1, size).unbind() for epoch in epochs)


@torch.inference_mode()
def accuracy(network: Classifier, split: Split) -> float:
    """The share of a split's images that get their own label."""
    right = 0
    for ids in torch.split(torch.arange(len(split)), TEST_BATCH):
        images, labels = split.rows(ids)
        right += int((network.labels(network(delivered(images))) == labels).sum())
    return right / max(1, len(split))
