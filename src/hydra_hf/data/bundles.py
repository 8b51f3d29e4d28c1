"""Bundles of task batches from data sets (HYDRA, section 2.2: ratios of tasks)."""

import torch
from torch.utils.data import Dataset, get_worker_info

from hydra_hf.modeling import HydraProcessor

from .collate import collate
from .readers import TaskReader
from .sample import Sample
from .tasks import TASKS, images_of


class Bundles(Dataset):
    """Item i is {task: collated batch} of this process in micro step i, with these keys next to the tasks:

    - "step", "micro_step": the optimizer step i // accumulation, and i % accumulation;
    - "rows": {task: numbers of the batch's samples among the task's samples of the step, one for each sample};
    - "skipped": {task: records skipped for this bundle}, to be added up in the log.

    A batch has `num_samples` next to its tensors. It is 0 when the process has no sample of the task in this micro step:
    the batch is then one blank sample (its row is the task's count, one past the last), so that every process runs the
    same forwards, and its labels and generated tokens must not count.

    An item is a function of its number, except with streams of the Hub: these continue from item to item, without workers.

    Args:
        tasks: task -> samples in one optimizer step, of all processes and micro steps together.

    Raises ValueError for a task without a reader, and for streams that are divided among other processes.
    """

    def __init__(
        self,
        readers: dict[str, TaskReader],
        tasks: dict[str, int],
        processor: HydraProcessor,
        *,
        num_steps: int,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
    ):
        self.tasks = {task: count for task, count in tasks.items() if count}
        if missing := sorted(set(self.tasks) - set(readers)):
            raise ValueError(f"Got readers of {sorted(readers)}, but none for the tasks {missing}.")
        if not self.tasks or min(num_steps, accumulation, *self.tasks.values()) < 1:
            raise ValueError(f"{tasks=}, {num_steps=} and {accumulation=} must be positive.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"{process_index=} must be one of {num_processes=}.")
        self.readers = {task: readers[task] for task in self.tasks}
        self.streams = {task: reader for task, reader in self.readers.items() if reader.is_streaming}
        if any(reader.num_processes != num_processes for reader in self.streams.values()):
            raise ValueError(f"{num_processes=}, but the streams are divided among another number of processes.")
        self.processor, self.num_steps, self.accumulation = processor, num_steps, accumulation
        self.process_index, self.num_processes = process_index, num_processes
        self.next_index = 0  # the item that the streams give next
        self.positions: dict[int, dict] = {}  # of the streams, before the first item of each of the last steps

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"{index=} of {len(self)} bundles")
        if self.streams:
            self._follow_streams(index)
        step, micro_step = divmod(index, self.accumulation)
        bundle = {"step": step, "micro_step": micro_step, "rows": {}, "skipped": {}}
        for task, reader in self.readers.items():
            num_skipped = sum(reader.num_skipped.values())
            bundle[task], bundle["rows"][task] = self._batch(task, step, micro_step)
            bundle["skipped"][task] = sum(reader.num_skipped.values()) - num_skipped
        self.next_index = index + 1
        return bundle

    def _batch(self, task: str, step: int, micro_step: int) -> tuple[dict, list[int]]:
        count = self.tasks[task]
        first = self.process_index + self.num_processes * micro_step
        rows = range(first, count, self.num_processes * self.accumulation)
        read = self.readers[task].batch([step * count + row for row in rows])
        samples = {row: sample for row, sample in zip(rows, read) if sample is not None}
        batch = collate(list(samples.values()) or [self._blank_sample(task)], self.processor)
        return {**batch, "num_samples": len(samples)}, list(samples) or [count]

    def _blank_sample(self, task: str) -> Sample:
        smallest = torch.zeros(3, self.processor.patch_size, self.processor.patch_size)
        messages = TASKS[task].blank_messages(smallest)
        if (channels := self.readers[task].latent_channels) is not None:
            for part in images_of(messages):
                part |= {"image": (1, 1, 1), "latent_mean": torch.zeros(1, channels)}
        return Sample(task=task, messages=messages)

    def _follow_streams(self, index: int) -> None:
        """Keeps the positions of the streams at the start of a step. Raises ValueError for an item out of order."""
        if get_worker_info() is not None:
            raise ValueError(
                "Streaming sources are read by the training process itself, expected a loader without workers."
            )
        if index != self.next_index:
            raise ValueError(
                f"The streams give bundle {self.next_index} next and cannot give {index}; call load_state_dict first."
            )
        if index % self.accumulation == 0:
            recent = dict(list(self.positions.items())[-8:])  # more than a loader fetches ahead
            self.positions = {**recent, index // self.accumulation: self._position()}

    def _position(self) -> dict:
        return {task: reader.state_dict() for task, reader in self.streams.items()}

    def state_dict(self, step: int) -> dict:
        """What this process of another run needs to resume at `step`, as JSON values; {} without streams.

        `step` is the next one to be trained: a loader may have fetched more since. Raises ValueError if it is not a recent one.
        """
        if not self.streams:
            return {}
        if step * self.accumulation == self.next_index:
            return {"step": step, "streams": self._position()}
        if step not in self.positions:
            raise ValueError(f"The position at {step=} is not known, expected one of {sorted(self.positions)}.")
        return {"step": step, "streams": self.positions[step]}

    def load_state_dict(self, state: dict) -> None:
        """Makes the first item of the saved step the next one. Raises ValueError if the state is of other streams."""
        if set(state.get("streams", {})) != set(self.streams):
            raise ValueError(f"Got positions of {sorted(state.get('streams', {}))}, expected {sorted(self.streams)}.")
        for task, reader in self.streams.items():
            reader.load_state_dict(state["streams"][task])
        if self.streams:
            self.next_index = state["step"] * self.accumulation
