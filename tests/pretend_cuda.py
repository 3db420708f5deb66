"""A stand-in for a GPU: tensors that are said to be on CUDA, and are computed on the CPU.

Inside :class:`PretendCuda` code that asks a tensor for its device is told CUDA once the tensor was moved there, and
takes its branches for CUDA. Where a GPU would refuse (an operation on tensors of both devices), it refuses; where the
host would wait for a GPU (a value that is read, a shape that depends on values, a blocking copy), it counts the line.

A tensor's device is that of its memory, so views, gradients and what autograd saves need no care of their own.
"""

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"}
READS |= {"item", "is_nonzero"}  # in inference mode operations come as they were called
"""operations that hand a value, or a shape that depends on values, to the host"""
TAKES_BOTH = {"copy_", "index", "index_put_", "_index_put_impl_"}
"""operations that copy to the device what is not there"""
LATE = 100
"""operations handed over since, from which on a result that is waited for lies behind"""


class MixedDevicesError(RuntimeError):
    """An operation on tensors of both devices."""


class PretendCuda:
    """Within it, ``device="cuda"`` works, and results are the CPU's."""

    _on_cuda: ClassVar[dict[int, StorageWeakRef]] = {}
    """memory that is said to be on CUDA, also to later ones: what is made once may be kept. The weak reference keeps
    the address from being used again."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        """where the host waits for all that the device was given: 'file:line  code' -> how often"""
        self.late_waits: Counter[str] = Counter()
        """where it waits for something that was handed over long before"""
        self.operations = 0
        """handed to the device so far"""
        self._stack = ExitStack()

    def __enter__(self) -> "PretendCuda":
        event = type("Event", (_Event,), {"cuda": self})
        self._stack.enter_context(mock.patch("torch.cuda.Event", event))
        self._stack.enter_context(mock.patch("torch.cuda.get_rng_state", lambda _: torch.get_rng_state()))
        self._stack.enter_context(mock.patch("torch.cuda.max_memory_allocated", lambda _: 0))
        group = torch._C._group_tensors_by_device_and_dtype  # optimisers ask in C++

        def grouped(*args: Any) -> Any:
            return {(self.device_of(found[0][0][0]), kind): found for (_, kind), found in group(*args).items()}

        self._stack.enter_context(mock.patch("torch._C._group_tensors_by_device_and_dtype", grouped))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def device_of(self, tensor: Tensor) -> torch.device:
        return CUDA if tensor.untyped_storage()._cdata in self._on_cuda else CPU

    def put_on_cuda(self, found: object) -> None:
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._on_cuda[storage._cdata] = StorageWeakRef(storage)

    def taken_off(self, tensor: Tensor) -> None:
        self._on_cuda.pop(tensor.untyped_storage()._cdata, None)

    def wait(self, why: str, late: bool = False) -> None:
        (self.late_waits if late else self.waits)[f"{_place()}  [{why}]"] += 1


class _Event:
    """In place of torch.cuda.Event."""

    cuda: PretendCuda

    def record(self) -> None:
        self._at = self.cuda.operations

    def synchronize(self) -> None:
        self.cuda.wait("event", late=self.cuda.operations - self._at >= LATE)


class _Calls(TorchFunctionMode):
    """What Python asks: the device of a tensor, and to make tensors on a device or move them there."""

    def __init__(self, cuda: PretendCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__" and func.__self__.__name__ in ("device", "is_cuda", "is_cpu"):
            device, asked = self.cuda.device_of(args[0]), func.__self__.__name__
            return device if asked == "device" else device.type == asked.removeprefix("is_")
        if name in ("tolist", "numpy", "__array__") and self.cuda.device_of(args[0]) == CUDA:
            if name != "tolist":
                raise MixedDevicesError(f"a CUDA tensor has no array: {_place()}")
            self.cuda.wait(name)
        if name in ("cuda", "cpu"):
            func, args, kwargs = Tensor.to, (args[0], torch.device(name)), {}
        target, args, kwargs = _without_device(args, kwargs, moves=name in ("to", "cuda", "cpu"))
        if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
            target = self.cuda.device_of(args[1])
        if target is None:
            return func(*args, **kwargs)
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, args, kwargs, target)
        if target.type == "cuda":
            if name in ("tensor", "as_tensor"):
                self.cuda.wait("values are copied to the device")
            found = func(*args, **kwargs)
            self.cuda.put_on_cuda(found)
            return found
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any, target: torch.device) -> Tensor:
        source = self.cuda.device_of(args[0])
        if source.type == target.type:
            return func(*args, **kwargs)
        if not (kwargs.pop("non_blocking", False) or (len(args) > 3 and args[3])):
            self.cuda.wait(f"copied to {target.type}")
        found: Tensor = func(*args, **kwargs)
        found = found.clone() if found is args[0] else found
        if target.type == "cuda":
            self.cuda.put_on_cuda(found)
        else:
            self.cuda.taken_off(found)
        return found


class _Operations(TorchDispatchMode):
    """What is computed, in the backward pass too."""

    def __init__(self, cuda: PretendCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = [self.cuda.device_of(tensor) for tensor in tensors]
        if CUDA not in devices:
            return func(*args, **kwargs)
        self.cuda.operations += 1
        if any(device == CPU and tensor.dim() > 0 for tensor, device in zip(tensors, devices, strict=True)):
            if name not in TAKES_BOTH:
                raise MixedDevicesError(f"{name} of tensors on both devices: {_place()}")
            if not (name == "copy_" and len(args) > 2 and args[2]):
                self.cuda.wait(f"{name} copies between the devices")
        if name in READS or (name == "repeat_interleave" and func._overloadname != "self_int"):
            self.cuda.wait(name)
        if name in TAKES_BOTH - {"copy_"} and any(index.dtype == torch.bool for index in args[1] if index is not None):
            self.cuda.wait(f"{name} by a mask")
        found = func(*args, **kwargs)
        self.cuda.put_on_cuda(found)
        return found


def _without_device(args: Any, kwargs: Any, moves: bool) -> tuple[torch.device | None, Any, Any]:
    """The device that a call names, and its arguments with the CPU in that place."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]), args, kwargs | {"device": CPU}
    if moves and len(args) > 1 and isinstance(args[1], str | torch.device):
        return torch.device(args[1]), (args[0], CPU, *args[2:]), kwargs
    return None, args, kwargs


def _place() -> str:
    """The innermost line of the project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path != Path(__file__):
            return f"{path.relative_to(ROOT)}:{frame.lineno}  {frame.line}"
    return "?"
