import inspect
import json
import os
import shutil
import subprocess
import sys
from textwrap import dedent
from unittest.mock import patch

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from huggingface_hub import HfApi
from packaging.version import Version
from PIL import Image
from torch import Tensor
from transformers.integrations.peft import MIN_PEFT_VERSION

from hydra_hf.modeling.flow import shift_sigma
from hydra_hf.modeling.modeling_hydra import HydraForConditionalGeneration
from hydra_hf.modeling.prefix_cache import FrozenPrefixCache
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline


DTYPE = "dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype"  # renamed in diffusers 0.40
RAGGED = ["a cat", "draw a dog left of a green star and two blue squares", ""]
SHAPE = (4, 4, 4)  # latent channels and grid of the tiny tokenizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num_images: int = 1, seed: int = 7) -> Tensor:
    return torch.randn((num_images, *SHAPE), generator=seeded(seed))


def latents_of(pipeline, prompt="a cat", **kwargs) -> Tensor:
    return pipeline(prompt, output_type="latent", **kwargs).images


def with_model(pipeline: HydraPipeline, model: HydraForConditionalGeneration) -> HydraPipeline:
    pipeline.model = model
    pipeline.processor.num_time_tokens = model.config.num_time_tokens
    return pipeline


class CallRecorder:
    """The batch sizes with which a module was called."""

    def __init__(self, module: torch.nn.Module):
        self.batch_sizes = []
        module.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs, output):
        self.batch_sizes.append(len(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]))


def counted_passes(pipeline: HydraPipeline) -> list[int]:
    """Passes of the language model while the pipeline draws: those over prompts, then those of each step."""
    passes, model = [0], pipeline.model.model

    def count(*args) -> None:
        passes[-1] += 1

    model.vision_tower.sem_vit.register_forward_pre_hook(lambda *args: passes.append(0))  # opens each step
    model.language_model.register_forward_pre_hook(count)
    return passes


# The same picture, however it is asked for


@torch.no_grad()
def draw_without_cache(
    pipeline: HydraPipeline, prompts: list[str], latents: Tensor, num_steps: int, guidance_scale: float
) -> Tensor:
    """The reference: at every step a full pass over text and picture, guidance and Euler by hand."""
    model, tokenizer = pipeline.model, pipeline.processor.tokenizer
    num_image_tokens = model.config.num_time_tokens + 16
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    rows = [tokenizer(chat.format(text))["input_ids"] for text in [*prompts, *[""] * len(prompts)]]
    rows = [row + [model.config.image_token_id] * num_image_tokens for row in rows]
    length = max(map(len, rows))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    position_ids = torch.stack([(torch.arange(length) - length + len(row)).clamp(min=0) for row in rows])
    sigmas = [shift_sigma(torch.tensor(1 - step / num_steps), shift=2.0).item() for step in range(num_steps)] + [0.0]
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
        velocity = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            latents=latents.repeat(2, 1, 1, 1),
            sigma=torch.full((len(rows),), sigma),
            is_generated=torch.ones(len(rows), dtype=torch.bool),
        ).velocity
        conditional, unconditional = velocity.chunk(2)
        velocity = guidance_scale * conditional + (1 - guidance_scale) * unconditional
        latents = latents - (sigma - next_sigma) * velocity
    return latents


@pytest.mark.parametrize(
    "language_model, fields",
    [
        ("qwen2", {}),
        ("llama", {}),
        ("qwen3", {}),
        ("qwen2", {"use_time_token": False}),
        ("qwen2", {"llm_visual_input": "latent"}),
    ],
)
def test_drawing_with_the_cache_equals_full_passes(tiny_pipeline, make_tiny_model, language_model, fields):
    pipeline = with_model(tiny_pipeline, make_tiny_model(language_model, **fields))
    drawn = latents_of(pipeline, RAGGED, latents=noise(3), num_inference_steps=4, guidance_scale=2.5)
    reference = draw_without_cache(pipeline, RAGGED, noise(3), num_steps=4, guidance_scale=2.5)
    assert (reference - noise(3)).abs().max() > 0.1  # the velocity is not zero
    torch.testing.assert_close(drawn, reference, atol=1e-5, rtol=1e-5)


def test_the_prompt_changes_the_picture(tiny_pipeline):
    cat, star = (latents_of(tiny_pipeline, prompt, latents=noise()) for prompt in ("a cat", "a green star"))
    assert (cat - star).abs().max() > 1e-3


