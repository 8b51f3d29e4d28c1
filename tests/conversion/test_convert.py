import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_sources import internvl_vision, language_model, siglip2_vision
from transformers import AutoImageProcessor, AutoProcessor, GenerationConfig

from hydra_hf import (
    HydraConfig,
    HydraForConditionalGeneration,
    HydraImageProcessor,
    HydraPipeline,
    HydraProcessor,
    HydraTokConfig,
    HydraTokModel,
)
from hydra_hf.cli import main
from hydra_hf.conversion.convert import convert
from hydra_hf.modeling.layers import ZeroLinear


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sources") / "vit"
    internvl_vision(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory, tiny_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("sources") / "text"
    model = language_model(folder, tiny_tokenizer)
    model.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[2, 0])
    model.generation_config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def hydra(vit, text, tmp_path_factory) -> Path:
    return convert(vit, tmp_path_factory.mktemp("hydra") / "out", text)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# The folder


def test_hydra_is_laid_out_as_the_pipeline_saves_it(hydra, tmp_path):
    pipeline = HydraPipeline.from_pretrained(hydra)
    pipeline.save_pretrained(tmp_path / "saved")
    assert set(listing(hydra)) == {*listing(tmp_path / "saved"), "README.md"}
    for file in ("model_index.json", "scheduler/scheduler_config.json", "processor/processor_config.json"):
        ours, saved = (json.loads((folder / file).read_text()) for folder in (hydra, tmp_path / "saved"))
        assert ours == {name: value for name, value in saved.items() if name != "_name_or_path"}
    ours, saved = weights(hydra / "model"), weights(tmp_path / "saved" / "model")
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], saved[name]) for name in ours)


def test_the_converted_pipeline_draws_in_two_steps(hydra):
    pipeline = HydraPipeline.from_pretrained(hydra)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
    assert image.getextrema() != ((0, 0),) * 3


def test_the_converted_model_answers_about_a_picture_without_error(hydra):
    pipeline = HydraPipeline.from_pretrained(hydra)
    picture = torch.zeros(3, 32, 32)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "a cat"}]}]
    inputs = pipeline.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = pipeline.model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_processor_has_the_vits_sizes_and_one_chat_template(hydra):
    processor = AutoProcessor.from_pretrained(hydra / "processor")
    assert isinstance(processor, HydraProcessor)
    assert processor.patch_size == processor.image_processor.patch_size == 8
    assert processor.image_processor.output_size(640, 320) == (
        40,
        24,
    )  # the aspect is kept, at no more pixels than 32 x 32
    assert "generation" in processor.chat_template
    assert processor.tokenizer.chat_template in (None, processor.chat_template)


def test_the_ids_in_the_config_are_the_tokenizers(hydra):
    pipeline = HydraPipeline.from_pretrained(hydra)
    config, tokenizer = pipeline.model.config, pipeline.processor.tokenizer
    ids = [config.image_token_id, config.vision_start_token_id, config.vision_end_token_id]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    assert tokenizer.decode(config.null_prompt_ids) == pipeline.processor.build_image_prompt("")
    assert config.null_prompt_ids[-1] == config.vision_start_token_id


def test_a_model_of_images_and_clips_gets_a_processor_of_both(text, tmp_path):
    siglip2_vision(tmp_path / "vit")
    folder = convert(str(tmp_path / "vit"), tmp_path / "out", text, video=True)
    processor = AutoProcessor.from_pretrained(folder / "processor")
    assert processor.video_processor.patch_size == processor.patch_size
    assert processor.video_processor.temporal_patch_size == 4
    assert processor.video_processor.size == processor.image_processor.size
    config = HydraConfig.from_pretrained(folder / "model")
    assert processor.tokenizer.convert_ids_to_tokens(config.video_token_id) == "<|video_pad|>"


def test_the_generation_config_is_the_language_models(hydra, text):
    ours, theirs = GenerationConfig.from_pretrained(hydra / "model"), GenerationConfig.from_pretrained(text)
    assert ours.to_dict() == theirs.to_dict()
    assert (ours.temperature, ours.eos_token_id) == (0.7, [2, 0])


