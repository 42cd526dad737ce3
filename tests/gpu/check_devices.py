"""Checks, without a GPU, that computations on a GPU keep all tensors there and never make the host wait.

PyTorch's fake tensors have a shape, a type and a device, but no values. Operations on a fake tensor on "cuda" check
that all tensors are on the GPU. Reading a value raises an error. Tensors on the CPU remain real here. Only forward
passes are checked. Fake tensors on "cuda" need a CUDA build of PyTorch, so pytest does not collect this script:

    python -m tests.gpu.check_devices           # all checks
    python -m tests.gpu.check_devices losses    # the checks whose names start with "losses"
"""

import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kac.data import DataConfig, Dataset, open_dataset
from kac.losses import EndpointConfig, FlowMapConfig, Interval, ReflowConfig, refinement
from kac.losses.flow_matching import flow_matching_loss
from kac.losses.refinement import (
    RefinementDistance,
    RefinementLoss,
    SpaceInputs,
    SpaceName,
    open_spaces,
    straight_through,
)
from kac.metrics import classifier
from kac.metrics.features import OWN, open_space
from kac.model import Model
from kac.path import GaussianPath, KacPath
from kac.precision import Precision
from kac.sampling import Sampling, generate, integrate
from kac.solvers import SolverName
from kac.util.device import to_device
from tests.kac.every_network import CLASSES, CONFIGS, SHAPE, network_of

GPU = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
PRECISIONS = {
    "float32": Precision(compile=False, memory_format="contiguous"),
    "bfloat16": Precision(compile=False, dtype="bfloat16", memory_format="channels_last"),
}


