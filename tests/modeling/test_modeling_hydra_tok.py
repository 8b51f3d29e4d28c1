import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny import PATCH, flow_decoder_config, gaussian, hydra_model, pictures, randomized, tok_config, tok_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2Model

from hydra_hf import (
    HydraTokConfig,
    HydraTokForPreTraining,
    HydraTokModel,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
)
from hydra_hf.modeling.compat import enable_checkpointing
from hydra_hf.modeling.flow import add_noise, predict_clean
from hydra_hf.modeling.grid import latents_to_tokens, patchify, unpatchify
from hydra_hf.modeling.layers import ZeroLinear


def vit_decoder_config() -> PixelViTDecoderConfig:
    return PixelViTDecoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=PATCH
    )


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def dirty_the_allocator():
    """Fills freed memory, so that a buffer nobody wrote does not come back as zeros by luck."""
    for size in (6, 24, 64, 576, 4096):
        blocks = [torch.full((size,), -4e19) for _ in range(200)]
        del blocks


# The ViT


def test_the_internvit_preset_has_the_parameters_of_internvit():
    with torch.device("meta"):
        model = HydraTokModel(HydraTokConfig.internvit_300m())
    halves = [*model.gen_vit.parameters(), *model.sem_vit.layers.parameters()]
    assert sum(parameter.numel() for parameter in halves) == 304_012_288
    assert len(model.gen_vit.layers) == len(model.sem_vit.layers) == 12


def internvit() -> InternVLVisionModel:
    config = tok_config()
    torch.manual_seed(0)
    model = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            image_size=[config.image_size] * 2,
            patch_size=[PATCH] * 2,
            layer_norm_eps=config.layer_norm_eps,
            attention_bias=True,
            norm_type="layer_norm",
            use_mean_pooling=True,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


INTERNVL_NAMES = {
    "patch_embeddings.projection": "projection",
    "attention.projection_layer": "attention.out_proj",
    "lambda_1": "scale_1.weight",
    "lambda_2": "scale_2.weight",
}


def our_key(key: str) -> str:
    for theirs, ours in INTERNVL_NAMES.items():
        key = key.replace(theirs, ours)
    if key.startswith("embeddings."):
        return f"gen_vit.{key}"
    index, name = key.removeprefix("encoder.layer.").split(".", 1)
    return f"gen_vit.layers.{index}.{name}" if int(index) < 2 else f"sem_vit.layers.{int(index) - 2}.{name}"