def test_one_prompt_in_a_ragged_batch_equals_the_prompt_alone(tiny_pipeline):
    prompts = ["a cat", "very long " * 8]
    batch = latents_of(tiny_pipeline, prompts, latents=noise(2))
    for index, prompt in enumerate(prompts):
        alone = latents_of(tiny_pipeline, prompt, latents=noise(2)[index : index + 1])
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_gives_as_many_pictures_as_prompts(tiny_pipeline, batch_size):
    images = tiny_pipeline(["a cat"] * batch_size, output_type="np").images
    assert images.shape == (batch_size, 32, 32, 3)
    assert 0 <= images.min() < images.max() <= 1


def test_pictures_of_one_prompt_stand_together(tiny_pipeline):
    drawn = latents_of(tiny_pipeline, RAGGED, num_images_per_prompt=2, latents=noise(6))
    prompts = [prompt for prompt in RAGGED for _ in range(2)]
    torch.testing.assert_close(drawn, latents_of(tiny_pipeline, prompts, latents=noise(6)), atol=1e-5, rtol=1e-5)


def test_pictures_of_one_prompt_share_one_prefill(tiny_pipeline):
    language_model = CallRecorder(tiny_pipeline.model.model.language_model)
    assert len(tiny_pipeline("a cat", num_images_per_prompt=3).images) == 3
    assert language_model.batch_sizes == [1, 1, *[3, 3] * 3]  # both prompts, then both branches of each step


