"""Every argument of everything public answers a wrong type or number by one clear error that names it."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image

from hydra_hf.pipelines.answering import answer
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.pipelines.pipeline_hydra_reconstruction import HydraReconstructionPipeline


PICTURE = Image.new("RGB", (32, 32), "orange")
NAN = torch.full((1, 4, 4, 4), float("nan"))
ANYTHING = {
    "bool": True, "zero": 0, "minus": -1, "seven": 7, "huge": 2**70, "half": 0.5, "nan": float("nan"), "inf": float("inf"),
    "string": "seven", "empty": "", "surrogate": "\udcff", "bytes": b"seven", "list": [], "ints": [1], "nones": [None],
    "nested": [["a"]], "tuple": ("a", "b"), "dict": {"a": 1}, "set": {1}, "object": object(), "class": int,
    "complex": 1j, "array": np.zeros((1, 4, 4, 4)), "strings": np.array(["a"]), "objects": np.array([None]),
    "tensor": torch.zeros(3), "integers": torch.zeros((1, 4, 4, 4), dtype=torch.int64), "not finite": NAN,
    "generator": torch.Generator(), "generators": [torch.Generator()] * 9, "picture": PICTURE, "function": lambda *args: 5,
    "device": torch.device("cpu"), "none": None,
}  # fmt: skip
RIGHT = {
    "prompt": {"string", "empty", "tuple"},
    "negative_prompt": {"string", "empty", "none"},
    "height": {"none"},
    "width": {"none"},
    "num_inference_steps": {"seven", "none"},
    "guidance_scale": {"zero", "seven", "half", "none"},
    "guidance_interval": set(),
    "guidance_rescale": {"zero", "half"},
    "num_images_per_prompt": {"seven"},
    "generator": {"generator", "none"},
    "latents": {"array", "none"},
    "output_type": set(),
    "return_dict": {"bool"},
    "callback_on_step_end": {"none", "class"},  # int(...) is called with what a callback gets
    "callback_on_step_end_tensor_inputs": {"list", "none"},
    "max_sequence_length": {"huge", "none"},
    "pad_to_multiple_of": {"seven", "none"},
    "image": {"picture", "none"},
    "image_guidance_scale": {"zero", "seven", "half", "none"},
    "num_frames": {"none"},  # of a model that draws images alone
}


@pytest.fixture
def reconstruction(tiny_pipeline) -> HydraReconstructionPipeline:
    return HydraReconstructionPipeline(
        vision_tower=tiny_pipeline.model.model.vision_tower, image_processor=tiny_pipeline.processor.image_processor
    )


def refused(function, name: str, right: set[str] = frozenset(), **arguments) -> None:
    """`function` refuses every wrong value of one argument by an error that names it, and nothing else."""
    for kind, value in ANYTHING.items():
        if kind in right:
            function(**{**arguments, name: value})
            continue
        with pytest.raises(ValueError) as error:
            function(**{**arguments, name: value})
        assert name in str(error.value), (kind, error.value)
        assert len(str(error.value)) < 400, kind


def test_every_argument_of_a_call_is_tried():
    assert set(inspect.signature(HydraPipeline.__call__).parameters) - {"self"} == set(RIGHT)


@pytest.mark.parametrize("name", [name for name in RIGHT if name != "callback_on_step_end"])
def test_drawing_names_a_wrong_argument(tiny_pipeline, name):
    arguments = {"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    refused(tiny_pipeline, name, RIGHT[name], **arguments)


def test_drawing_names_a_callback_that_cannot_be_called_or_gives_no_dict(tiny_pipeline):
    for value in ANYTHING.values():
        for callback in (value, lambda *args, value=value: value):
            if callback is None or (callable(callback) and (value is None or isinstance(value, dict))):
                continue
            with pytest.raises((ValueError, TypeError), match="callback_on_step_end|int\\(\\)"):
                tiny_pipeline("a cat", num_inference_steps=1, guidance_scale=1.0, callback_on_step_end=callback)


def test_latents_of_a_callback_are_looked_at(tiny_pipeline):
    for latents in (NAN, torch.zeros(1, 4, 4, 5), 5, "a", None):
        with pytest.raises(ValueError, match="latents from callback_on_step_end"):
            tiny_pipeline("a cat", callback_on_step_end=lambda *args, value=latents: {"latents": value})


def test_drawing_takes_numbers_of_numpy(tiny_pipeline):
    plain = {"height": 16, "width": 48, "num_inference_steps": 2, "guidance_scale": 2.0, "guidance_rescale": 0.5,
             "num_images_per_prompt": 2, "max_sequence_length": 40, "pad_to_multiple_of": 8}  # fmt: skip
    numpy = {name: np.int64(value) if isinstance(value, int) else np.float32(value) for name, value in plain.items()}
    noise = torch.randn(2, 4, 2, 6, generator=torch.Generator().manual_seed(0))
    images = [
        tiny_pipeline("a cat", output_type="latent", latents=latents, **options).images
        for options, latents in ((plain, noise), (numpy, noise.numpy()))
    ]
    assert torch.equal(*images)


def test_a_callback_that_gives_nothing_changes_nothing(tiny_pipeline):
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    images = [
        tiny_pipeline("a cat", output_type="latent", latents=noise, callback_on_step_end=callback).images
        for callback in (None, lambda *args: None)
    ]
    assert torch.equal(*images)


def test_a_seed_as_generator_says_how_to_make_one(tiny_pipeline):
    for seed in (42, [42]):
        with pytest.raises(ValueError, match=r"generator=.*42.*, expected .*torch.Generator\(\).manual_seed\(seed\)"):
            tiny_pipeline("a cat", generator=seed)


def test_a_tuple_of_generators_is_a_list_of_them(tiny_pipeline):
    def draw(kind) -> torch.Tensor:
        generators = kind(torch.Generator().manual_seed(seed) for seed in (1, 2))
        return tiny_pipeline(["a cat", "a dog"], generator=generators, output_type="pt").images

    assert torch.equal(draw(tuple), draw(list))


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler as scheduler, expected a FlowMatchEuler"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "shift_terminal=0.1, expected shift_terminal=None"),
        (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas=True, expected"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True, expected"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True, expected"),
        (None, "NoneType as scheduler"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(tiny_pipeline, scheduler, message):
    tiny_pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        tiny_pipeline("a cat")


def test_a_scheduler_whose_shift_was_set_later_is_refused(tiny_pipeline):
    tiny_pipeline.scheduler.set_shift(3.0)
    with pytest.raises(ValueError, match="shift=3.0, expected shift=1.0"):
        tiny_pipeline("a cat")


# Stages


@pytest.mark.parametrize("name", ["latents", "generator"])
def test_noise_names_a_wrong_argument(tiny_pipeline, name):
    refused(tiny_pipeline.prepare_latents, name, RIGHT[name], batch_size=1, grid=(1, 4, 4))


def test_a_prefix_names_wrong_texts(tiny_pipeline):
    refused(tiny_pipeline.prepare_prefix, "texts", RIGHT["prompt"], grid=(1, 4, 4))


@pytest.mark.parametrize("name", ["height", "width"])
def test_a_grid_names_a_wrong_size(tiny_pipeline, name):
    refused(tiny_pipeline.get_grid, name, RIGHT[name], **({"height": None, "width": None} | {name: 0}))


def test_decoding_names_a_wrong_argument(tiny_pipeline):
    latents = torch.zeros(1, 4, 4, 4)
    refused(tiny_pipeline.decode, "generator", RIGHT["generator"], latents=latents)
    refused(tiny_pipeline.decode, "output_type", latents=latents)
    refused(tiny_pipeline.decode, "latents")


# Reconstruction


@pytest.mark.parametrize(
    "name, right",
    [
        ("num_inference_steps", RIGHT["num_inference_steps"]),
        ("generator", RIGHT["generator"]),
        ("output_type", set()),
        ("return_dict", {"bool"}),
    ],
)
def test_reconstruction_names_a_wrong_argument(reconstruction, name, right):
    refused(reconstruction, name, right, image=PICTURE)


def test_reconstruction_refuses_what_is_no_image(reconstruction):
    for kind, value in ANYTHING.items():
        if kind not in ("picture", "array", "integers"):
            with pytest.raises((ValueError, TypeError, OSError)):
                reconstruction(value)


# Answers


def test_answering_names_a_wrong_argument(tiny_pipeline):
    right = {"images": [PICTURE], "questions": ["what?"], "max_new_tokens": 1}
    right |= {"model": tiny_pipeline.model, "processor": tiny_pipeline.processor}
    refused(answer, "max_new_tokens", {"seven"}, **right)
    for name in ("questions", "model", "processor"):
        refused(answer, name, **right)
    for value in ANYTHING.values():
        with pytest.raises((ValueError, TypeError), match="image"):
            answer(**{**right, "images": value})


def test_a_question_longer_than_the_context_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="Question 1 takes .* expected at most 96: the context has 128"):
        answer(tiny_pipeline.model, tiny_pipeline.processor, [PICTURE] * 2, ["what?", "what is in the picture? " * 40])


# Models and processors


@pytest.mark.parametrize("name", ["model", "processor", "default_num_inference_steps", "default_guidance_scale"])
def test_a_pipeline_names_a_wrong_part(tiny_pipeline, name):
    right = {"default_num_inference_steps": {"seven"}, "default_guidance_scale": {"zero", "seven", "half"}}
    refused(HydraPipeline, name, right.get(name, set()), **tiny_pipeline.components)


@pytest.mark.parametrize("name", ["vision_tower", "image_processor"])
def test_a_reconstruction_pipeline_names_a_wrong_part(reconstruction, name):
    refused(HydraReconstructionPipeline, name, **reconstruction.components)


def test_saving_and_loading_name_a_wrong_path(tiny_pipeline):
    for value in (5, None, ["a"], 0.5):
        with pytest.raises(ValueError, match="save_directory"):
            tiny_pipeline.save_pretrained(value)
        with pytest.raises(ValueError, match="pretrained_model_name_or_path"):
            HydraPipeline.from_pretrained(value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("image_token_id", 7, "its image_token_id is .*, expected 7"),
        ("vision_start_token_id", 7, "its vision_start_token_id is .*, expected 7"),
        ("vision_end_token_id", 7, "its vision_end_token_id is .*, expected 7"),
        ("null_prompt_ids", [1, 2], r"its null_prompt_ids is .*, expected \[1, 2\]"),
        ("use_time_token", False, "its num_time_tokens is 1, expected 0"),
    ],
)
def test_a_processor_of_another_model_is_refused(tiny_pipeline, field, value, message):
    parts = tiny_pipeline.components
    setattr(parts["model"].config, field, value)
    with pytest.raises(ValueError, match=f"The processor does not belong to the model: {message}"):
        HydraPipeline(**parts)
    with pytest.raises(ValueError, match=f"The processor does not belong to the model: {message}"):
        answer(parts["model"], parts["processor"], [PICTURE], ["what?"])


def test_a_processor_of_more_words_is_refused(tiny_pipeline):
    tiny_pipeline.processor.tokenizer.add_tokens(["zeppelin"])
    with pytest.raises(ValueError, match="its tokenizer has .* tokens, expected at most"):
        HydraPipeline(**tiny_pipeline.components)


def test_a_processor_of_another_patch_size_is_refused(tiny_pipeline, reconstruction):
    tiny_pipeline.processor.patch_size = 4
    with pytest.raises(ValueError, match="its patch_size is 4, expected 8"):
        HydraPipeline(**tiny_pipeline.components)
    reconstruction.image_processor.patch_size = 4
    with pytest.raises(ValueError, match="its patch_size is 4, expected 8"):
        HydraReconstructionPipeline(**reconstruction.components)


# Numbers that are not finite


@pytest.mark.parametrize(
    "part", ["vision_head.out_proj", "model.language_model.norm", "model.vision_tower.sem_vit.layers.0.mlp.fc1"]
)
def test_weights_of_nan_draw_nothing(tiny_pipeline, part):
    tiny_pipeline.model.get_submodule(part).weight.data.fill_(float("nan"))
    for output_type in ("latent", "pil"):
        with pytest.raises(ValueError, match="latents that the model computed are not finite"):
            tiny_pipeline("a cat", output_type=output_type)


def test_a_decoder_of_nan_paints_nothing(tiny_pipeline, reconstruction):
    tiny_pipeline.model.model.vision_tower.pixel_decoder.out_proj.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="images that the model computed are not finite"):
        tiny_pipeline("a cat")
    with pytest.raises(ValueError, match="images that the model computed are not finite"):
        reconstruction(PICTURE)


def test_a_model_of_nan_answers_nothing(tiny_pipeline):
    tiny_pipeline.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits that the model computed are not finite"):
        answer(tiny_pipeline.model, tiny_pipeline.processor, [PICTURE], ["what?"])