class FakeGPU(TorchDispatchMode):
    """Executes operations on "cuda" with fake tensors, and operations on the CPU with real tensors.

    A copy to the CPU returns zeros.

    Attributes:
        is_loop: whether the host must not wait for copies. It may wait while a model is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.is_loop = FakeTensorMode(allow_non_fake_inputs=True), False
        torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
        torch.cuda.is_bf16_supported = lambda *args: True  # type: ignore[assignment]
        torch.cuda.amp.common.amp_definitely_not_available = lambda: False
        torch._C._ensureCUDADeviceGuardSet()  # device guards then do nothing
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(value, device=GPU) copies through this mode
        nn.Module._apply = apply  # type: ignore[assignment]
        Tensor.pin_memory = pin  # type: ignore[assignment]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():  # in inference mode, composite operations arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        is_fake, device = [isinstance(each, FakeTensor) for each in given], kwargs.get("device")
        to_gpu = any(is_fake) if device is None else torch.device(device).type == "cuda"
        if not to_gpu and not any(is_fake):
            return func(*args, **kwargs)
        if func.overloadpacket in COPIES and {*is_fake, to_gpu} == {True, False}:
            is_pinned = id(given[-1]) in PINNED
            if self.is_loop and not (is_pinned and (kwargs.get("non_blocking") or True in args[2:])):
                raise RuntimeError(f"the host waits for a copy to {'the GPU' if to_gpu else 'the CPU'}")
            if not to_gpu:
                return torch.zeros(given[-1].shape, dtype=kwargs.get("dtype") or given[-1].dtype)
        with self.fake:
            return func(*args, **kwargs)


PINNED: dict[int, Tensor] = {}
"""Tensors in pinned memory, by id."""


def pin(values: Tensor) -> Tensor:
    """Replaces ``Tensor.pin_memory``, which needs a GPU."""
    copy = values.detach().clone()
    PINNED[id(copy)] = copy
    return copy


def apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces ``Module._apply``, which ``Module.to`` calls, and which cannot swap real parameters for fake ones."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(change(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else change(value)
    return module


MODE = FakeGPU()


@contextmanager
def loop() -> Iterator[None]:
    """A block in which the host must not wait."""
    MODE.is_loop = True
    yield
    MODE.is_loop = False


def main() -> int:
    """Run the checks whose names start with the argument. Return the number of failures."""
    chosen = [name for name in CHECKS if name.startswith(sys.argv[1] if len(sys.argv) > 1 else "")]
    failures = 0
    for name in chosen:
        MODE.is_loop = False
        try:
            with MODE:
                outcome = f"ok, {CHECKS[name]()} cases"
        except Exception:  # noqa: BLE001 - reported
            failures, outcome = failures + 1, f"FAILED\n{traceback.format_exc()}"
        print(f"{name:29} {outcome}", flush=True)
    print(f"{len(chosen)} checks, {failures} failures")
    return failures


def expect_on_gpu(*values: Tensor) -> None:
    """Check that tensors are finite in number and on the GPU."""
    for value in values:
        assert value.device == GPU, value.device


def inputs() -> tuple[Tensor, Tensor]:
    """Return noise and labels on the GPU."""
    return torch.randn(4, *SHAPE, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU)


def interval() -> Interval:
    """Return a batch of intervals on the GPU."""
    x, label = inputs()
    ones = torch.ones(4, device=GPU)
    return Interval(x, x, ones, 0.5 * ones, label, ones)


def check_refusals() -> int:
    """The mode itself: reads, wrong devices and blocking copies raise errors."""
    x = torch.ones(3, device=GPU)
    refused = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool((x > 0).all()),
        "tolist": x.tolist,
        "mask": lambda: x[x > 0],
        "equal": lambda: torch.equal(x, x),
        "nonzero": x.nonzero,
        "wrong device": lambda: x + torch.ones(3),
        "cpu": x.cpu,
        "tensor": lambda: torch.tensor(1.0, device=GPU),
        "to": lambda: torch.ones(3).to(GPU),
        "pageable": lambda: torch.ones(3).to(GPU, non_blocking=True),
        "copy_": lambda: x.copy_(torch.ones(3)),
    }
    with loop():
        for (name, work), is_inference in itertools.product(refused.items(), (False, True)):
            try:
                with torch.inference_mode(is_inference):
                    work()
            except (RuntimeError, DataDependentOutputException, DynamicOutputShapeException):
                continue
            raise AssertionError(f"{name} is not refused")
        expect_on_gpu(to_device(torch.ones(3), GPU), torch.full((), 1.0, device=GPU), x + 1)
    return 2 * len(refused)


def check_sampling(kind: str, precision: Precision) -> int:
    """Teachers with each solver and kind of guidance, an endpoint student, and flow maps with each condition."""
    count, (x, label) = 0, inputs()
    for guidance in ("null label", "guide"):
        network = network_of(kind).eval()
        network.guide = network_of(kind).eval() if guidance == "guide" else None
        teacher = precision.wrap(network.to(GPU))
        for solver in get_args(SolverName):
            for w in (0.0, 1.5):
                with loop():
                    solution = generate(teacher, x, label, Sampling(w, 3, solver))
                expect_on_gpu(solution.x, solution.kinetic_energy)
                count += 1
    for conditions in ((), ("end_time",), ("guidance",), ("end_time", "guidance")):
        student = precision.wrap(network_of(kind, conditions).eval().to(GPU))
        for steps in (1, 4):
            with loop():
                expect_on_gpu(generate(student, x, label, Sampling(0.0, steps, "euler")).x)
                expect_on_gpu(integrate(student, x, label, Sampling(0.0, steps, "euler")).x)
            count += 2
    return count


def check_losses(kind: str, precision: Precision) -> int:
    """Flow matching on both paths, and each objective with each of its conditions."""
    (x, label), t, count = inputs(), torch.rand(4, device=GPU), 0
    teacher = precision.wrap(network_of(kind).train().to(GPU))
    for path in (KacPath(), GaussianPath()):
        with loop():
            expect_on_gpu(flow_matching_loss(teacher, path, x, t, label, None))  # type: ignore[arg-type]
        count += 1
    for config in (EndpointConfig(), FlowMapConfig(), ReflowConfig(loss="huber", scales=2)):
        for takes in ((), ("guidance",)):
            objective = config.build(2, takes)  # type: ignore[arg-type]
            student, part = precision.wrap(network_of(kind, objective.conditions).train().to(GPU)), interval()
            with loop():
                expect_on_gpu(*objective.losses(student, part).losses.values())
            count += 1
    return count


def check_refinement(kind: str, precision: Precision) -> int:
    """Each space with each distance, kept or computed per update, from a student's samples to the distance."""
    data, count = open_dataset(DataConfig(kind="digits")), 0
    untrained_classifier(data)
    x, label = inputs()
    student = precision.wrap(network_of(kind, ("end_time",)).train().to(GPU))
    for name in get_args(SpaceName):
        for distance in get_args(RefinementDistance):
            for kept in (refinement.KEPT_VALUES, 0):
                refinement.KEPT_VALUES, before = kept, refinement.KEPT_VALUES
                config: Any = SimpleNamespace(conditioning="classes_and_null")
                teacher = Model(network_of(kind), config)
                spaces = open_spaces([name], SpaceInputs(data, GPU, lambda: teacher, precision))  # noqa: B023
                loss = RefinementLoss(data.train, spaces, CLASSES, distance, device=GPU)
                refinement.KEPT_VALUES = before
                with loop():
                    x_0 = integrate(student, x, label, Sampling(0.0, 2, "euler")).x
                    expect_on_gpu(loss(straight_through(x_0), label, torch.randperm(loss.count)[:300], 1))
                count += 1
    return count


def check_features(kind: str, precision: Precision) -> int:
    """Each space of evaluations. Only the features return to the CPU."""
    data = open_dataset(DataConfig(kind="digits"))
    untrained_classifier(data)
    for name in OWN:
        features = open_space(name, data, GPU)(torch.rand(300, *SHAPE))
        assert features.device.type == "cpu", features.device
    return len(OWN)


def untrained_classifier(data: Dataset) -> None:
    """Replace the trained classifier, because training it here would take long."""
    network = classifier.Classifier(data.description.sample_shape, data.description.num_classes).eval()
    refinement.open_classifier = classifier.open_classifier = lambda *args: (network, {}, "")


CHECKS: dict[str, Callable[[], int]] = {
    "refusals": check_refusals,
    **{
        f"{name}, {kind}, {precision}": functools.partial(check, kind, options)
        for name, check in (("sampling", check_sampling), ("losses", check_losses))
        for kind in CONFIGS
        for precision, options in PRECISIONS.items()
    },
    **{f"refinement, {kind}": functools.partial(check_refinement, kind, PRECISIONS["bfloat16"]) for kind in CONFIGS},
    "features": functools.partial(check_features, "mlp", PRECISIONS["float32"]),
}

if __name__ == "__main__":
    sys.exit(main() > 0)