def test_generate_draws_what_the_pipeline_draws(tiny_pipeline):
    inputs = tiny_pipeline.processor.tokenizer(
        [tiny_pipeline.processor.build_image_prompt(prompt) for prompt in RAGGED],
        padding=True, padding_side="left", return_tensors="pt",
    )  # fmt: skip
    pixels = tiny_pipeline.model.generate(
        **inputs, generation_mode="image", num_inference_steps=3, guidance_scale=3.0, generator=seeded()
    )
    images = tiny_pipeline(RAGGED, generator=seeded(), output_type="pt").images
    torch.testing.assert_close(images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_the_prompt_is_read_as_training_wrote_it(tiny_pipeline, monkeypatch):
    processor, seen = tiny_pipeline.processor, []
    prefill = tiny_pipeline.model.prefill
    monkeypatch.setattr(
        tiny_pipeline.model, "prefill", lambda **inputs: seen.append(inputs["input_ids"]) or prefill(**inputs)
    )
    tiny_pipeline("a red circle", guidance_scale=1)
    answer = {"role": "assistant", "content": [{"type": "image"}]}
    chat = [{"role": "user", "content": "a red circle"}, answer]
    trained = processor.encode_conversations([chat], images=[torch.zeros(3, 32, 32)])["input_ids"]
    assert trained[0, seen[0].shape[1]] == processor.image_token_id
    torch.testing.assert_close(seen[0], trained[:, : seen[0].shape[1]])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_special_tokens_in_a_prompt_are_text(tiny_pipeline, monkeypatch, token):
    tokens, seen = tiny_pipeline.processor.tokenizer.added_tokens_decoder, []
    prefill = tiny_pipeline.model.prefill
    monkeypatch.setattr(
        tiny_pipeline.model, "prefill", lambda **inputs: seen.append(inputs["input_ids"][0]) or prefill(**inputs)
    )
    for prompt in ("a cat", f"a cat{token}"):
        tiny_pipeline(prompt, guidance_scale=1, num_inference_steps=1)
    plain, typed = ([token_id for token_id in ids.tolist() if token_id in tokens] for ids in seen)
    assert typed == plain
    assert len(seen[1]) > len(seen[0])  # it is read, not dropped


# Randomness


def test_the_same_seed_draws_the_same_picture(tiny_pipeline):
    first, second, other = (tiny_pipeline("a cat", generator=seeded(s), output_type="np").images for s in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.01


def test_latents_in_equal_latents_of_the_generator(tiny_pipeline):
    given = torch.randn((1, *SHAPE), generator=seeded())
    torch.testing.assert_close(
        latents_of(tiny_pipeline, latents=given), latents_of(tiny_pipeline, generator=seeded()), atol=0, rtol=0
    )


def test_given_latents_stay_as_they_were(tiny_pipeline):
    given = noise()
    latents_of(tiny_pipeline, latents=given)
    torch.testing.assert_close(given, noise(), atol=0, rtol=0)


def test_a_list_of_generators_equals_single_calls(tiny_pipeline):
    batch = tiny_pipeline(RAGGED, generator=[seeded(seed) for seed in range(3)], output_type="np").images
    for seed, prompt in enumerate(RAGGED):
        alone = tiny_pipeline(prompt, generator=seeded(seed), output_type="np").images
        np.testing.assert_allclose(batch[seed : seed + 1], alone, atol=1e-4)


def test_a_call_with_a_generator_leaves_the_global_one_alone(tiny_pipeline):
    before = torch.random.get_rng_state()
    tiny_pipeline("a cat", generator=seeded())
    assert torch.equal(before, torch.random.get_rng_state())


# Guidance


def test_a_scale_of_one_draws_the_condition_alone(tiny_pipeline):
    language_model = CallRecorder(tiny_pipeline.model.model.language_model)
    alone = latents_of(tiny_pipeline, RAGGED, latents=noise(3), guidance_scale=1)
    assert language_model.batch_sizes == [3, 3, 3, 3]
    assert not tiny_pipeline.do_classifier_free_guidance
    nearly = latents_of(tiny_pipeline, RAGGED, latents=noise(3), guidance_scale=1 + 1e-7)
    torch.testing.assert_close(alone, nearly, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_scale_of_one_or_less_is_no_guidance(tiny_pipeline, scale):
    """As in diffusers: 0 draws the prompt, not the negative prompt."""
    drawn, unguided = (
        latents_of(tiny_pipeline, "a cat", negative_prompt="a star", latents=noise(), guidance_scale=value)
        for value in (scale, 1.0)
    )
    assert torch.equal(drawn, unguided)
    other = latents_of(tiny_pipeline, "a dog", negative_prompt="a star", latents=noise(), guidance_scale=scale)
    assert not torch.equal(drawn, other)


@pytest.mark.parametrize("scale", [0, 0.5])
def test_generate_reads_a_scale_as_the_pipeline_does(tiny_pipeline, scale):
    ids = torch.tensor([tiny_pipeline.model.config.null_prompt_ids])
    drawn, unguided = (
        tiny_pipeline.model.generate(ids, generation_mode="image", generator=seeded(), guidance_scale=value,
                                     num_inference_steps=2)
        for value in (scale, 1.0)
    )  # fmt: skip
    assert torch.equal(drawn, unguided)


@pytest.mark.parametrize("same", ["", ["", "", ""]])
def test_no_negative_prompt_is_the_empty_one(tiny_pipeline, same):
    drawn = latents_of(tiny_pipeline, RAGGED, latents=noise(3), negative_prompt=same)
    torch.testing.assert_close(drawn, latents_of(tiny_pipeline, RAGGED, latents=noise(3)), atol=0, rtol=0)


def test_a_list_of_negative_prompts_goes_row_by_row(tiny_pipeline):
    negative_prompts = ["two blue squares", "", "a dog"]
    batch = latents_of(tiny_pipeline, RAGGED, latents=noise(3), negative_prompt=negative_prompts)
    for index, (prompt, negative_prompt) in enumerate(zip(RAGGED, negative_prompts)):
        alone = latents_of(tiny_pipeline, prompt, negative_prompt=negative_prompt, latents=noise(3)[index : index + 1])
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-4, rtol=1e-4)


def test_the_null_prompt_of_generate_is_the_empty_prompt(tiny_pipeline):
    text = tiny_pipeline.processor.build_image_prompt("")
    assert tiny_pipeline.processor.tokenizer(text)["input_ids"] == tiny_pipeline.model.config.null_prompt_ids


def test_only_the_prompts_run_outside_the_guidance_interval(tiny_pipeline):
    passes = counted_passes(tiny_pipeline)
    latents_of(tiny_pipeline, RAGGED, num_inference_steps=4, guidance_interval=(2 / 3 - 0.01, 0.9))
    assert passes == [2, 1, 2, 2, 1]  # the prompts, then sigma 1, 6/7, 2/3, 2/5


def test_the_upper_end_of_the_guidance_interval_is_inside_and_the_lower_is_not(tiny_pipeline):
    seen = []
    step = tiny_pipeline.model.denoise_step
    tiny_pipeline.model.denoise_step = lambda *args: seen.append(args[1].item()) or step(*args)
    latents_of(tiny_pipeline, num_inference_steps=4)
    passes = counted_passes(tiny_pipeline)
    latents_of(tiny_pipeline, num_inference_steps=4, guidance_interval=(seen[2], seen[1]))
    assert passes == [2, 1, 2, 1, 1]


def test_an_empty_guidance_interval_is_no_guidance(tiny_pipeline):
    never = latents_of(tiny_pipeline, RAGGED, latents=noise(3), guidance_interval=(0, 0))
    unguided = latents_of(tiny_pipeline, RAGGED, latents=noise(3), guidance_scale=1)
    torch.testing.assert_close(never, unguided, atol=1e-5, rtol=1e-5)


# What runs, and how often


def test_drawing_reads_the_prompt_once_and_never_speaks(tiny_pipeline):
    model = tiny_pipeline.model
    modules = (model.lm_head, model.model.vision_tower.sem_vit, model.model.language_model, model.vision_head)
    lm_head, sem_vit, language_model, vision_head = map(CallRecorder, modules)
    tiny_pipeline(["a cat", "a dog"], num_inference_steps=5)
    assert lm_head.batch_sizes == []
    assert sem_vit.batch_sizes == [2] * 5  # both branches of guidance share it
    assert language_model.batch_sizes == [2, 2] * 6  # each branch by itself: the prompts, then the steps
    assert vision_head.batch_sizes == [2, 2] * 5


def test_only_picture_tokens_run_in_a_step(tiny_pipeline):
    lengths = []
    tiny_pipeline.model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tiny_pipeline("a cat")
    assert lengths[2:] == [1 + 16] * 2 * 3  # after both prompts, both branches of each step


def test_drawing_leaves_the_cache_of_the_prompt_as_it_was(tiny_pipeline, monkeypatch):
    frozen = FrozenPrefixCache.from_cache
    caches, copies = [], []

    def from_cache(cache):
        caches.append(frozen(cache))
        copies.append([(layer.keys.clone(), layer.values.clone()) for layer in caches[-1].layers])
        return caches[-1]

    monkeypatch.setattr(FrozenPrefixCache, "from_cache", from_cache)
    latents_of(tiny_pipeline, RAGGED, guidance_interval=(0.5, 1))
    assert [len(cache.layers[0].keys) for cache in caches] == [3, 3]
    for cache, layers in zip(caches, copies):
        for layer, (keys, values) in zip(cache.layers, layers, strict=True):
            torch.testing.assert_close(layer.keys, keys, atol=0, rtol=0)
            torch.testing.assert_close(layer.values, values, atol=0, rtol=0)


def test_the_noise_levels_are_those_of_training(tiny_pipeline):
    latents_of(tiny_pipeline, num_inference_steps=4)
    expected = shift_sigma(torch.tensor([1, 0.75, 0.5, 0.25, 0]), shift=2.0)
    torch.testing.assert_close(tiny_pipeline.scheduler.sigmas, expected)


def test_model_offload_brings_the_model_for_every_call(tiny_pipeline):
    expected = latents_of(tiny_pipeline, latents=noise())
    tiny_pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are renewed after each call
        hook = tiny_pipeline.model._hf_hook
        with patch.object(hook, "pre_forward", wraps=hook.pre_forward) as bring:
            image = tiny_pipeline("a cat", latents=noise(), generator=seeded()).images[0]
        assert bring.call_count == 2 + 3 + 1  # prompt and negative prompt, steps, decoder
        assert isinstance(image, Image.Image)
    torch.testing.assert_close(latents_of(tiny_pipeline, latents=noise()), expected)


# The forms of the call and of what it gives


def test_the_call_has_the_arguments_of_diffusers():
    parameters = inspect.signature(HydraPipeline.__call__).parameters
    expected = {
        "prompt", "negative_prompt", "height", "width", "guidance_scale", "num_inference_steps", "num_images_per_prompt",
        "generator", "latents", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs", "max_sequence_length",
    }  # fmt: skip
    assert expected <= set(parameters)


def test_a_tuple_holds_the_same_picture_as_the_output(tiny_pipeline):
    output = tiny_pipeline("a cat", generator=seeded(), output_type="np")
    (images,) = tiny_pipeline("a cat", generator=seeded(), output_type="np", return_dict=False)
    np.testing.assert_array_equal(images, output.images)


def test_every_output_type_shows_the_same_picture(tiny_pipeline):
    pil, array, tensor = (
        tiny_pipeline("a cat", generator=seeded(), output_type=t).images for t in ("pil", "np", "pt")
    )
    assert pil[0].size == (32, 32)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))


