"""Counts operations that would make the host wait for a GPU. It counts them on the CPU, so the tests need no GPU."""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
PRODUCT = tuple(str(ROOT / package) for package in ("kac", "pipeline"))
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def host_reads(work: Callable[[], object]) -> Counter[str]:
    """Return how often each function of the product would wait for a GPU in ``work()``: "kac/solvers.py solve": 2.

    The count includes values that the host reads, shapes that depend on values, and copies from the host's memory,
    such as ``torch.tensor(1.0, device=device)`` and ``values.to(device)``. It also includes reads of tensors that stay
    on the CPU beside a GPU, because without a GPU all tensors are on the CPU.
    """
    counts: Counter[str] = Counter()
    with _Operations(counts), _Methods(counts):
        work()
    return counts


class _Operations(TorchDispatchMode):
    """Counts operations of PyTorch's core: item, bool, float, masks, and torch.tensor (lift_fresh)."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode, composite operations such as item arrive whole.
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func.overloadpacket in INDEXING:  # a mask is converted to indices, whose number the host must know
            waits = any(isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1]))
        else:
            waits = func == torch.ops.aten.lift_fresh.default or not VALUE_DEPENDENT.isdisjoint(func.tags)
        if waits:
            self.counts[_caller()] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Counts methods that are no operations on the CPU: tolist, numpy, cpu, and blocking copies to a device."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._nn.one_hot:  # reads its labels only on the CPU
            return (args[0][..., None] == torch.arange(args[1])).long()
        is_copy = func is Tensor.to and _is_blocking_copy(*args, **kwargs)
        if is_copy or func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.counts[_caller()] += 1
        return func(*args, **kwargs)


def _is_blocking_copy(values: Tensor, *args: Any, **kwargs: Any) -> bool:
    if kwargs.get("non_blocking") or not any(
        isinstance(each, torch.device | str) for each in (*args, *kwargs.values())
    ):
        return False
    # clip_grad_norm_ calls ``to`` for norms that are already on the device.
    return not any(frame.filename.endswith("clip_grad.py") for frame in traceback.extract_stack())


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PRODUCT)]
    return f"{Path(frames[-1].filename).relative_to(ROOT)} {frames[-1].name}" if frames else "elsewhere"
