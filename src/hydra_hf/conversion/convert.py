"""`convert`: makes a HYDRA-TOK or a HYDRA, to start training from, of published checkpoints.

Tensors go one by one from the files of the sources into the shards of the result, so that memory holds one shard at a time;
what no source has is drawn from a seed. Every name is accounted for before the first weight is read.
"""

import json
import os
import shlex
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from hydra_hf.conversion.language import convert_language, hydra_config, text_config
from hydra_hf.conversion.source import DTYPES, Origin, Source, Translate, find_origins
from hydra_hf.conversion.vision import convert_vision, vision_config, vision_layout
from hydra_hf.modeling import (
    HydraForConditionalGeneration,
    HydraImageProcessor,
    HydraProcessor,
    HydraTokConfig,
    HydraTokModel,
    HydraVideoProcessor,
)
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline


IN_HYDRA = "model.vision_tower."
NEW_IN_TOKENIZER = ("gen_vit.folds", "bottleneck", "sem_vit.position_proj", "pixel_decoder")
NEW_IN_HYDRA = ("model.multi_modal_projector", "model.time_embedding", "vision_head")

COPIED_PARTS = ("Gen-ViT, Sem-ViT", "language model, text tokenizer")
CARD = """---
license: other
library_name: hydra_hf
tags: [hydra]
base_model:{base_model}
---

# {title}

A {kind} of {number:,} parameters to start training from. {number_new:,} of them are new: it needs training before it
{purpose}.

| part | from |
|---|---|
{sources}
| {new_parts} | new: initial values from seed {seed} |

## Licence

The copied weights keep the licences of their sources. Read these before you use or publish this folder.

## Made with

    {command}
"""

Sources = list[tuple[Source, Translate]]


def convert(
    vision: str,
    out: Path,
    language: str | None = None,
    *,
    decoder: str | None = None,
    num_gen_layers: int | None = None,
    video: bool = False,
    dtype: str | None = None,
    shard_size: str = "5GB",
    seed: int = 0,
    revision: str | None = None,
    language_revision: str | None = None,
) -> Path:
    """Writes the folder `out`: HYDRA made of `vision` and `language`, or HYDRA-TOK alone without `language`; returns `out`.

    HYDRA is laid out as `HydraPipeline` saves it, HYDRA-TOK as `HydraTokModel` does. A killed run leaves no `out`.

    Args:
        vision, language: folders or Hub ids; InternViT (alone or in InternVL) or SigLIP2, and Qwen2.5, Qwen3 or Llama.
        decoder, num_gen_layers, video: see `vision_config`.
        dtype: such as "bfloat16"; None is the narrowest that holds the weights of all sources.
        shard_size: such as "5GB".
        seed: that of the initial values of the parts that no source has.

    Raises:
        ValueError: for sources that are unknown, incomplete or do not fit, and for an `out` that is not new or empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; name a new folder.")
    source = Source(vision, revision)
    text_source = None if language is None else Source(language, language_revision)
    try:
        tok_config = vision_config(source.config, decoder, num_gen_layers, video)
        if text_source is None:
            model, processor, sources = _plan_tokenizer(source, tok_config)
        else:
            model, processor, sources = _plan_hydra(source, tok_config, text_source)
    except StrictDataclassError as error:
        raise ValueError(f"The config of {vision} or {language} does not fit HYDRA: {error}") from error
    targets, new = targets_of(model), draw_new_values(model, seed)
    origins = find_origins(sources, targets, set(new))
    torch_dtype = _named_dtype(dtype) if dtype else _widest_dtype(origins)
    targets = {name: torch.empty_like(value, dtype=torch_dtype, device="meta") for name, value in targets.items()}
    _set_dtype(model.config, torch_dtype)

    options = {"vision": vision, "language": language, "out": out.name, "decoder": decoder,
               "num_gen_layers": num_gen_layers, "video": video, "dtype": dtype, "seed": seed, "revision": revision,
               "language_revision": language_revision}  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        model_folder = folder if language is None else folder / "model"
        model_folder.mkdir(parents=True)
        write_weights(model_folder, targets, origins, new, shard_size)
        _write_configs(folder, model_folder, model, processor)
        _write_card(folder / "README.md", options, sources, targets, set(new))
        if out.exists():
            out.rmdir()  # empty, as checked above
        os.replace(folder, out)
    return out


def _plan_tokenizer(source: Source, config: HydraTokConfig) -> tuple[HydraTokModel, HydraImageProcessor, Sources]:
    """HYDRA-TOK on the meta device, its image processor and the sources of its weights."""
    translate = partial(convert_vision, layout=vision_layout(source.config), config=config)
    return _on_meta(HydraTokModel, config), _image_processor(config), [(source, translate)]


def _plan_hydra(
    source: Source, tok_config: HydraTokConfig, text_source: Source
) -> tuple[HydraForConditionalGeneration, HydraProcessor, Sources]:
    """HYDRA on the meta device, its processor and the sources of its weights."""
    text = text_config(str(text_source.folder), text_source.config)
    tokenizer = AutoTokenizer.from_pretrained(text_source.folder)
    processor = HydraProcessor(
        _image_processor(tok_config),
        tokenizer,
        patch_size=tok_config.patch_size,
        video_processor=_video_processor(tok_config),
    )
    tokenizer.chat_template = processor.chat_template  # there is one kind of chat, with images
    model = _on_meta(HydraForConditionalGeneration, hydra_config(text, tok_config, processor))
    if (text_source.folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(text_source.folder)
    vision = partial(convert_vision, layout=vision_layout(source.config), config=tok_config, owner=IN_HYDRA)
    language = partial(convert_language, tie_word_embeddings=model.config.tie_word_embeddings)
    return model, processor, [(source, vision), (text_source, language)]


def _on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def _image_processor(config: HydraTokConfig) -> HydraImageProcessor:
    size = {
        "min_pixels": (4 * config.patch_size) ** 2,
        "max_pixels": config.image_size**2,
    }  # our choice, after Qwen2-VL
    return HydraImageProcessor(size=size, patch_size=config.patch_size)


def _video_processor(config: HydraTokConfig) -> HydraVideoProcessor | None:
    """That of a tokenizer for images and clips, with the frames of the size of its images."""
    if not config.temporal_fold_layers:
        return None
    size = _image_processor(config).size
    ratio = config.temporal_compression_ratio
    return HydraVideoProcessor(size=size, patch_size=config.patch_size, temporal_patch_size=ratio)


def targets_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds: its state dict without tied weights."""
    return {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}