def test_latents_decode_to_the_picture(tiny_pipeline):
    generator = seeded()
    latents = latents_of(tiny_pipeline, generator=generator)
    with torch.no_grad():
        pixels = tiny_pipeline.model.decode_latents(latents, generator=generator)
    image = tiny_pipeline("a cat", generator=seeded(), output_type="pt").images
    torch.testing.assert_close(image, (pixels / 2 + 0.5).clamp(0, 1))


def test_any_multiple_of_the_patch_can_be_drawn(tiny_pipeline):
    assert tiny_pipeline("a cat", height=16, width=48).images[0].size == (48, 16)


def test_the_defaults_of_the_call_are_the_pipelines(tiny_pipeline):
    given = latents_of(tiny_pipeline, latents=noise(), num_inference_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(latents_of(tiny_pipeline, latents=noise()), given, atol=0, rtol=0)
    assert (tiny_pipeline.num_timesteps, tiny_pipeline.guidance_scale) == (3, 3.0)


def test_a_new_pipeline_has_the_defaults_of_the_paper_sized_model(tiny_model, tiny_processor):
    pipeline = HydraPipeline(tiny_model, tiny_processor, FlowMatchEulerDiscreteScheduler())
    config = pipeline.config
    assert (config.default_num_inference_steps, config.default_guidance_scale) == (50, 4.5)


def test_the_components_build_the_same_pipeline(tiny_pipeline):
    other = HydraPipeline(**tiny_pipeline.components)
    drawn = latents_of(other, latents=noise(), num_inference_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(drawn, latents_of(tiny_pipeline, latents=noise()), atol=0, rtol=0)


# Callbacks


def test_a_callback_sees_every_step(tiny_pipeline):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is tiny_pipeline
        seen.append((step, timestep.item(), tensors["latents"].shape))
        return tensors

    tiny_pipeline("a cat", callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [shape for _, _, shape in seen] == [(1, *SHAPE)] * 3
    assert seen[0][1] == 1000


def test_every_callback_tensor_input_can_be_asked_for(tiny_pipeline):
    names = tiny_pipeline._callback_tensor_inputs

    def callback(pipeline, step, timestep, tensors):
        assert sorted(tensors) == sorted(names)
        return tensors

    tiny_pipeline("a cat", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


def test_a_callback_can_zero_the_latents(tiny_pipeline):
    def callback(pipeline, step, timestep, tensors):
        is_last = step == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if is_last else tensors

    assert latents_of(tiny_pipeline, callback_on_step_end=callback).abs().sum() == 0


def test_a_callback_without_tensors_changes_nothing(tiny_pipeline):
    drawn = latents_of(
        tiny_pipeline, latents=noise(), callback_on_step_end=lambda *args: {}, callback_on_step_end_tensor_inputs=[]
    )
    torch.testing.assert_close(drawn, latents_of(tiny_pipeline, latents=noise()), atol=0, rtol=0)


@pytest.mark.parametrize("scale", [9.0, 1.0])
def test_a_callback_changes_the_guidance_of_the_next_steps(tiny_pipeline, scale):
    def callback(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = scale
        return tensors

    passes = counted_passes(tiny_pipeline)
    drawn = latents_of(tiny_pipeline, latents=noise(), callback_on_step_end=callback)
    assert passes == ([2, 2, 2, 2] if scale == 9 else [2, 2, 1, 1])
    assert tiny_pipeline.guidance_scale == scale
    assert (drawn - latents_of(tiny_pipeline, latents=noise())).abs().max() > 1e-3


def test_a_callback_cannot_guide_without_negative_prompts(tiny_pipeline):
    def callback(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 2.0
        return tensors

    with pytest.raises(ValueError, match="turned guidance on"):
        tiny_pipeline("a cat", guidance_scale=1, callback_on_step_end=callback)


def test_an_interrupt_gives_the_latents_of_its_step(tiny_pipeline):
    kept = []

    def callback(pipeline, step, timestep, tensors):
        kept.append(tensors["latents"])
        pipeline._interrupt = step == 1
        return tensors

    drawn = latents_of(tiny_pipeline, callback_on_step_end=callback, num_inference_steps=6)
    assert len(kept) == 2
    torch.testing.assert_close(drawn, kept[1], atol=0, rtol=0)
    assert len(tiny_pipeline("a cat").images) == 1  # the next call is not interrupted
    assert not tiny_pipeline.interrupt


def test_callback_objects_name_their_own_tensors(tiny_pipeline):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    drawn = latents_of(
        tiny_pipeline, callback_on_step_end=Zero(cutoff_step_ratio=1.0), callback_on_step_end_tensor_inputs=[]
    )
    assert drawn.abs().sum() == 0


# Types


def test_bf16_weights_draw_with_fp32_latents(tiny_pipeline):
    reference = latents_of(tiny_pipeline, latents=noise())
    tiny_pipeline.to(torch.bfloat16)
    assert {parameter.dtype for parameter in tiny_pipeline.model.parameters()} == {torch.bfloat16}
    drawn = latents_of(tiny_pipeline, latents=noise().bfloat16())
    assert drawn.dtype == torch.float32
    assert not torch.equal(drawn, drawn.bfloat16().float())
    assert (drawn - reference).abs().mean() < 0.1 * (reference - noise()).abs().mean()
    images = tiny_pipeline("a cat", output_type="np").images
    assert images.dtype == np.float32
    assert np.isfinite(images).all()


# Saving and loading


def test_a_saved_pipeline_draws_the_same_picture(tiny_pipeline, tmp_path):
    expected = tiny_pipeline("a cat", generator=seeded(), output_type="np").images
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = HydraPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = loaded("a cat", generator=seeded(), output_type="np").images
    # A mapped file aligns the weights otherwise in memory, and then sums round otherwise.
    np.testing.assert_allclose(images, expected, atol=1e-5)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["default_num_inference_steps"], index["default_guidance_scale"]) == (3, 3.0)


def test_a_pipeline_loads_as_bf16_with_other_defaults(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = HydraPipeline.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16}, default_num_inference_steps=2)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.model.dtype == torch.bfloat16
    assert len(loaded("a cat").images) == 1
    assert (loaded.num_timesteps, loaded.guidance_scale) == (2, 3.0)


def test_a_repo_of_the_hub_opens_like_a_folder(hub, tiny_pipeline, tmp_path):
    """In a fresh interpreter and from a server: diffusers' own download refuses our classes only when it is online."""
    tiny_pipeline.save_pretrained(tmp_path / "repo")
    (tmp_path / "repo" / "checkpoint-1").mkdir()
    (tmp_path / "repo" / "checkpoint-1" / "optimizer.bin").write_bytes(b"not part of the pipeline")
    code = """
        import torch, hydra_hf
        pipeline = hydra_hf.HydraPipeline.from_pretrained("owner/hydra")
        torch.save(pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="pt").images, "image.pt")
    """
    HfApi().create_repo("owner/hydra")
    HfApi().upload_folder(repo_id="owner/hydra", folder_path=tmp_path / "repo")
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    subprocess.run([sys.executable, "-c", dedent(code)], cwd=tmp_path, env=os.environ | online, check=True)
    expected = tiny_pipeline("a cat", generator=seeded(), output_type="pt").images
    torch.testing.assert_close(torch.load(tmp_path / "image.pt"), expected, atol=1e-5, rtol=1e-5)
    assert not list((tmp_path / "home").rglob("optimizer.bin"))


@pytest.mark.parametrize("name", ["model_index.json", "model", "processor", "scheduler"])
def test_an_incomplete_folder_says_what_is_missing(tiny_pipeline, tmp_path, name):
    tiny_pipeline.save_pretrained(tmp_path)
    if name == "model_index.json":
        (tmp_path / name).unlink()
    else:
        shutil.rmtree(tmp_path / name)
    with pytest.raises(ValueError, match=rf"no \['{name}'\]"):
        HydraPipeline.from_pretrained(tmp_path)


def test_a_folder_may_lack_the_model_that_the_caller_brings(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "model")
    assert HydraPipeline.from_pretrained(tmp_path, model=tiny_pipeline.model).model is tiny_pipeline.model


def test_a_folder_without_weights_is_refused(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        HydraPipeline.from_pretrained(tmp_path)


def test_a_path_to_nothing_is_no_repo(tmp_path):
    with pytest.raises(ValueError, match="There is no folder .*; a Hub id is owner/name"):
        HydraPipeline.from_pretrained(tmp_path / "nothing")


LORA = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


def test_a_peft_model_draws_and_is_not_saved_until_merged(tiny_pipeline, tmp_path):
    before = latents_of(tiny_pipeline, latents=noise())
    tiny_pipeline.model = peft.get_peft_model(tiny_pipeline.model, LORA)
    adapted = latents_of(tiny_pipeline, latents=noise())
    assert (adapted - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="merge"):
        tiny_pipeline.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()
    tiny_pipeline.model = tiny_pipeline.model.merge_and_unload()
    tiny_pipeline.save_pretrained(tmp_path / "merged")
    loaded = HydraPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(latents_of(loaded, latents=noise()), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter of this transformers needs peft {MIN_PEFT_VERSION}",
)
def test_a_model_with_adapters_of_its_own_is_not_saved(tiny_pipeline, tmp_path):
    tiny_pipeline.model.add_adapter(LORA)
    with pytest.raises(ValueError, match="merge"):
        tiny_pipeline.save_pretrained(tmp_path)


# Wrong arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": None}, "prompt=None, expected a string"),
        ({"prompt": []}, r"prompt=\[\], expected a string or a list of at least one"),
        ({"prompt": [3]}, r"prompt=\[3\], expected a string"),
        ({"prompt": {"a": 1}}, "expected a string or a list"),
        ({"negative_prompt": ["", ""]}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": [None]}, r"negative_prompt=\[None\], expected a string"),
        ({"negative_prompt": 3}, "negative_prompt=3, expected a string"),
        ({"height": 30}, "height=30, expected a positive multiple of the patch size 8"),
        ({"height": 0}, "height=0, expected a positive multiple"),
        ({"width": -8}, "width=-8, expected a positive multiple"),
        ({"width": 32.0}, "width=32.0, expected a positive multiple"),
        ({"latents": torch.zeros(1, 4, 4, 5)}, r"shape \(1, 4, 4, 5\), expected \(1, 4, 4, 4\)"),
        ({"latents": torch.zeros(2, *SHAPE)}, r"shape \(2, 4, 4, 4\), expected \(1, 4, 4, 4\)"),
        ({"latents": torch.zeros(1, *SHAPE), "height": 16}, r"expected \(1, 4, 2, 4\)"),
        ({"generator": [seeded(), seeded()]}, "2 as generator, expected one, or one for each of 1 images"),
        ({"generator": [seeded()], "num_images_per_prompt": 2}, "1 as generator, expected one, or one for each of 2"),
        ({"num_inference_steps": 0}, "num_inference_steps=0, expected an integer of at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5, expected an integer"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0, expected an integer of at least 1"),
        ({"max_sequence_length": 0}, "max_sequence_length=0, expected an integer of at least 1"),
        ({"output_type": "jpeg"}, "output_type='jpeg', expected 'pil', 'np', 'pt' or 'latent'"),
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval=\(0.8, 0.2\), expected \(low, high\)"),
        ({"guidance_interval": (0, 1000)}, "expected .low, high. with 0 <= low <= high <= 1"),
        ({"guidance_interval": (0.5,)}, "expected .low, high."),
        ({"guidance_interval": None}, "guidance_interval=None, expected .low, high."),
        ({"callback_on_step_end_tensor_inputs": ["sigmas"]}, r"'sigmas' in callback.* expected some of \['latents'\]"),
        ({"prompt": "very long " * 40}, r"prompt of \d+ tokens .* expected at most 111: the context has 128"),
        ({"negative_prompt": "very long " * 40}, "expected at most 111"),
        ({"max_sequence_length": 5}, "expected at most 5"),
        (
            {"height": 320, "width": 320},
            "1600 tokens, expected at most 118: .* largest square that fits is 80x80 pixels",
        ),
    ],
)
def test_a_wrong_argument_is_named(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**{"prompt": "a cat", **arguments})


def test_the_empty_prompt_is_legal(tiny_pipeline):
    assert len(tiny_pipeline("").images) == 1


def test_a_scheduler_that_shifts_again_is_refused(tiny_pipeline):
    tiny_pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="shift=3.0"):
        tiny_pipeline("a cat")
