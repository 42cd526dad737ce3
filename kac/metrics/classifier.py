"""A small classifier trained on the data set's labels. It provides features, and measures label agreement.

It is trained only on training images, and cached by the hash of the data. It first averages larger images down to
32 x 32. The pretrained feature spaces resolve finer detail.
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
from kac.data.dataset import Split
from kac.metrics.features import averaged_down
from kac.util import files
from kac.util.cache import cache_folder
from kac.util.fingerprint import fingerprint
from kac.util.images import delivered, is_image

FEATURES = 64
RECIPE = {"version": 1, "features": FEATURES, "batch_size": 128, "learning_rate": 3e-3, "epochs": 4}
MIN_UPDATES, MAX_UPDATES, TEST_BATCH = 500, 1500, 1000


class ClassifierRecipe(NamedTuple):
    """Settings that distinguish classifiers trained on the same data set."""

    width: int = 32  # channels of the first layer
    seed: int = 0

    def identity(self, data_sha256: str) -> str:
        """Return the classifier's fingerprint. A seed of 0 is left out, because older versions had no seed."""
        return fingerprint(
            {**RECIPE, "width": self.width, "data": data_sha256, **({"seed": self.seed} if self.seed else {})}
        )


EVALUATION_CLASSIFIER = ClassifierRecipe()
"""The classifier that evaluations use. No model is trained with this classifier."""


class Classifier(nn.Module):
    """A network that maps samples to features, and features to classes.

    Args:
        sample_shape: if it is [channels, height, width], the network uses convolutions, otherwise two linear layers.
        width: channels of the first convolution.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int, width: int = ClassifierRecipe().width) -> None:
        super().__init__()
        shape = tuple(averaged_down(torch.empty(1, *sample_shape, device="meta")).shape[1:])
        if is_image(shape):
            self.body = nn.Sequential(*_convolutions(shape, width))
        else:
            layers = nn.Linear(math.prod(shape), 64), nn.ReLU(), nn.Linear(64, FEATURES), nn.ReLU()
            self.body = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, FEATURES], the input of the last layer."""
        return self.body(averaged_down(samples))  # type: ignore[no-any-return]

    @torch.no_grad()
    def labels(self, features: Tensor) -> Tensor:
        """[batch, FEATURES] -> [batch], the most likely class."""
        return self.head(features.to(self.head.weight.device)).argmax(1).cpu()  # type: ignore[no-any-return]


def _convolutions(shape: tuple[int, ...], out: int) -> list[nn.Module]:
    """Return layers that halve the sides and double the channels until the sides are at most 4."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    stride = 1 if max(height, width) <= 8 else 2
    while True:
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, height, width = out, -(-height // stride), -(-width // stride)
        if max(height, width) <= 4:
            break
        out, stride = 2 * out, 2
    return [*layers, nn.Flatten(), nn.Linear(channels * height * width, FEATURES), nn.ReLU()]


def open_classifier(
    data: Dataset, recipe: ClassifierRecipe = EVALUATION_CLASSIFIER
) -> tuple[Classifier, dict[str, float], str]:
    """Load the data's classifier, or train it. Return the network, its held-out accuracy and its weights' sha256."""
    description = data.description
    stem = files.join(cache_folder("classifiers"), recipe.identity(description.sha256))
    weights_path, record_path = f"{stem}.safetensors", f"{stem}.json"
    try:
        record, weights = json.loads(files.read_bytes(record_path)), files.read_bytes(weights_path)
    except FileNotFoundError:
        network = train_classifier(data, recipe)
        weights = safetensors.torch.save(network.state_dict())
        # Several processes can train this classifier at once. All use the weights that were published first.
        if not files.write_bytes(weights_path, weights, if_absent=True):
            weights = files.read_bytes(weights_path)
            network.load_state_dict(safetensors.torch.load(weights))
        record = {"held_out_accuracy": accuracy(network, data.held_out)}
        files.write_bytes(record_path, json.dumps(record).encode())
    network = Classifier(description.sample_shape, description.num_classes, recipe.width)
    network.load_state_dict(safetensors.torch.load(weights))
    return network.eval(), record, hashlib.sha256(weights).hexdigest()


def train_classifier(data: Dataset, recipe: ClassifierRecipe = EVALUATION_CLASSIFIER) -> Classifier:
    """Train a classifier on delivered training images. The result is deterministic for a fixed number of threads."""
    description, split = data.description, data.train
    updates = max(MIN_UPDATES, min(MAX_UPDATES, int(RECIPE["epochs"] * len(split) / RECIPE["batch_size"])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = Classifier(description.sample_shape, description.num_classes, recipe.width)
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
    """Yield batches of row numbers endlessly, reshuffled each epoch. Drop an epoch's last batch if it is incomplete."""
    generator, size = torch.Generator().manual_seed(seed), min(count, int(RECIPE["batch_size"]))
    epochs = (torch.randperm(count, generator=generator) for _ in itertools.count())
    return itertools.chain.from_iterable(epoch[: count - count % size].reshape(-1, size).unbind() for epoch in epochs)


@torch.inference_mode()
def accuracy(network: Classifier, split: Split) -> float:
    """Return the fraction of a split's images that the network classifies correctly."""
    correct = 0
    for ids in torch.split(torch.arange(len(split)), TEST_BATCH):
        images, labels = split.rows(ids)
        correct += int((network.labels(network(delivered(images))) == labels).sum())
    return correct / max(1, len(split))