def draw_new_values(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Initial values, in fp32, of what no source has, drawn as the models themselves do; `model` is on the meta device."""
    is_hydra = isinstance(model, HydraForConditionalGeneration)
    tower, prefix = (model.model.vision_tower, IN_HYDRA) if is_hydra else (model, "")
    parts = [(tower, prefix, name) for name in NEW_IN_TOKENIZER]
    parts += [(model, "", name) for name in NEW_IN_HYDRA] if is_hydra else []
    # the class token of a ViT without one is empty, and is new
    values = {name: torch.empty(value.shape) for name, value in targets_of(model).items() if not value.numel()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner, prefix, name in parts:
            part = owner.get_submodule(name).to(torch.float32).to_empty(device="cpu")
            for module in part.modules():
                owner._init_weights(module)
            values |= {f"{prefix}{name}.{key}": value for key, value in part.state_dict().items()}
    return values


def _named_dtype(name: str) -> torch.dtype:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if name not in names:
        raise ValueError(f"dtype={name!r} must be one of {list(names)}.")
    return names[name]


def _widest_dtype(origins: dict[str, Origin]) -> torch.dtype:
    return reduce(torch.promote_types, {origin.dtype for origin in origins.values()})


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        _set_dtype(getattr(config, name), dtype)


def write_weights(
    folder: Path, targets: dict[str, Tensor], origins: dict[str, Origin], new: dict[str, Tensor], shard_size: str
) -> None:
    """Writes `model.safetensors`, or shards of at most `shard_size` and their index; one shard is in memory at a time.

    `targets` give the names, their order and their types. Raises ValueError for a size that is not like "5GB".
    """
    split = split_torch_state_dict_into_shards(targets, max_shard_size=shard_size)
    with tqdm(total=len(targets), unit=" tensors", disable=None, leave=False) as progress:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                dtype = targets[name].dtype
                shard[name] = new[name].to(dtype) if name in new else origins[name].read(name, dtype)
                progress.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard  # before the next one grows
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_configs(
    folder: Path, model_folder: Path, model: PreTrainedModel, processor: HydraProcessor | HydraImageProcessor
) -> None:
    """Everything that `save_pretrained` of `HydraPipeline`, or of HYDRA-TOK, writes, except the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(model_folder)
    if isinstance(model, HydraTokModel):
        processor.save_pretrained(folder)
        return
    model.generation_config.save_pretrained(model_folder)
    pipeline = HydraPipeline(model, processor, FlowMatchEulerDiscreteScheduler())
    pipeline.processor.save_pretrained(folder / "processor")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)


def _write_card(path: Path, options: dict, sources: Sources, targets: dict[str, Tensor], new: set[str]) -> None:
    """The model card: where the weights come from, and what is untrained."""
    is_hydra = len(sources) == 2
    given = [
        (f"--{name}",) if value is True else (f"--{name}", str(value))
        for name, value in options.items()
        if value is not None and value is not False
    ]
    parts = (*NEW_IN_TOKENIZER, *(NEW_IN_HYDRA if is_hydra else ()))
    on_hub = [source.name for source, _ in sources if not Path(source.name).is_dir()]
    text = CARD.format(
        base_model="".join(f"\n- {name}" for name in on_hub) or " []",
        title=options["out"],
        kind="HYDRA" if is_hydra else "HYDRA-TOK",
        purpose="draws or answers about images" if is_hydra else "rebuilds or understands images",
        number=sum(value.numel() for value in targets.values()),
        number_new=sum(targets[name].numel() for name in new),
        sources="\n".join(f"| {part} | `{source.name}` |" for part, (source, _) in zip(COPIED_PARTS, sources)),
        new_parts=", ".join(part.split(".")[-1] for part in parts if any(f"{part}." in name for name in new)),
        seed=options["seed"],
        command=shlex.join(["hydra", "convert", *(word for pair in given for word in pair)]),
    )
    path.write_text(text, encoding="utf-8")