def test_without_language_the_folder_is_a_tokenizer(vit, tmp_path):
    out = convert(vit, tmp_path / "out")
    assert listing(out) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    model, info = HydraTokModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(AutoImageProcessor.from_pretrained(out), HydraImageProcessor)
    with torch.no_grad():
        latents = model(torch.zeros(1, 3, 32, 32)).latents
        assert model.decode(latents, generator=torch.Generator().manual_seed(0)).sample.shape == (1, 3, 32, 32)


def test_training_can_take_the_tokenizer_out_of_hydra(hydra, vit, tmp_path):
    tower = HydraTokModel.from_pretrained(hydra / "model").state_dict()
    alone = HydraTokModel.from_pretrained(convert(vit, tmp_path / "out")).state_dict()
    assert tower.keys() == alone.keys()
    assert all(torch.equal(tower[name], alone[name]) for name in tower)
    assert HydraTokConfig.from_pretrained(hydra / "model").num_gen_layers == 2


def test_no_name_of_a_folder_of_this_machine_is_in_the_configs(hydra, vit):
    files = list(hydra.rglob("*.json"))
    assert len(files) > 3
    for file in files:
        assert str(Path(vit).parents[1]) not in file.read_text(), file


def test_the_card_tells_sources_command_and_what_is_untrained(hydra, vit, text):
    card = (hydra / "README.md").read_text()
    total = sum(value.numel() for value in weights(hydra / "model").values())
    assert f"A HYDRA of {total:,} parameters" in card
    assert f"| Gen-ViT, Sem-ViT | `{vit}` |" in card
    assert f"| language model, text tokenizer | `{text}` |" in card
    assert "bottleneck, position_proj, pixel_decoder, multi_modal_projector, time_embedding, vision_head" in card
    assert "needs training before it\ndraws or answers about images" in card
    assert "licences of their sources" in card
    assert f"    hydra convert --vision {vit} --language {text} --out out --seed 0\n" in card


# What is new


def test_new_parts_start_as_the_models_own_first_values(hydra):
    model = HydraForConditionalGeneration.from_pretrained(hydra / "model")
    tower = model.model.vision_tower
    zeros = [module for module in model.modules() if isinstance(module, ZeroLinear)]
    assert (
        len(zeros) == 1 + 14 + 6
    )  # Sem-ViT's positions; 12 flow layers and 2 last layers; 4 layers of the head and 2 last ones
    assert all(not module.weight.any() and not module.bias.any() for module in zeros)
    drawn = [tower.bottleneck.down_proj, tower.pixel_decoder.patch_embedding, model.model.multi_modal_projector.linear,
             model.model.time_embedding.linear_1, model.vision_head.in_proj]  # fmt: skip
    for module in drawn:
        assert 0.015 < module.weight.std() < 0.025  # initializer_range is 0.02
        assert not module.bias.any()
    assert (tower.pixel_decoder.global_layers[0].scale_1.weight == 1).all()
    assert (model.vision_head.in_norm.weight == 1).all()
    assert (tower.bottleneck.latents_std == 1).all()
    assert not tower.bottleneck.latents_mean.any()


