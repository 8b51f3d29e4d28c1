"""A second device in pure Python: what a CPU computes under another device's name, with a GPU's rules for mixing the two.

A tensor of the second device is a wrapper around one of the CPU. An operation that gets tensors of both raises, as on a GPU,
except for single numbers, copies between devices, and indices of the CPU.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


SECOND = torch.device("meta")  # a device that torch knows by name and that needs no library to start
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


class SecondDeviceTensor(Tensor):
    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=SECOND, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"on the second device: {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While active, `device="ipu"` makes tensors of the second device, and mixing it with the CPU is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    leaves, spec = tree_flatten((args, kwargs))
    wrapped = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, SecondDeviceTensor)}
    on_cpu = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, SecondDeviceTensor)]
    if wrapped and function not in COPIES and function not in INDEXING and any(tensor.ndim for tensor in on_cpu):
        shapes = [tuple(tensor.shape) for tensor in on_cpu]
        raise RuntimeError(f"{function} of the second device and of tensors left on the CPU, {shapes}")
    device = kwargs.get("device")
    is_second = device.type == SECOND.type if isinstance(device, torch.device) else bool(wrapped)
    if is_second and kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: a generator of the CPU draws no numbers on the second device")
    inner = [leaf.inner if isinstance(leaf, SecondDeviceTensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(inner, spec)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    results = function(*args, **kwargs)
    if function is torch.ops.aten.copy_.default:
        is_second = id(args[0]) in wrapped
    if not is_second:
        return results
    return tree_map_only(
        Tensor, lambda tensor: wrapped[id(tensor)] if id(tensor) in wrapped else SecondDeviceTensor(tensor), results
    )


def to_second_device(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the second device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(SecondDeviceTensor(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = SecondDeviceTensor(buffer)
    return module
