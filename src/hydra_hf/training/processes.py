"""Which process this is, and which rows of a step it computes."""

from collections.abc import Callable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor


def partial_state(**kwargs) -> PartialState:
    """Which process this is; on CPUs, processes communicate by gloo. The first call's `kwargs` are those of the process group."""
    use_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=use_cpu, **kwargs)


def on_main_process(function: Callable[[], None]) -> None:
    """Runs `function` on the main process. Its ValueError or OSError is raised on every process, so that none waits for it."""
    state, failure = partial_state(), [None]
    if state.is_main_process:
        try:
            function()
        except (ValueError, OSError) as error:
            failure = [error]
    if state.num_processes > 1:
        broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def share_of(number: int, process_index: int, num_processes: int) -> range:
    """The rows of `number` that a process works on, as many on each: the last ones overlap if they cannot be divided evenly."""
    size = -(-number // num_processes)
    start = min(process_index * size, number - size)
    return range(start, start + size)


def gather_shares(accelerator: Accelerator, values: Tensor, number: int) -> Tensor:
    """All `number` rows on every process, from `values` that hold each process's `share_of` them."""
    num_processes = accelerator.num_processes
    parts = accelerator.gather(values.contiguous()).unflatten(0, (num_processes, -1))
    whole = values.new_empty(number, *values.shape[1:])
    for index, part in enumerate(parts):
        rows = share_of(number, index, num_processes)
        whole[rows.start : rows.stop] = part
    return whole


def split_batch(batch_size: int, num_processes: int, micro_batch_size: int | None) -> tuple[int, int]:
    """Samples that a process computes at once, and its accumulation steps.

    Raises ValueError if they do not add up to the batch.
    """
    micro = batch_size // num_processes if micro_batch_size is None else micro_batch_size
    if micro < 1 or batch_size % (num_processes * micro):
        raise ValueError(f"{batch_size=} must be a multiple of {num_processes=} times {micro_batch_size=}.")
    return micro, batch_size // (num_processes * micro)


def num_accumulation_steps(tasks: dict[str, int], num_processes: int, micro_batch_size: int | None) -> int:
    """Forwards and backwards of one process in one step, so that none has more than `micro_batch_size` samples.

    Every task is in every one of them. Raises ValueError for a size smaller than the number of tasks.
    """
    if micro_batch_size is None:
        return 1
    if micro_batch_size < len(tasks):
        raise ValueError(f"{micro_batch_size=} must be at least {len(tasks)}, one sample for each of {list(tasks)}.")
    accumulation = 1
    while sum(-(-count // (num_processes * accumulation)) for count in tasks.values()) > micro_batch_size:
        accumulation += 1
    return accumulation