def from_internvit(reference: InternVLVisionModel) -> HydraTokModel:
    model = tok_model()
    weights = {our_key(key): value for key, value in reference.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert [key for key in missing if "_vit." in key] == ["sem_vit.position_proj.weight", "sem_vit.position_proj.bias"]
    for parameter in model.sem_vit.position_proj.parameters():  # as `hydra convert` leaves it
        torch.nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("size", [(12, 12), (8, 20), (24, 16)])
def test_the_two_halves_are_internvit_layer_by_layer(size):
    reference = internvit()
    model = from_internvit(reference)
    pixel_values = pictures(2, *size)
    normalized = model.normalize_pixels(pixel_values)
    with torch.no_grad():
        expected = reference(normalized, output_hidden_states=True).hidden_states
        states = model.gen_vit.embeddings(normalized)  # the class token stays, to walk the whole ViT
        torch.testing.assert_close(states, expected[0], atol=1e-5, rtol=1e-5)
        for layer, reference_states in zip([*model.gen_vit.layers, *model.sem_vit.layers], expected[1:], strict=True):
            states = layer(states)
            torch.testing.assert_close(states, reference_states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.gen_vit(normalized), expected[2][:, 1:], atol=1e-5, rtol=1e-5)
        states = patches = expected[2][:, 1:]
        for layer in model.sem_vit.layers:
            states = layer(states)
        torch.testing.assert_close(
            model.sem_vit(patches, [model.get_grid(pixel_values)]), states
        )  # positions start at zero


@pytest.mark.parametrize("use_cls_token", [True, False])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (4, 4), (8, 20), (20, 8)])
def test_any_height_and_width_of_whole_patches_run(height, width, use_cls_token):
    model = tok_model(use_cls_token=use_cls_token)
    pixel_values = pictures(2, height, width)
    output = model(pixel_values)
    grid = (height // PATCH, width // PATCH)
    assert output.last_hidden_state.shape == (2, grid[0] * grid[1], 24)
    assert output.latents.shape == (2, 6, *grid)
    assert model.decode(output.latents).sample.shape == pixel_values.shape


def test_interpolated_positions_keep_the_direction_of_the_axes():
    model = tok_model()
    embeddings = model.gen_vit.embeddings
    with torch.no_grad():
        ramp = torch.arange(3.0).view(3, 1, 1).expand(3, 3, 24)  # grows with the row only
        embeddings.position_embeddings[:, 1:] = ramp.flatten(0, 1)
    table = embeddings.interpolate_positions((1, 2, 5))[0, 1:, 0].view(2, 5)
    assert (table[1] > table[0]).all()
    torch.testing.assert_close(table, table[:, :1].expand(2, 5))


# What forward gives


def test_hidden_states_are_the_embeddings_and_every_layer():
    model = tok_model()
    output = model(pictures(2), output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert [len(state[0]) for state in states] == [5, 5, 5, 4, 4]  # Gen-ViT's with the class token
    assert torch.equal(states[0], model.gen_vit.embeddings(model.normalize_pixels(pictures(2))))
    assert torch.equal(states[-1], output.last_hidden_state)


@pytest.mark.parametrize(("selection", "kept"), [([1, 3], [1, 3]), ([-1], [4]), ([0, -2], [0, 3]), (2, [2])])
def test_output_hidden_states_selects_layers(selection, kept):
    model = tok_model()
    every = model(pictures(2), output_hidden_states=True).hidden_states
    selected = model(pictures(2), output_hidden_states=selection).hidden_states
    assert [index for index, state in enumerate(selected) if state is not None] == kept
    for index in kept:
        assert torch.equal(selected[index], every[index])


def test_output_attentions_has_one_map_for_each_layer_of_the_vit():
    config = tok_config()
    config._attn_implementation = "eager"
    attentions = HydraTokModel(config).eval()(pictures(2), output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(2, 3, 5, 5)] * 2 + [(2, 3, 4, 4)] * 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 3, 5))


