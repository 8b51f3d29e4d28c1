"""Encodes the images of data sets once, for stages that do not train Gen-ViT and the bottleneck's projection."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hydra_hf.data.collate import pack_pixels
from hydra_hf.data.latents import (
    SHARD_SIZE,
    Encoded,
    Stamp,
    check_same,
    describe_data,
    missing_shards,
    read_description,
    shard_path,
    stamp,
    write_description,
    write_shard,
)
from hydra_hf.data.readers import SourceMix, fits
from hydra_hf.data.sources import Source, Sources
from hydra_hf.data.tasks import TASKS, UnreadableRecordError, images_of
from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor, HydraTokModel
from hydra_hf.modeling.grid import image_grid, run_by_grid, split_images
from hydra_hf.modeling.image_processing_hydra import packed_pixel_values

from .processes import on_main_process, partial_state
from .recipe import Data, Stage


ENCODER_FIELDS = (  # all that Gen-ViT reads of the config
    "hidden_size", "num_gen_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "use_cls_token", "image_size",
    "patch_size", "position_interpolation", "image_mean", "image_std", "latent_channels",
)  # fmt: skip


def encoder_state(tower: HydraTokModel) -> dict[str, Tensor]:
    """The weights that latents depend on: those of Gen-ViT, and of the bottleneck's projection to mean and variance."""
    prefixes = ("gen_vit.", "bottleneck.down_proj.")
    return {name: value for name, value in sorted(tower.state_dict().items()) if name.startswith(prefixes)}


def describe_encoder(tower: HydraTokModel, mixed_precision: str) -> dict:
    """What decides the latents of given pixels, as JSON values; the weights as a digest."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in encoder_state(tower).items():
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.float().cpu().contiguous().numpy())
    fields = {name: getattr(tower.config, name) for name in ENCODER_FIELDS}
    return {**fields, "mixed_precision": mixed_precision, "weights": digest.hexdigest()}


def latent_folders(stage: Stage, data: Data) -> list[Path]:
    """Where a stage reads latents in the place of images."""
    sources = getattr(data, "sources", ())  # the toy world has none
    return [Path(source.latents).expanduser() for source in sources if source.latents and source.task in stage.tasks]


def check_latents(model: HydraForConditionalGeneration, stage: Stage, data: Data) -> None:
    """Raises ValueError if a stage reads latents that its model would not make, or trains the modules that make them."""
    folders = latent_folders(stage, data)
    if not folders:
        return
    tower = model.model.vision_tower
    names = [f"model.vision_tower.{name}" for name in encoder_state(tower)]
    if trained := [name for name in names if stage.learning_rate_of(name)]:
        raise ValueError(
            f"{stage.name} trains {trained[0]}, which makes the latents in {folders[0]}: leave latents=... out."
        )
    encoder = describe_encoder(tower, stage.mixed_precision)
    for folder in folders:
        if (description := read_description(folder)) is not None:  # whoever reads them says that there are none
            check_same(folder, description, {"encoder": encoder})


class RecordImages(Dataset):
    """The images (3, H, W) of each record as training would encode them, or the reason why it has none; the stamps of their files."""

    def __init__(self, source: Source, processor: HydraProcessor):
        mix = SourceMix((replace(source, latents=None),), processor.image_processor, 0, fits)
        self.table, self.reader, self.task = mix.tables[0], mix.readers[0], source.task

    def __len__(self) -> int:
        return len(self.table.rows)

    def __getitem__(self, number: int) -> tuple[list[Tensor] | str, list[Stamp]]:
        try:
            record = self.table.record(number)
            sample = self.reader.sample(record, self.task)
            files = self.reader.files(record, self.task)
        except UnreadableRecordError as error:
            return str(error), []
        return [part["image"] for part in images_of(sample.messages)], [stamp(file) for file in files]


@dataclass(frozen=True)
class PreparedLatents:
    """What this process has encoded of a source; `skipped` is reason -> number of records, which training will skip, too."""

    path: str
    num_records: int
    latents: str
    skipped: dict[str, int]

    def __str__(self) -> str:
        skipped = [f"skipped: {self.path}: {reason} ({count})" for reason, count in self.skipped.items()]
        return "\n".join([*skipped, f"{self.path}: the latents of {self.num_records} records are in {self.latents}"])


def prepare_latents(
    sources: list[Source],
    processor: HydraProcessor,
    tower: HydraTokModel,
    *,
    mixed_precision: str,
    batch_size: int = 32,
    num_workers: int | None = None,
) -> Iterator[str | PreparedLatents]:
    """Encodes what is not encoded yet, each source into its folder `latents`, with the shards divided among the processes of
    `torchrun`. Yields lines that report progress, and each source's report.

    Args:
        mixed_precision: "no" or "bf16", that of the stage that reads them.

    Raises ValueError for sources without a folder, and for a folder of other data, another encoder or image policy.
    """
    if wrong := [source for source in sources if not source.latents or not TASKS[source.task].num_images]:
        raise ValueError(f"Got {wrong[0].task}={wrong[0].path} with latents={wrong[0].latents}, expected a task with images"
                         " and a folder, such as generate=shards/*.tar,latents=latents/shards.")  # fmt: skip
    if min(batch_size, (num_workers or 0) + 1) < 1:
        raise ValueError(f"{batch_size=} must be at least 1, {num_workers=} at least 0.")
    encoder = describe_encoder(tower, mixed_precision)
    num_workers = Sources(tuple(sources)).num_workers if num_workers is None else num_workers
    for source in sources:
        folder = Path(source.latents).expanduser()
        given = {**describe_data(source, processor.image_processor), "encoder": encoder}
        records = RecordImages(source, processor)
        on_main_process(partial(begin, folder, given, len(records)))
        state = partial_state()
        missing = missing_shards(folder, read_description(folder))[state.process_index :: state.num_processes]
        skipped: Counter[str] = Counter()
        for done, (number, shard, stamps) in enumerate(
            encoded_shards(records, missing, folder, tower, mixed_precision, batch_size, num_workers), start=1
        ):
            write_shard(shard_path(folder, number), shard, stamps, tower.config.latent_channels)
            skipped.update(record for record in shard if isinstance(record, str))
            yield f"{source.path}: {done} of {len(missing)} files"
        state.wait_for_everyone()
        yield PreparedLatents(source.path, len(records), str(folder), dict(skipped))


def begin(folder: Path, given: dict, num_records: int) -> None:
    """Writes what the latents are made from, or checks that existing ones are made from the same. Raises ValueError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    description = read_description(folder)
    if description is None:
        write_description(folder, {**given, "num_records": num_records, "shard_size": SHARD_SIZE})
    else:
        check_same(folder, description, given)


