"""Users' feature networks: a network that does not fit the data gives a one-line error before any work."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kac.data import DataConfig, Dataset, open_dataset
from kac.metrics.features import check_names, open_space, try_space
from kac.metrics.quality import Reference
from kac.metrics.statistics import Statistics
from kac.util.errors import ArgumentError
from tests import feature_networks

PROBLEMS = {
    "ThreeChannels": "3 channels",
    "Bytes": "uint8",
    "ThreeChannelsOfBytes": "uint8 RGB please",
    "Large": "Kernel size",
    "Flat": "shapes",
    "DoubleWeights": "float32",
    "OneAtATime": "batches of any size",
    "NeedsABatch": r"eval\(\)",
    "NotANumber": "NaN",
    "OneRow": r"\[1, 64\] for 16",
    "ChangingWidth": "2 and 17",
    "Squeezed": r"\[64\] for 1 ",
    "Integers": "int64",
    "Complex": "complex64",
    "Truths": "bool",
    "Sparse": "sparse",
    "Pair": "type tuple",
    "Dictionary": "type dict",
    "Listing": "type list",
    "Nothing": "type NoneType",
    "Vector": r"\[16\]",
    "Sequence": r"\[16, 1, 64\]",
    "Maps": r"\[16, 1, 8, 8\]",
    "NoWidth": r"\[16, 0\]",
    "TooWide": r"\[16, 25600\]",
    "TooLarge": "1e.12",
    "Constant": "same features",
    "Dropping": r"eval\(\)",
    "TrainingMode": r"eval\(\)",
    "ElsewhereConstants": "meta",
    "Raising": "ForeignError: line one line two",
    "Silent": "ForeignError",
    "TwoInputs": "y",
}
"""Part of the expected error message, by the network's class."""

NOT_SCRIPTED = {"Raising", "Silent", "Sparse"}
"""TorchScript supports neither exception classes nor sparse tensors."""


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(DataConfig())


def given_as(kind: str, name: str, folder: Path) -> str:
    """Return the value of `features` for a network of ``tests.feature_networks``."""
    if kind == "imported":
        return f"tests.feature_networks:{name}"
    path = str(folder / f"{name}.pt")
    torch.jit.script(getattr(feature_networks, name)()).save(path)
    return path


@pytest.mark.parametrize("kind", ["imported", "scripted"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_network_that_does_not_fit_is_refused(kind: str, name: str, digits: Dataset, tmp_path: Path):
    if kind == "scripted" and name in NOT_SCRIPTED:
        pytest.skip("cannot be scripted")
    given = given_as(kind, name, tmp_path)
    with pytest.raises(ArgumentError, match=PROBLEMS[name]) as caught:
        try_space(given, digits)
    assert str(caught.value).startswith(f"`features` {given}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize("name", ["Rows", "Thin", "Wide", "Changing", "exported"])
def test_networks_that_return_features_are_accepted(name: str, digits: Dataset):
    given = f"tests.feature_networks:{name}"
    try_space(given, digits)
    images = digits.train.rows(torch.arange(3)).images
    before = images.clone()
    features = open_space(given, digits)(images)
    assert features.dtype == torch.float32 and len(features) == 3
    assert torch.equal(images, before)
    if name == "exported":
        torch.testing.assert_close(features, feature_networks.Rows()(images))


@pytest.mark.parametrize("name", ["exported_three_channels", "without_weights"])
def test_a_module_with_shape_guards_or_without_weights_is_refused(name: str, digits: Dataset):
    with pytest.raises(ArgumentError, match=f"`features` tests.feature_networks:{name}: "):
        try_space(f"tests.feature_networks:{name}", digits)


def test_a_network_is_tried_on_points_too():
    moons = open_dataset(DataConfig(kind="moons"))
    try_space("torch.nn:Flatten", moons)
    with pytest.raises(ArgumentError, match=r"failed on samples of shape \[16, 2\]"):
        try_space("tests.feature_networks:ThreeChannels", moons)


@pytest.mark.parametrize(("name", "problem"), [("Later", "more than I can take"), ("LaterNaN", "NaN")])
def test_a_network_that_fails_after_its_trial_is_refused(name: str, problem: str, digits: Dataset):
    given = f"tests.feature_networks:{name}"
    try_space(given, digits)
    with pytest.raises(ArgumentError, match=problem) as caught:
        open_space(given, digits)(digits.train.rows(torch.arange(250)).images)
    assert str(caught.value).startswith(f"`features` {given}: ")
    assert "\n" not in str(caught.value)


def test_widths_that_change_between_batches_are_refused(digits: Dataset):
    with pytest.raises(ArgumentError, match="1 and 2"):
        open_space("tests.feature_networks:LaterWider", digits)(digits.train.rows(torch.arange(251)).images)


def test_a_distance_that_cannot_be_computed_is_refused():
    """One sample has no covariance; a damaged cache of statistics can contain NaN."""
    good, bad, one = Statistics(2), Statistics(2), Statistics(2)
    good.add(torch.rand(10, 2))
    bad.add(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    one.add(torch.rand(1, 2))
    for train, samples in ((good, bad), (bad, good), (good, one)):
        with pytest.raises(ArgumentError, match="`features` net"):
            Reference({"net": train}, torch.zeros(1, 1), lambda: iter(())).frechet_distance("net", samples.moments)


@pytest.mark.parametrize("given", ["folder/pixels.pt", "some.module:pixels", "folder/---.pt"])
def test_a_network_named_pixels_or_without_a_name_is_refused(given: str):
    with pytest.raises(ValueError, match=f"^`features` has '{given}'"):
        check_names([given])


def test_torchscript_without_forward_is_refused(digits: Dataset, tmp_path: Path):
    class Bare(nn.Module):
        @torch.jit.export
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = str(tmp_path / "bare.pt")
    torch.jit.script(Bare()).save(path)
    with pytest.raises(ArgumentError, match="forward"):
        open_space(path, digits)
