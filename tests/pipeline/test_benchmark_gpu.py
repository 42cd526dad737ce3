"""The benchmark's part for GPUs, with the small networks that it measures on a CPU."""

from pathlib import Path

import pytest
import torch

from jobs.parsing import parse
from kac.data import open_dataset
from pipeline.benchmark import BenchmarkSpec, benchmark, gpu, make_setting
from pipeline.config import TeachSpec

ONCE = BenchmarkSpec(only=("gpu",), repeats=1)


@pytest.mark.parametrize(("name", "recipe"), [("MLP", "digits"), ("U-Net", "cifar10-duong"), ("DiT", "dit-s-2")])
def test_the_networks_are_those_of_the_recipes(name: str, recipe: str, tmp_path: Path):
    case = next(case for case in gpu.cases(on_gpu=True) if case.name == name)
    data = [] if recipe == "digits" else ["--data.root", str(tmp_path)]
    spec = parse(TeachSpec, ["--config", recipe, "--out", "unused", *data], "python -m jobs.teach")
    assert case.network == spec.network
    shape = open_dataset(case.data).description.sample_shape
    assert shape == ((1, 8, 8) if recipe == "digits" else (3, 32, 32))


@pytest.mark.parametrize("case", gpu.cases(on_gpu=False), ids=lambda case: case.name)
def test_precisions_are_compared_with_float32(case: gpu.Case, tmp_path: Path):
    options = {"network": case.network, "data": case.data, "batch_size": case.batch_size}
    setting = make_setting(ONCE.model_copy(update=options), str(tmp_path))
    speeds = gpu.network_speeds(setting, on_gpu=False)
    assert list(speeds) == ["float32", "bfloat16"]
    faster, difference, peak = gpu.compare_precisions(setting, speeds, on_gpu=False)
    assert (faster.values, faster.against) == (speeds["bfloat16"], speeds["float32"])
    assert 0 < difference.values[0] < 0.1
    assert peak.unit == "TFLOP/s"
    assert 0 < peak.values[0] < peak.against[0] * 2


def test_the_bare_loop_trains_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = []
    loss = gpu.flow_matching_loss
    monkeypatch.setattr(gpu, "flow_matching_loss", lambda *given: losses.append(loss(*given)) or losses[-1])
    case = gpu.cases(on_gpu=False)[0]
    options = {"network": case.network, "data": case.data, "batch_size": case.batch_size}
    assert gpu.bare_training_speed(make_setting(ONCE.model_copy(update=options), str(tmp_path))) > 0
    early, late = torch.stack(losses[:50]).mean(), torch.stack(losses[-50:]).mean()
    assert late < 0.9 * early


def test_the_part_end_to_end(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    smallest = gpu.cases(on_gpu=False)[0]
    monkeypatch.setattr(gpu, "cases", lambda on_gpu: [smallest])
    measured = benchmark(ONCE.model_copy(update={"folder": str(tmp_path)}))["gpu"]
    printed = capsys.readouterr().out
    assert all(each.what.startswith("MLP: ") for each in measured)
    assert all(len(each.values) == 1 and each.values[0] > 0 for each in measured)
    assert [each.what.removeprefix("MLP: ") for each in measured] == [
        "network, bfloat16 / float32",
        "difference of endpoints, bfloat16 to float32",
        "fastest network / a large bfloat16 product",
        "rollout, one actor / network",
        "guided rollout, one actor / network",
        "teach / a bare training loop",
        "any-step student, refined / not refined",
        "peak memory so far",
        "start of one Ray Train worker, up to its first update",
        "two workers / one, equal batches per worker",
    ]
    assert all(each.what in printed for each in measured)
    assert list(tmp_path.iterdir()) == [], "the scratch folder is not empty"
