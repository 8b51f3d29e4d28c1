"""bf16 by weights and by autocast: reading, drawing and rebuilding stay near fp32, what is random stays fp32."""

from contextlib import nullcontext

import pytest
import torch
from tiny import IMAGE, START, gaussian, hydra_model, left_padded, pictures, sequence, tok_model
from torch import Tensor, nn

from hydra_hf.modeling.image_generation import classifier_free
from hydra_hf.pipelines.pipeline_hydra_reconstruction import HydraReconstructionPipeline


IMPLEMENTATIONS = ["sdpa", "eager"]


def as_bf16(model: nn.Module, how: str):
    """A context in which the model computes in bf16."""
    if how == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    for tensor in [*model.parameters(), *(model.buffers() if how == "weights" else ())]:
        tensor.data = tensor.data.to(torch.bfloat16)
    return nullcontext()


def error(values: Tensor, expected: Tensor) -> float:
    """Relative to the size of what is expected; infinite for what is not finite."""
    assert values.shape == expected.shape
    difference = (values.float() - expected).norm() / expected.norm()
    return difference.item() if torch.isfinite(values).all() else float("inf")


@pytest.fixture(params=["weights", "parameters", "autocast"])  # "parameters": the statistics of the latents stay fp32
def how(request) -> str:
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request):
    return hydra_model(attn_implementation=request.param)


def question() -> dict[str, Tensor]:
    inputs = left_padded([sequence(1, "image", 2, 3), sequence("image", 4)])
    return {**inputs, "pixel_values": pictures(2)}


@torch.no_grad()
def test_bf16_logits_are_near_those_of_fp32(model, how):
    expected = model(**question()).logits
    with as_bf16(model, how):
        logits = model(**question()).logits
    assert logits.dtype == torch.bfloat16
    assert 0 < error(logits, expected) < 0.05


@torch.no_grad()
def test_bf16_answers_with_the_cache_as_without(model, how):
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with as_bf16(model, how):
        cached, full = (model.generate(**question(), use_cache=use_cache, **options) for use_cache in (True, False))
    assert error(torch.stack(cached.logits[:1]), torch.stack(full.logits[:1]).float()) < 0.05
    assert cached.sequences.shape == full.sequences.shape
    assert torch.isfinite(torch.stack(cached.logits)).all()


@pytest.mark.parametrize("with_image", [False, True])
@torch.no_grad()
def test_a_bf16_step_is_near_that_of_fp32_and_its_velocity_fp32(model, how, with_image):
    part = [START, *[IMAGE] * 5, 2] if with_image else [2]
    branches = [[1, *part, 3, START], [*part, START]], [[4, *part, START], [*part, START]]

    def velocity_of() -> Tensor:
        images = pictures(2) if with_image else None
        prefixes = [model.prefill(**left_padded(rows), pixel_values=images) for rows in branches]
        return model.denoise_step(gaussian(2, 6, 2, 2), torch.tensor([0.7, 0.4]), classifier_free(*prefixes, 2.0), 0.5)

    expected = velocity_of()
    with as_bf16(model, how):
        velocity = velocity_of()
    assert velocity.dtype == torch.float32
    assert 0 < error(velocity, expected) < 0.1


@torch.no_grad()
def test_bf16_draws_by_generate(model, how):
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        return model.generate(
            ids, generation_mode="image", num_inference_steps=3, guidance_scale=2.0, generator=generator
        )

    expected = draw()
    with as_bf16(model, how):
        assert error(draw(), expected) < 0.1


def test_a_bf16_pipeline_keeps_noise_and_scheduler_in_fp32(tiny_pipeline, how):
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.extend([timestep.dtype, pipeline.scheduler.sigmas.dtype, tensors["latents"].dtype])
        return tensors

    prompts, options = ["a cat", "a red circle and two blue squares"], {"guidance_rescale": 0.5}
    expected = tiny_pipeline(prompts, latents=noise, output_type="latent", **options).images
    with as_bf16(tiny_pipeline.model, how):
        drawn = tiny_pipeline(
            prompts, latents=noise, output_type="latent", callback_on_step_end=callback, **options
        ).images
        images = tiny_pipeline(prompts, output_type="pil", **options).images
    assert set(seen) == {torch.float32}
    assert 0 < error(drawn - noise, expected - noise) < 0.1
    assert [image.size for image in images] == [(32, 32)] * 2


def test_a_bf16_pipeline_draws_from_the_same_noise_as_fp32(tiny_pipeline, how):
    draws = [tiny_pipeline.prepare_latents(1, (4, 4), torch.Generator().manual_seed(0))]
    with as_bf16(tiny_pipeline.model, how):
        draws.append(tiny_pipeline.prepare_latents(1, (4, 4), torch.Generator().manual_seed(0)))
    assert torch.equal(*draws)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@torch.no_grad()
def test_the_bf16_tokenizer_is_near_fp32(how, prediction_type):
    model = tok_model()
    model.pixel_decoder.config.prediction_type = prediction_type
    noise = gaussian(2, 3, 8, 8)

    def rebuild() -> list[Tensor]:
        latents = model.encode(pictures(2)).latent_dist.mode()
        return [latents, model.get_semantic_states(latents), model.decode(latents, noise=noise).sample]

    expected = rebuild()
    with as_bf16(model, how):
        values = rebuild()
    assert all(0 < error(value, reference) < 0.1 for value, reference in zip(values, expected))


def test_a_bf16_pipeline_rebuilds_what_fp32_rebuilds(tiny_pipeline, how):
    vision_tower = tiny_pipeline.model.model.vision_tower
    pipeline = HydraReconstructionPipeline(vision_tower, tiny_pipeline.processor.image_processor)
    image = pictures(1, 32, 32)[0]

    def rebuild() -> Tensor:
        return pipeline(image, generator=torch.Generator().manual_seed(0), output_type="pt").images

    expected = rebuild()
    with as_bf16(vision_tower, how):
        images = rebuild()
    assert images.dtype == torch.float32
    assert error(images, expected) < 0.1
