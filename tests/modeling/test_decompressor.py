"""What a video teacher is compared with: made of semantic states, in training alone."""

import pytest
import torch

from hydra_hf.modeling import HydraTokConfig, HydraTokForPreTraining, HydraTokModel, PixelViTDecoderConfig
from hydra_hf.modeling.decompressor import Decompressor


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 16}
CONFIG = HydraTokConfig(
    num_gen_layers=2, num_sem_layers=1, image_size=32, latent_channels=4, temporal_fold_layers=[0, 1],
    decoder_config=PixelViTDecoderConfig(num_hidden_layers=2, temporal_unfold_layers=[1, 2], **SIZES), **SIZES,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> HydraTokForPreTraining:
    torch.manual_seed(0)
    return HydraTokForPreTraining(CONFIG, video_teacher_size=10)


def outputs_of(model, *shape: int):
    pixel_values = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
    num_latent_frames = 1 if len(shape) == 4 else 1 + (shape[2] - 1) // 4
    noise = torch.zeros(shape[0], num_latent_frames * 4, 4)
    return model(pixel_values, latent_noise=noise, distill_layers=())


def test_a_decompressor_at_full_size_has_the_parameters_of_two_stages():
    """Two projections to twice the width, two layers of the ViT, a head as wide as a teacher of 1024."""
    with torch.device("meta"):
        decompressor = Decompressor(HydraTokConfig.siglip2_so400m_video(), 1024)
    width, mlp = 1152, 4304
    layer = 4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width
    expected = 2 * (2 * width**2 + 2 * width + layer) + 1024 * width + 1024
    assert sum(parameter.numel() for parameter in decompressor.parameters()) == expected
    assert 36.9e6 < expected < 37.0e6


def test_semantic_states_become_as_many_frames_as_the_clip_has_after_the_first(model):
    assert outputs_of(model, 2, 3, 9, 32, 32).video_states.shape == (2, 8 * 4, 10)


def test_every_latent_frame_but_the_anchor_is_decompressed(model):
    states = torch.randn(1, 3 * 4, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model.decompressor(states, (3, 2, 2)).square().sum().backward()
    anchor, others = states.grad.split([4, 8], dim=1)
    assert not anchor.any()
    assert (others.abs().sum(-1) > 0).all()


def test_an_image_uses_every_parameter_of_the_decompressor_too(model):
    """Or DDP would wait for them in a step of images."""
    model.zero_grad()
    outputs_of(model, 2, 3, 32, 32).video_states.sum().backward()
    assert all(parameter.grad is not None for parameter in model.decompressor.parameters())


def test_image_teachers_are_given_the_states_of_the_first_frame(model):
    clip, image = outputs_of(model, 1, 3, 9, 32, 32), outputs_of(model, 1, 3, 32, 32)
    assert clip.hidden_states[0].shape == image.hidden_states[0].shape == (1, 4, 16)
    pixel_values = 2 * torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(2)) - 1
    states = []
    for pixels, count in ((pixel_values, 12), (pixel_values[:, :, 0], 4)):
        states.append(model(pixels, latent_noise=torch.zeros(1, count, 4), distill_layers=(1, 3)).hidden_states)
    assert states[0][0].shape == (1, 1 + 4, 16)  # Gen-ViT's, with the class token
    torch.testing.assert_close(states[0], states[1])


def test_a_saved_model_has_no_decompressor(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    loaded, info = HydraTokModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert not any("decompressor" in name for name in loaded.state_dict())
