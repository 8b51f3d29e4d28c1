"""Nothing is left on the CPU when the model is elsewhere, and the second device computes what the CPU computes."""

import pytest
import torch
from PIL import Image
from second_device import SECOND, SecondDevice, SecondDeviceTensor, to_second_device
from tiny import START, gaussian, hydra_model, left_padded, pictures, sequence, tok_model

from hydra_hf.modeling.image_generation import classifier_free
from hydra_hf.pipelines.answering import answer
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.pipelines.pipeline_hydra_reconstruction import HydraReconstructionPipeline


def on_both(compute, model) -> tuple[torch.Tensor, torch.Tensor]:
    """What `compute(model, device)` gives on the CPU, and on the second device."""
    with torch.no_grad():
        expected = compute(model, torch.device("cpu"))
        with SecondDevice():
            result = compute(to_second_device(model), SECOND)
            assert isinstance(result, SecondDeviceTensor)
            return expected, result.cpu()


def question(device) -> dict[str, torch.Tensor]:
    inputs = left_padded([sequence(1, "image", 2, 3), sequence("image", 4)])
    return {name: value.to(device) for name, value in inputs.items()} | {"pixel_values": pictures(2).to(device)}


def forward(model, device):
    return model(**question(device)).logits


def train(model, device):
    ids = question(device)
    ids.pop("pixel_values")
    outputs = model(
        **ids, labels=ids["input_ids"], latents=gaussian(2, 6, 2, 2).to(device), sigma=torch.tensor([0.3, 0.7]).to(device),
        is_generated=torch.tensor([True, False]).to(device), velocity_target=gaussian(1, 6, 2, 2).to(device),
    )  # fmt: skip
    return outputs.loss


def generate(model, device):
    return model.generate(**question(device), max_new_tokens=3, do_sample=False)


def generate_image(model, device):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]]).to(device)
    generator = torch.Generator().manual_seed(0)  # of the CPU, as everywhere in diffusers
    return model.generate(ids, generation_mode="image", num_inference_steps=2, guidance_scale=2.0, generator=generator)


def denoise(model, device):
    branches = [[1, 2, 3, START], [START]], [[START], [5, START]]
    prefixes = [
        model.prefill(**{name: value.to(device) for name, value in left_padded(rows).items()}) for rows in branches
    ]
    sigma = torch.tensor([0.7, 0.2]).to(device)
    return model.denoise_step(gaussian(2, 6, 2, 2).to(device), sigma, classifier_free(*prefixes, 3.0), 0.5)


@pytest.mark.parametrize("compute", [forward, train, generate, generate_image, denoise], ids=lambda f: f.__name__)
def test_hydra_leaves_nothing_on_the_cpu(compute):
    expected, result = on_both(compute, hydra_model())
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_leaves_nothing_on_the_cpu():
    def compute(model, device):
        latents = model.encode(pictures(2).to(device)).latent
        states = model.get_semantic_states(latents)
        assert states.device == model(pictures(2).to(device)).last_hidden_state.device
        return model.decode(latents, generator=torch.Generator().manual_seed(0)).sample

    expected, result = on_both(compute, tok_model())
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_a_pipeline_leaves_nothing_on_the_cpu(tiny_pipeline, monkeypatch):
    def draw(device) -> torch.Tensor:
        monkeypatch.setattr(HydraPipeline, "_execution_device", device)
        generator = torch.Generator().manual_seed(0)
        options = {"guidance_rescale": 0.5, "num_images_per_prompt": 2, "output_type": "pt"}
        return tiny_pipeline(["a cat", "two dogs"], generator=generator, **options).images

    expected = draw(torch.device("cpu"))
    with SecondDevice():
        to_second_device(tiny_pipeline.model)
        images = draw(SECOND)
        assert isinstance(images, SecondDeviceTensor)
    torch.testing.assert_close(images.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_reconstruction_leaves_nothing_on_the_cpu(tiny_pipeline, monkeypatch):
    parts = tiny_pipeline.model.model.vision_tower, tiny_pipeline.processor.image_processor
    pipeline, image = HydraReconstructionPipeline(*parts), Image.new("RGB", (32, 32), "orange")

    def draw(device) -> torch.Tensor:
        monkeypatch.setattr(HydraReconstructionPipeline, "_execution_device", device)
        return pipeline(image, generator=torch.Generator().manual_seed(0), output_type="pt").images

    expected = draw(torch.device("cpu"))
    with SecondDevice():
        to_second_device(pipeline.vision_tower)
        images = draw(SECOND)
    torch.testing.assert_close(images.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_an_answer_leaves_nothing_on_the_cpu(tiny_pipeline):
    image = Image.new("RGB", (32, 32), "orange")
    arguments = tiny_pipeline.processor, [image] * 2, ["what is in the picture", "a cat"], 4
    expected = answer(tiny_pipeline.model, *arguments)
    with SecondDevice():
        assert answer(to_second_device(tiny_pipeline.model), *arguments) == expected


def test_a_tensor_left_on_the_cpu_is_caught():
    """The fake device would not prove a thing without this."""
    with SecondDevice(), pytest.raises(RuntimeError, match="left on the CPU"):
        to_second_device(hydra_model())(input_ids=torch.tensor([[1, 2]]))
    with SecondDevice(), pytest.raises(RuntimeError, match="generator of the CPU"):
        torch.randn(2, device=SECOND, generator=torch.Generator())


# The real thing


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [forward, train, generate, generate_image, denoise], ids=lambda f: f.__name__)
def test_a_gpu_computes_what_the_cpu_computes(compute):
    model, device = hydra_model(), torch.accelerator.current_accelerator()
    with torch.no_grad():
        expected = compute(model, torch.device("cpu"))
        result = compute(model.to(device), device)
    assert result.device.type == device.type
    torch.testing.assert_close(result.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_a_pipeline_on_a_gpu_draws_the_picture_of_the_cpu(tiny_pipeline):
    def draw() -> torch.Tensor:
        return tiny_pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="pt").images.cpu()

    expected = draw()
    tiny_pipeline.to(torch.accelerator.current_accelerator())
    torch.testing.assert_close(draw(), expected, atol=1e-2, rtol=1e-2)