def test_sdpa_gives_the_eager_result_in_the_whole_model():
    sdpa = tok_model()
    config = tok_config()
    config._attn_implementation = "eager"
    eager = HydraTokModel(config).eval()
    eager.load_state_dict(sdpa.state_dict())
    assert {eager.config._attn_implementation, eager.pixel_decoder.config._attn_implementation} == {"eager"}
    a, b = (model(pictures(2, 8, 12)) for model in (sdpa, eager))
    torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, atol=1e-5, rtol=1e-5)
    noise = gaussian(2, 3, 8, 12)
    a, b = (model.decode(a.latents, noise=noise).sample for model in (sdpa, eager))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = HydraTokForPreTraining(tok_config())
        randomized(model).load_state_dict({f"model.{key}": value for key, value in tok_model().state_dict().items()})
        model.train()
        if checkpointing:
            enable_checkpointing(model)
        output = model(pictures(2), gaussian(2, 4, 6), gaussian(2, 4, 48), torch.tensor([0.3, 0.9]))
        (output.clean_pixel_values.square().mean() + output.bottleneck_states.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["model.gen_vit.layers.0.mlp.fc1.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_return_dict_false_gives_tuples():
    model = tok_model()
    output = model(pictures(1))
    assert torch.equal(model(pictures(1), return_dict=False)[0], output.last_hidden_state)
    (latent_dist,) = model.encode(pictures(1), return_dict=False)
    assert torch.equal(latent_dist.mode(), output.latents)
    noise = gaussian(1, 3, 8, 8)
    (sample,) = model.decode(output.latents, return_dict=False, noise=noise)
    assert torch.equal(sample, model.decode(output.latents, noise=noise).sample)


# Encoding and decoding


def test_encode_gives_the_posterior_in_both_spellings_of_diffusers():
    model = tok_model()
    output, encoded = model(pictures(2, 8, 12)), model.encode(pictures(2, 8, 12))
    assert torch.equal(encoded.latent, encoded.latent_dist.mode())
    assert torch.equal(encoded.latent, output.latents)
    torch.testing.assert_close(latents_to_tokens(encoded.latent_dist.std), (0.5 * output.logvar).exp())
    draws = [encoded.latent_dist.sample(torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], encoded.latent)


def set_statistics(model: HydraTokModel) -> tuple[Tensor, Tensor]:
    mean, std = gaussian(6, seed=7), gaussian(6, seed=8).exp()
    model.set_latents_statistics(mean, std)
    return mean[:, None, None], std[:, None, None]


def test_statistics_normalise_what_encode_gives():
    model = tok_model()
    before = model.encode(pictures(2)).latent_dist
    mean, std = set_statistics(model)
    after = model.encode(pictures(2)).latent_dist
    torch.testing.assert_close(after.mean, (before.mean - mean) / std)
    torch.testing.assert_close(after.std, before.std / std)
    torch.testing.assert_close(model(pictures(2)).latents, after.mean)


def test_statistics_change_neither_the_reconstruction_nor_the_semantic_states():
    model = tok_model()
    noise = gaussian(2, 3, 8, 8)

    def paths():
        latents = model.encode(pictures(2)).latent
        return model.decode(latents, noise=noise).sample, model.get_semantic_states(latents)

    before = paths()
    set_statistics(model)
    for now, then in zip(paths(), before):
        torch.testing.assert_close(now, then, atol=1e-4, rtol=1e-4)


def test_measured_statistics_give_latents_of_unit_variance_and_leave_a_dead_channel_quiet():
    model = tok_model()
    with torch.no_grad():
        model.bottleneck.down_proj.weight[0] = 0  # the mean of channel 0 is constant, its sampled variance is not
    posterior = model.encode(pictures(64)).latent_dist
    samples = posterior.sample(torch.Generator().manual_seed(0))
    model.set_latents_statistics(samples.mean((0, 2, 3)), samples.std((0, 2, 3)))
    normalised = model.encode(pictures(64)).latent_dist
    draws = normalised.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean((0, 2, 3)), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(draws.std((0, 2, 3)), torch.ones(6), atol=1e-3, rtol=0)
    assert normalised.mode()[:, 0].abs().max() < 1


def test_semantic_states_of_clean_latents_are_those_of_forward():
    model = tok_model()
    set_statistics(model)
    output = model(pictures(2, 8, 12))
    torch.testing.assert_close(
        model.get_semantic_states(output.latents), output.last_hidden_state, atol=1e-5, rtol=1e-5
    )


def test_the_generator_decides_the_noise_of_the_decoder():
    model = tok_model()
    latents = gaussian(2, 6, 2, 3)
    samples = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        samples.append(model.decode(latents, generator=torch.Generator().manual_seed(3)).sample)
    assert torch.equal(*samples)
    assert not torch.equal(samples[0], model.decode(latents, generator=torch.Generator().manual_seed(4)).sample)


def test_a_list_of_generators_decodes_each_picture_as_alone():
    model = tok_model()
    latents = gaussian(2, 6, 2, 3)
    together = model.decode(latents, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)]).sample
    for index in (0, 1):
        alone = model.decode(latents[index : index + 1], generator=torch.Generator().manual_seed(index)).sample
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_noise_is_given_in_the_shape_of_the_picture():
    model = tok_model(decoder_config=flow_decoder_config(prediction_type="velocity"))
    with torch.no_grad():
        for module in model.pixel_decoder.modules():
            if isinstance(module, ZeroLinear):
                module.weight.zero_(), module.bias.zero_()
    noise = gaussian(1, 3, 8, 12)  # a velocity of zero leaves it as it is
    sample = model.decode(gaussian(1, 6, 2, 3), noise=noise).sample
    torch.testing.assert_close(sample, model.denormalize_pixels(noise))


def test_pixels_are_normalised_to_the_statistics_of_the_vit_and_back():
    model = tok_model()
    white = torch.ones(1, 3, 4, 4)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(model.normalize_pixels(white)[0, :, 0, 0], expected)
    torch.testing.assert_close(model.denormalize_pixels(model.normalize_pixels(pictures(1))), pictures(1))


