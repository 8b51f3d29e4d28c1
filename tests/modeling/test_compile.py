"""`torch.compile` of the denoising step: the same numbers, and no second graph where none is needed."""

import copy

import pytest
import torch
from tiny import IMAGE, START, gaussian, hydra_config, hydra_model, left_padded, pictures, tok_config
from torch import Tensor
from transformers import AutoConfig

from hydra_hf import HydraForConditionalGeneration
from hydra_hf.modeling.image_generation import GuidanceBranch, ImagePrefix, classifier_free


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class CountingBackend:
    """Runs the captured graph as it is, and counts the graphs."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]):
        self.num_graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


def one_layer_model(text: str = "qwen2") -> HydraForConditionalGeneration:
    """One layer of each kind, since every layer is traced."""
    text_config = {**hydra_config(text).text_config.to_dict(), "num_hidden_layers": 1}
    text_config.pop("layer_types", None)
    head = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return hydra_model(
        text,
        text_config=AutoConfig.for_model(**text_config),
        vision_config=tok_config(num_gen_layers=1, num_sem_layers=1),
        vision_head_config=head,
    )


def step(model, *lengths: int, scale: float | Tensor = 3.0, rescale: float = 0.5, sigma: float = 0.7) -> Tensor:
    """A guided step for prompts of these lengths, each branch left-padded to a multiple of 8."""
    number = len(lengths)
    prefixes = [prefill_in_bucket(model, lengths), prefill_in_bucket(model, [2] * number)]
    branches = classifier_free(*prefixes, scale)
    return model.denoise_step(gaussian(number, 6, 2, 2), torch.full((number,), sigma), branches, rescale)


def prefill_in_bucket(model, lengths) -> ImagePrefix:
    bucket = -(-max(lengths) // 8) * 8
    inputs = left_padded([*([*range(1, length), START] for length in lengths), [START] * bucket])
    return model.prefill(**{name: value[:-1] for name, value in inputs.items()})


@pytest.mark.parametrize("text", ["qwen2", "llama"])
@torch.no_grad()
def test_prompts_of_one_bucket_share_a_graph_that_gives_what_eager_gives(text, backend):
    model = one_layer_model(text)
    lengths = [(3, 5), (4, 8), (8, 2), (7, 7)]
    eager = [step(model, *pair) for pair in lengths]
    model.compile_denoise_step(backend=backend)
    for pair, expected in zip(lengths, eager):
        torch.testing.assert_close(step(model, *pair), expected, **CLOSE)
    assert backend.num_graphs == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_second_bucket_is_a_second_graph_and_a_third_is_not(backend):
    model = one_layer_model()
    eager = [step(model, length) for length in (5, 13, 21, 29)]
    model.compile_denoise_step(backend=backend)
    for length, expected in zip((5, 13, 21, 29), eager):
        torch.testing.assert_close(step(model, length), expected, **CLOSE)
    assert backend.num_graphs == 2  # the second one is for any length


@torch.no_grad()
def test_noise_level_and_guidance_do_not_compile_again(backend):
    model = one_layer_model()
    scales = [3.0, 4.5, 2, torch.tensor(2.5), torch.tensor([6.0]), torch.full((1, 1, 1, 1), 3.5)]
    settings = [{"scale": scale, "rescale": 0.1 * i, "sigma": 1 - 0.1 * i} for i, scale in enumerate(scales)]
    eager = [step(model, 5, **setting) for setting in settings]
    model.compile_denoise_step(backend=backend)
    for setting, expected in zip(settings, eager):
        torch.testing.assert_close(step(model, 5, **setting), expected, **CLOSE)
    assert backend.num_graphs == 1


@torch.no_grad()
def test_a_compiled_step_draws_several_sizes_one_after_the_other(backend):
    model = one_layer_model()
    branches = classifier_free(prefill_in_bucket(model, [5, 3]), prefill_in_bucket(model, [2, 2]), 3.0)
    sizes = [(2, 2), (2, 3), (4, 3), (2, 2)]
    sigma = torch.tensor([0.7, 0.4])
    eager = [model.denoise_step(gaussian(2, 6, *size), sigma, branches) for size in sizes]
    model.compile_denoise_step(backend=backend)
    for size, expected in zip(sizes, eager):
        velocity = model.denoise_step(gaussian(2, 6, *size), sigma, branches)
        torch.testing.assert_close(velocity, expected, **CLOSE)


@torch.no_grad()
def test_a_step_after_a_given_image_compiles(backend):
    model = one_layer_model()
    ids = torch.tensor([[1, START, *[IMAGE] * 5, 2, START]])
    prefix = model.prefill(ids, torch.ones_like(ids), pictures(1))
    latents, sigma = gaussian(1, 6, 2, 2), torch.tensor([0.7])
    expected = model.denoise_step(latents, sigma, [GuidanceBranch(prefix)])
    model.compile_denoise_step(backend=backend)
    torch.testing.assert_close(model.denoise_step(latents, sigma, [GuidanceBranch(prefix)]), expected, **CLOSE)
    assert backend.num_graphs == 1


@torch.no_grad()
def test_a_copy_of_a_compiled_model_draws_with_its_own_weights(backend):
    model = one_layer_model()
    model.compile_denoise_step(backend=backend)
    expected = step(model, 5)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(step(twin, 5), expected, **CLOSE)
    assert (step(model, 5) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_a_backend_of_torch_gives_what_eager_gives():
    torch._dynamo.reset()
    model = one_layer_model()
    expected = step(model, 5, 7)
    model.compile_denoise_step(backend="aot_eager")
    torch.testing.assert_close(step(model, 5, 7), expected, **CLOSE)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_what_eager_gives():
    torch._dynamo.reset()
    model = one_layer_model()
    expected = step(model, 5, 7)
    model.compile_denoise_step()
    torch.testing.assert_close(step(model, 5, 7), expected, **CLOSE)
    torch._dynamo.reset()


def test_a_pipeline_draws_prompts_of_several_lengths_with_one_graph(tiny_pipeline, backend):
    def draw(prompt: str, scale: float, **kwargs) -> Tensor:
        noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        return tiny_pipeline(prompt, latents=noise, guidance_scale=scale, output_type="latent", **kwargs).images

    calls = [("a cat", 3.0), ("a red circle and two blue squares", 4.0), ("", 5.0)]
    eager = [draw(*call) for call in calls]
    tiny_pipeline.model.compile_denoise_step(backend=backend)
    for call, expected in zip(calls, eager):
        torch.testing.assert_close(draw(*call, pad_to_multiple_of=64), expected, **CLOSE)
    assert backend.num_graphs == 1


class TrainingStep(torch.nn.Module):
    """A call with a given and a generated image, as the trainer makes it."""

    def __init__(self, model: HydraForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, latents, sigma, is_generated, target):
        outputs = self.model(
            input_ids=input_ids, labels=labels, latents=latents, sigma=sigma, is_generated=is_generated,
            velocity_target=target, use_cache=False,
        )  # fmt: skip
        return outputs.language_loss, outputs.flow_loss


def training_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[1, START, *[IMAGE] * 5, 2, 3], [4, 5, START, *[IMAGE] * 5, 6]])
    return {
        "input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "latents": gaussian(2, 6, 2, 2),
        "sigma": torch.tensor([0.0, 0.7]), "is_generated": torch.tensor([False, True]), "target": gaussian(1, 6, 2, 2),
    }  # fmt: skip


def understanding_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[1, START, *[IMAGE] * 5, 2], [3, START, *[IMAGE] * 5, 4]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures(2)}


def test_a_training_step_is_one_graph_that_gives_what_eager_gives(backend):
    step, inputs = TrainingStep(one_layer_model()), training_inputs()
    expected = step(**inputs)
    torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(**inputs), expected, **CLOSE)
    swapped = {**inputs, "is_generated": torch.tensor([True, False])}
    torch.testing.assert_close(
        torch.compile(step, backend=backend, fullgraph=True)(**swapped), step(**swapped), **CLOSE
    )
    assert backend.num_graphs == 1


@torch.no_grad()
def test_questions_about_pictures_are_one_graph_that_gives_what_eager_gives(backend):
    model, inputs = one_layer_model(), understanding_inputs()
    expected = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, **CLOSE)
    text = {**inputs, "input_ids": torch.ones_like(inputs["input_ids"]), "pixel_values": None}
    torch.testing.assert_close(
        compiled(**text, use_cache=False).logits, model(**text, use_cache=False).logits, **CLOSE
    )


@torch.no_grad()
def test_the_tokenizer_encodes_in_one_graph(backend):
    model = one_layer_model().model.vision_tower
    compiled = torch.compile(lambda pixels: model.encode(pixels).latent_dist.mean, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(pictures(1)), model.encode(pictures(1)).latent_dist.mean, **CLOSE)


@torch.no_grad()
def test_the_exported_model_answers_as_the_model():
    model, inputs = one_layer_model(), understanding_inputs()
    program = torch.export.export(model, (), {**inputs, "use_cache": False})
    logits = program.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits, **CLOSE)


def test_the_exported_training_step_gives_its_losses():
    step, inputs = TrainingStep(one_layer_model()), training_inputs()
    program = torch.export.export(step, (), inputs)
    torch.testing.assert_close(program.module()(**inputs), step(**inputs), **CLOSE)