def test_the_seed_decides_the_new_parts_and_nothing_else(vit, tmp_path):
    torch.manual_seed(5)
    first = weights(convert(vit, tmp_path / "first", seed=1))
    torch.manual_seed(6)
    again = weights(convert(vit, tmp_path / "again", seed=1))
    other = weights(convert(vit, tmp_path / "other", seed=2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name.split(".")[0] for name in first if not torch.equal(first[name], other[name])}
    assert differing == {"bottleneck", "pixel_decoder"}


def test_converting_leaves_the_global_generator_alone(vit, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    convert(vit, tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)


# Types and shards


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_all_weights_and_the_configs_have_the_type_asked_for(dtype, vit, text, tmp_path):
    out = convert(vit, tmp_path / "out", text, dtype=dtype)
    expected = getattr(torch, dtype or "float32")
    assert {value.dtype for value in weights(out / "model").values()} == {expected}
    model = HydraForConditionalGeneration.from_pretrained(out / "model")
    assert model.dtype == model.model.language_model.dtype == model.model.vision_tower.dtype == expected
    assert model.config.text_config.dtype == model.config.vision_config.decoder_config.dtype == expected


def test_without_a_type_the_sources_decide(tmp_path):
    siglip2_vision(tmp_path / "vit")
    tensors = {name: value.bfloat16() for name, value in load_file(tmp_path / "vit" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "vit" / "model.safetensors")
    out = convert(str(tmp_path / "vit"), tmp_path / "narrow")
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    tensors["post_layernorm.bias"] = tensors["post_layernorm.bias"].float()
    save_file(tensors, tmp_path / "vit" / "model.safetensors")
    out = convert(str(tmp_path / "vit"), tmp_path / "wide")
    assert {value.dtype for value in weights(out).values()} == {torch.float32}


def test_shards_are_not_larger_than_asked_and_hold_the_same(hydra, vit, text, tmp_path):
    out = convert(vit, tmp_path / "out", text, shard_size="200KB") / "model"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= 200_000
    whole, sharded = weights(hydra / "model"), weights(out)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    HydraForConditionalGeneration.from_pretrained(out)


MEASURE = """
import resource, sys
from pathlib import Path
from hydra_hf.conversion.convert import convert
vit, small, large, out = sys.argv[1:]
convert(vit, Path(out) / "small", small, shard_size="20MB")  # whatever is imported late
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(vit, Path(out) / "large", large, shard_size="20MB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_holds_about_a_shard_and_not_the_model(vit, text, tiny_tokenizer, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 48}
    language_model(tmp_path / "large", tiny_tokenizer, **sizes)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 300e6
    command = [sys.executable, "-c", MEASURE, vit, text, str(tmp_path / "large"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = 1024 * int(done.stdout.splitlines()[-1])  # kilobytes on Linux
    new = 25e6  # the vision head at this width, in memory throughout
    assert grown < 20e6 + new + 30e6, grown  # a shard, the new parts, and what an allocator keeps


# Mistakes


def test_an_out_that_is_there_is_left_alone(vit, tmp_path):
    (tmp_path / "out").mkdir()
    convert(vit, tmp_path / "out")  # empty
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="out exists already"):
        convert(vit, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"shard_size": "many"}, "Unit 'NY' not supported"),
        ({"decoder": "XL"}, "decoder='XL' must be one of"),
        ({"num_gen_layers": 5}, "num_gen_layers=5 must leave each half at least one"),
    ],
)
def test_a_wrong_option_is_an_error_and_leaves_nothing_behind(option, message, vit, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(vit, tmp_path / "out", **option)
    assert not list(tmp_path.iterdir())


# Command line


def test_the_command_converts(vit, text, tmp_path, capsys):
    out = tmp_path / "new" / "hydra"
    assert main(["convert", "--vision", vit, "--language", text, "--out", str(out), "--num_gen_layers", "1",
                 "--decoder", "M", "--dtype", "bfloat16", "--seed", "3"]) == 0  # fmt: skip
    assert capsys.readouterr().out == f"{out}\n"
    config = HydraForConditionalGeneration.from_pretrained(out / "model").config.vision_config
    assert (config.num_gen_layers, config.decoder_config.num_flow_layers) == (1, 16)
    assert "--num_gen_layers 1 --dtype bfloat16 --seed 3" in (out / "README.md").read_text()


def test_a_wrong_source_is_one_line_on_stderr(tmp_path, capsys):
    assert main(["convert", "--vision", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"hydra convert: {tmp_path} has no config.json.\n"


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", "--help"])
    assert exit_info.value.code == 0
    assert "example: hydra convert --vision OpenGVLab/InternViT-300M-448px-V2_5" in capsys.readouterr().out