def test_the_class_token_does_not_reach_past_the_bottleneck():
    model = tok_model()
    latents = model.encode(pictures(1)).latent
    before = model.get_semantic_states(latents)
    with torch.no_grad():
        model.gen_vit.embeddings.cls_token += 1
    assert torch.equal(model.get_semantic_states(latents), before)
    assert not torch.equal(model.encode(pictures(1)).latent, latents)


# As the autoencoder of diffusers


def test_a_stock_diffusers_pipeline_samples_saves_and_reloads_with_it(tmp_path):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=6, out_channels=12, num_layers=1, sample_size=2,
        patch_size=1, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    pipeline = DiTPipeline(transformer=transformer, vae=tok_model(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)  # DiTPipeline decodes without a generator
        return pipe(class_labels=[1], num_inference_steps=2, generator=generator, output_type="np").images

    images = draw(pipeline)
    assert images.shape == (1, 8, 8, 3)
    pipeline.save_pretrained(tmp_path)
    reloaded = DiTPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert isinstance(reloaded.vae, HydraTokModel)
    np.testing.assert_allclose(draw(reloaded), images, atol=1e-6)


# Saving and loading


@pytest.mark.parametrize("decoder", [flow_decoder_config, vit_decoder_config, lambda: None])
def test_every_parameter_and_buffer_survives_saving(tmp_path, decoder):
    model = tok_model(decoder_config=decoder(), use_post_layernorm=True)
    set_statistics(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    dirty_the_allocator()
    reloaded, info = HydraTokModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(reloaded, model)
    assert not reloaded.training


@pytest.mark.parametrize("decoder", [flow_decoder_config, vit_decoder_config, lambda: None])
def test_a_config_survives_saving(tmp_path, decoder):
    config = tok_config(decoder_config=decoder(), use_post_layernorm=True, layer_scale_init_value=None)
    config.save_pretrained(tmp_path)
    reloaded = HydraTokConfig.from_pretrained(tmp_path)
    assert {**reloaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(reloaded.decoder_config) is type(config.decoder_config)


def test_the_auto_classes_open_a_saved_tokenizer(tmp_path):
    model = tok_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HydraTokConfig
    assert type(AutoConfig.from_pretrained(tmp_path).decoder_config) is PixelFlowDecoderConfig
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert type(reloaded) is HydraTokModel
    assert_same_weights(reloaded, model)


def test_a_hydra_checkpoint_opens_as_its_vision_tower(tmp_path):
    hydra = hydra_model()
    set_statistics(hydra.model.vision_tower)
    hydra.save_pretrained(tmp_path)
    dirty_the_allocator()
    assert_same_weights(HydraTokModel.from_pretrained(tmp_path), hydra.model.vision_tower)


def test_training_starts_from_a_saved_tokenizer_and_saves_one(tmp_path):
    model = tok_model()
    model.save_pretrained(tmp_path)
    training = HydraTokForPreTraining.from_pretrained(tmp_path)
    assert_same_weights(training.model, model)
    training.save_pretrained(tmp_path / "training")
    assert_same_weights(HydraTokModel.from_pretrained(tmp_path / "training"), model)


@pytest.mark.parametrize("cls", [HydraTokModel, HydraTokForPreTraining])
def test_an_unrelated_checkpoint_is_refused(tmp_path, cls):
    text_config = Qwen2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=8
    )
    Qwen2Model(text_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"do not fit the config of {cls.__name__}: .* missing, .*embed_tokens"):
        cls.from_pretrained(tmp_path, config=tok_config())


def test_zero_starts_survive_post_init_and_saving(tmp_path):
    fresh = HydraTokModel(tok_config())
    fresh.save_pretrained(tmp_path)
    dirty_the_allocator()
    for model in (fresh, HydraTokModel.from_pretrained(tmp_path)):
        zeros = [module for module in model.modules() if isinstance(module, ZeroLinear)]
        assert len(zeros) == 5  # Sem-ViT's positions, two blocks, the last norm, the output
        assert not any(module.weight.any() or module.bias.any() for module in zeros)


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path):
    tok_model(decoder_config=None).save_pretrained(tmp_path)
    dirty_the_allocator()
    model = HydraTokModel.from_pretrained(tmp_path, config=tok_config(), ignore_mismatched_sizes=True)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() < 10, name
    assert not model.pixel_decoder.out_proj.weight.any()
    assert (model.pixel_decoder.global_layers[0].scale_1.weight == 1).all()


def test_statistics_that_a_checkpoint_lacks_are_the_identity(tmp_path):
    model = tok_model()
    weights = {key: value for key, value in model.state_dict().items() if "latents_" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    dirty_the_allocator()
    reloaded, info = HydraTokModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"bottleneck.latents_mean", "bottleneck.latents_std"}
    assert_same_weights(reloaded, model)


# Training


def test_the_training_forward_reconstructs_through_the_flow():
    model = randomized(HydraTokForPreTraining(tok_config())).eval()
    pixel_values, sigma, noise = pictures(2, 8, 12), torch.tensor([0.3, 1.0]), gaussian(2, 6, 48)
    output = model(pixel_values, gaussian(2, 6, 6), noise, sigma)
    patches = patchify(model.model.normalize_pixels(pixel_values), PATCH)
    torch.testing.assert_close(output.velocity_target, noise - patches)
    clean = predict_clean(add_noise(patches, noise, sigma), output.velocity, sigma)
    torch.testing.assert_close(
        output.clean_pixel_values, model.model.denormalize_pixels(unpatchify(clean, PATCH, (1, 2, 3)))
    )
    assert output.mean.shape == output.logvar.shape == (2, 6, 6)
    assert output.gen_states.shape == output.bottleneck_states.shape == (2, 6, 24)


def test_one_step_of_training_at_sigma_1_is_decode_of_the_mean():
    model = randomized(HydraTokForPreTraining(tok_config())).eval()
    noise = gaussian(2, 3, 8, 12)
    output = model(pictures(2, 8, 12), torch.zeros(2, 6, 6), patchify(noise, PATCH), torch.ones(2))
    tokenizer = model.model
    sample = tokenizer.decode(tokenizer.encode(pictures(2, 8, 12)).latent, noise=noise, num_inference_steps=1).sample
    torch.testing.assert_close(output.clean_pixel_values, sample, atol=1e-5, rtol=1e-5)


def test_the_training_forward_needs_no_noise_of_pixels_with_the_vit_decoder():
    model = HydraTokForPreTraining(tok_config(decoder_config=vit_decoder_config())).eval()
    output = model(pictures(2, 8, 12), torch.zeros(2, 6, 6))
    assert output.velocity is None
    assert output.velocity_target is None
    tokenizer = model.model
    sample = tokenizer.decode(tokenizer.encode(pictures(2, 8, 12)).latent).sample
    torch.testing.assert_close(output.clean_pixel_values, sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", [flow_decoder_config, vit_decoder_config])
def test_training_reaches_every_parameter_of_the_reconstruction(decoder):
    model = randomized(HydraTokForPreTraining(tok_config(decoder_config=decoder()))).train()
    output = model(pictures(2), gaussian(2, 4, 6), gaussian(2, 4, 48), torch.tensor([0.3, 1.0]))
    output.clean_pixel_values.square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert {name for name in without if "sem_vit" not in name} == {
        "model.bottleneck.semantic_up_proj.weight",
        "model.bottleneck.semantic_up_proj.bias",
    }


# Types and errors


@pytest.mark.parametrize("decoder", [flow_decoder_config, vit_decoder_config])
def test_bf16_weights_run_end_to_end(tmp_path, decoder):
    tok_model(decoder_config=decoder()).save_pretrained(tmp_path)
    model = HydraTokModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    full = HydraTokModel.from_pretrained(tmp_path)
    pixel_values, noise = pictures(2, 8, 12), gaussian(2, 3, 8, 12)
    assert model.dtype == torch.bfloat16
    for pixels in (pixel_values, pixel_values.bfloat16()):
        latents = model.encode(pixels).latent
        sample = model.decode(latents, noise=noise).sample
        assert sample.dtype == latents.dtype
        expected = full.decode(full.encode(pixel_values).latent, noise=noise).sample
        assert (sample.float() - expected).abs().mean() < 0.1 * expected.std()
    training = HydraTokForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = training(pixel_values, gaussian(2, 6, 6), gaussian(2, 6, 48), torch.tensor([0.5, 1.0]))
    assert torch.isfinite(output.clean_pixel_values).all()


BAD_PIXELS = {
    "rank": (torch.zeros(3, 8, 8), r"\(3, 8, 8\).*\(B, 3, H, W\)"),
    "uint8": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8.*must be floats"),
    "channels": (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\).*\(B, 3, H, W\)"),
    "height": (torch.zeros(1, 3, 9, 8), "height=9.*multiples of the patch size 4"),
    "width": (torch.zeros(1, 3, 8, 6), "width=6.*multiples of the patch size 4"),
    "empty": (torch.zeros(1, 3, 0, 8), "height=0"),
    "none": (torch.zeros(0, 3, 8, 8), "no image"),
}


@pytest.mark.parametrize("name", BAD_PIXELS)
def test_pixels_that_are_no_batch_of_pictures_are_refused(name):
    pixel_values, message = BAD_PIXELS[name]
    model = tok_model()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=message):
            call(pixel_values)


@pytest.mark.parametrize("scale", [255.0, 2.0])
def test_pixels_outside_their_range_are_refused(scale):
    with pytest.raises(ValueError, match=r"range from .* expected pixels in \[-1, 1\]"):
        tok_model().encode(scale * torch.ones(1, 3, 8, 8))


def test_a_tokenizer_without_decoder_refuses_to_decode():
    with pytest.raises(ValueError, match="no pixel decoder"):
        tok_model(decoder_config=None).decode(gaussian(1, 6, 2, 2))


@pytest.mark.parametrize("shape", [(1, 5, 2, 2), (6, 2, 2), (1, 4, 6)])
def test_latents_of_another_shape_are_refused(shape):
    model = tok_model()
    for call in (model.decode, model.get_semantic_states):
        with pytest.raises(ValueError, match=r"latents \(.*must be \(B, 6, h, w\)"):
            call(gaussian(*shape))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise \(1, 3, 8, 8\) must be \(1, 3, 8, 12\)"):
        tok_model().decode(gaussian(1, 6, 2, 3), noise=gaussian(1, 3, 8, 8))


def test_no_steps_of_decoding_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        tok_model().decode(gaussian(1, 6, 2, 3), num_inference_steps=0)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(5), torch.ones(6), r"mean \(5,\)"),
        (torch.zeros(6), torch.zeros(6), "std must be positive"),
        (torch.zeros(6), torch.full((6,), torch.nan), "finite"),
        (torch.full((6,), torch.inf), torch.ones(6), "finite"),
    ],
)
def test_statistics_that_would_break_the_latents_are_refused(mean, std, message):
    model = tok_model()
    with pytest.raises(ValueError, match=message):
        model.set_latents_statistics(mean, std)
    assert (model.bottleneck.latents_std == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 25}, "vision_config: hidden_size=25"),
        ({"image_size": 13}, "self.image_size=13 must be a multiple"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"hidden_act": "gleu"}, "hidden_act='gleu' must be one of"),
        ({"image_mean": [0.5]}, "must have self.num_channels=3 numbers"),
        ({"decoder_config": PixelFlowDecoderConfig()}, "decoder_config.patch_size=14 of the decoder"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(Exception, match=message) as error:
        tok_config(**changes)
    assert isinstance(error.value.__cause__ or error.value, ValueError)


def test_an_unknown_decoder_size_is_refused():
    with pytest.raises(ValueError, match="decoder='XL' must be one of"):
        HydraTokConfig.internvit_300m("XL")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "must be 'velocity' or 'sample'"),
        ({"num_inference_steps": 0}, "must be at least 1"),
        ({"hidden_size": 18}, "must be a multiple of 4"),
    ],
)
def test_a_decoder_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(Exception, match=message):
        flow_decoder_config(**changes)