def encoded_shards(
    records: RecordImages, shards: list[int], folder: Path, tower: HydraTokModel, mixed_precision: str, batch_size: int,
    num_workers: int,
) -> Iterator[tuple[int, list[Encoded | str], list[list[Stamp]]]]:  # fmt: skip
    """The numbers of `shards`, and of each what its records hold and their stamps."""
    size = read_description(folder)["shard_size"]
    ranges = {number: range(number * size, min((number + 1) * size, len(records))) for number in shards}
    batches = [
        numbers[start : start + batch_size] for numbers in ranges.values() for start in range(0, size, batch_size)
    ]
    loader = DataLoader(
        records, batch_sampler=[batch for batch in batches if batch], collate_fn=list, num_workers=num_workers
    )
    read = iter(loader)
    for number, numbers in ranges.items():
        shard, stamps = [], []
        while len(shard) < len(numbers):
            images, new_stamps = zip(*next(read))
            shard += encode(images, tower, mixed_precision, batch_size)
            stamps += new_stamps
        yield number, shard, stamps


@torch.no_grad()
def encode(
    records: Sequence[list[Tensor] | str], tower: HydraTokModel, mixed_precision: str, batch_size: int
) -> list[Encoded | str]:
    """The grids and means of the images of some records, `batch_size` images at once; reasons are returned unchanged."""
    images = [image for record in records if not isinstance(record, str) for image in record]
    parts: Encoded = []
    for start in range(0, len(images), batch_size):
        chosen, patch_size = images[start : start + batch_size], tower.config.patch_size
        pixels = pack_pixels(chosen, patch_size)
        grids = [image_grid(*image.shape[-2:], patch_size) for image in chosen]
        with torch.autocast(tower.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            pixel_values = packed_pixel_values(pixels.to(tower.device))
            means = run_by_grid(tower.encode_means, grids, [pixel_values], config=tower.config)
        parts += zip(grids, split_images(means.cpu(), grids))
    rest = iter(parts)
    return [record if isinstance(record, str) else [next(rest) for _ in record] for record in records]
