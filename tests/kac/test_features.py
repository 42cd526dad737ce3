"""Feature spaces: their values, the trained classifier, and one-line errors."""

import builtins

import pytest
import torch
from torch import nn

from kac.data import DataConfig, Dataset, all_rows, open_dataset
from kac.data.in_memory import in_memory
from kac.metrics import classifier
from kac.metrics.features import averaged_down, check_names, open_space, space_identity, space_name
from kac.util.errors import ArgumentError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(shape: tuple[int, ...], classes: int = 2, count: int = 40) -> Dataset:
    """Return noise images whose brightness depends on their class."""
    labels = torch.arange(count) % classes
    noise = torch.rand(count, *shape, generator=seeded(1)) / 2
    return in_memory((noise + labels.reshape(-1, *(1 for _ in shape)) / 2) * 2 - 1, labels, classes)


def test_pixels_are_the_flattened_sample():
    images = torch.rand(4, 3, 2, 2)
    assert torch.equal(open_space("pixels", images_of((3, 2, 2)))(images), images.reshape(4, 12))


def test_large_images_are_averaged_down():
    images = torch.rand(2, 3, 64, 48, generator=seeded(2))
    small = averaged_down(images)
    assert small.shape == (2, 3, 32, 32)
    torch.testing.assert_close(averaged_down(images[..., :32])[:, :, 0, 0], images[:, :, :2, 0].mean(2))
    assert averaged_down(images[..., :28, :28]) is not None
    assert torch.equal(averaged_down(images[..., :28, :28]), images[..., :28, :28])
    assert open_space("pixels", images_of((3, 2, 2)))(images).shape == (2, 3 * 32 * 32)


def test_the_classifier_recognises_held_out_digits_but_not_noise():
    data = open_dataset(DataConfig())
    space, (images, labels) = open_space("classifier", data), all_rows(data.held_out)
    features = space(images)
    assert features.shape == (len(labels), classifier.FEATURES)
    predicted = space.network.labels(features)
    accuracy = float((predicted == labels).double().mean())
    assert accuracy > 0.98
    assert space.facts == {"held_out_accuracy": pytest.approx(accuracy)}
    noise = torch.rand(350, 1, 8, 8, generator=seeded(7)) * 2 - 1
    assert (space.network.labels(space(noise)) == labels[:350]).double().mean() < 0.3


def test_the_classifier_is_trained_once_and_deterministically(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classifier, "MIN_UPDATES", 20)
    data = images_of((1, 9, 9))
    a, b = (classifier.train_classifier(data).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    opened = open_space("classifier", data)
    monkeypatch.setattr(classifier, "train_classifier", lambda data: pytest.fail("trained again"))
    again = open_space("classifier", data)
    assert again.fingerprint == opened.fingerprint
    assert again.facts == opened.facts == {"held_out_accuracy": 1.0}


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 40, 24)])
def test_the_classifier_accepts_samples_of_any_shape(shape: tuple[int, ...]):
    network = classifier.Classifier(shape, 3).eval()
    features = network(torch.rand(5, *shape))
    assert features.shape == (5, classifier.FEATURES)
    assert network.labels(features).shape == (5,)


def test_lite0_computes_features_of_grey_and_coloured_images():
    pytest.importorskip("efficientnet_lite_pytorch")
    space = open_space("lite0", images_of((1, 8, 8)))
    grey = torch.rand(2, 1, 28, 28, generator=seeded(3)) * 2 - 1
    features = space(grey)
    assert features.shape == (2, 1280)
    torch.testing.assert_close(space(grey.expand(-1, 3, -1, -1)), features)
    assert not torch.allclose(features[0], features[1], atol=0.05)


class Halves(nn.Module):
    """Return half of the first three values of an image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3] / 2


class Detector(nn.Module):
    """Has the interface of NVIDIA's Inception file."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return images.flatten(1)


def not_a_module() -> str:
    return "text"


def test_a_space_can_be_a_torchscript_file_or_an_import_path(tmp_path):
    data, images = images_of((1, 2, 2)), torch.rand(3, 1, 2, 2) * 2 - 1
    torch.jit.script(Halves()).save(str(tmp_path / "my-net.v2.pt"))
    for given in (str(tmp_path / "my-net.v2.pt"), "tests.kac.test_features:Halves"):
        assert torch.equal(open_space(given, data)(images), images.flatten(1)[:, :3] / 2)
    assert space_name(str(tmp_path / "my-net.v2.pt")) == "my_net_v2"
    before = space_identity(str(tmp_path / "my-net.v2.pt"), data)
    torch.jit.script(Detector()).save(str(tmp_path / "my-net.v2.pt"))
    assert space_identity(str(tmp_path / "my-net.v2.pt"), data) != before
    grey = open_space(str(tmp_path / "my-net.v2.pt"), data)(torch.full((1, 1, 2, 2), 0.0))
    assert grey.tolist() == [[128.0] * 12]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no/such.pt", "does not exist"),
        ("no_such_module:factory", "No module named"),
        ("tests.kac.test_features:nothing", "AttributeError"),
        ("tests.kac.test_features:not_a_module", "str"),
    ],
)
def test_a_space_that_cannot_be_opened_is_refused(given: str, message: str):
    with pytest.raises(ArgumentError, match=f"^`features` {given} .*{message}"):
        open_space(given, images_of((1, 2, 2)))


def test_a_file_of_a_wrong_format_and_features_of_a_wrong_shape_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"something")
    with pytest.raises(ArgumentError, match=r"^`features` \S+/x\.pt .*TorchScript"):
        open_space(str(tmp_path / "x.pt"), images_of((1, 2, 2)))
    space = open_space("torch.nn:Identity", images_of((1, 2, 2)))
    with pytest.raises(ArgumentError, match=r"`features` torch.nn:Identity: .*shape \[2, 1, 2, 2\]"):
        space(torch.rand(2, 1, 2, 2))


@pytest.mark.parametrize(("given", "extra"), [("lite0", "efficientnet"), ("inception", "torch_fidelity")])
def test_the_error_about_a_missing_extra_names_it(given: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def without(name, *args, **options):
        if name.startswith(extra):
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArgumentError, match=rf"pip install 'distillkac\[{given}\]'"):
        open_space(given, images_of((1, 8, 8)))


def test_spaces_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ArgumentError, match=r"^`features` classifier .*several classes"):
        open_space("classifier", images_of((1, 8, 8), classes=1))
    with pytest.raises(ArgumentError, match=r"^`features` lite0 .*\(2,\)"):
        open_space("lite0", images_of((2,)))
    with pytest.raises(ArgumentError, match=r"^`features` pooled .*4 pixels .*\(1, 3, 8\)"):
        open_space("pooled", images_of((1, 3, 8)))


def test_pooled_features_are_the_means_of_blocks():
    image = torch.arange(64.0).reshape(1, 1, 8, 8) / 64
    features = open_space("pooled", images_of((1, 8, 8)))(image)
    assert features.shape == (1, 4)
    means = [image[0, 0, i : i + 4, j : j + 4].mean().item() for i in (0, 4) for j in (0, 4)]
    assert features[0].tolist() == pytest.approx(means)


@pytest.mark.parametrize("features", [("inseption",), ("pixels", "pixels"), ("a/net.pt", "b/net.pt"), ("x.y",)])
def test_unknown_and_repeated_names_are_refused(features: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"^`features` has"):
        check_names(features)
