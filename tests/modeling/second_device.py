"""A second device in pure Python: what a CPU computes under another device's name, with a GPU's rules for mixing the two.

A tensor of the second device is a wrapper around one of the CPU. An operation that gets tensors of both raises, as on a GPU,
except for single numbers, copies between devices, and indices of the CPU.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


SECOND = torch.device("meta")  # the one name besides the CPU's that needs no library; its own tensors have no values
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
    """While active, this device's name makes tensors of the second device, and mixing them with the CPU's is an error."""

    def __enter__(self):
        self.constructors = Constructors()
        self.constructors.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.constructors.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """What torch makes of lists, and lists of tensors, without an operation that a dispatch mode would see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.tolist and isinstance(args[0], SecondDeviceTensor):
            return args[0].inner.tolist()
        if function is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


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
