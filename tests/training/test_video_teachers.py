"""Teachers of clips: models of transformers on the frames after the first, or a teacher of images on each of them."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, interpolate
from transformers import (
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
    VJEPA2Config,
    VJEPA2Model,
)

from hydra_hf.evaluation.backbones import to_imagenet
from hydra_hf.modeling import HydraTokConfig
from hydra_hf.training.losses import distill_loss, resize_states
from hydra_hf.training.video_teachers import load_video_teacher


CONFIG = HydraTokConfig(image_mean=[0.5] * 3, image_std=[0.5] * 3)
SIZES = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 16}


def videomae() -> VideoMAEModel:
    return VideoMAEModel(VideoMAEConfig(**SIZES, intermediate_size=16, image_size=32, num_frames=8, tubelet_size=2))


def vjepa2() -> VJEPA2Model:
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return VJEPA2Model(VJEPA2Config(**SIZES, **predictor, crop_size=32, frames_per_clip=8, tubelet_size=2))


def vivit() -> VivitModel:
    return VivitModel(VivitConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16,
                                  image_size=32, num_frames=8, tubelet_size=[2, 16, 16]))  # fmt: skip


def clips(size: int = 32, num_frames: int = 9) -> torch.Tensor:
    return 2 * torch.rand(2, 3, num_frames, size, size, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture
def teach(tmp_path):
    """A function that saves a model and loads it as a teacher."""

    def teach(model: torch.nn.Module):
        model.save_pretrained(tmp_path)
        return load_video_teacher(str(tmp_path), CONFIG)

    return teach


@pytest.mark.parametrize("make", [videomae, vjepa2, vivit])
def test_a_video_model_teaches_with_its_states_of_the_frames_after_the_first(teach, make):
    torch.manual_seed(0)
    model, pixel_values = make().eval(), clips()
    states, grid = teach(model)(pixel_values)
    frames = to_imagenet(pixel_values[:, :, 1:].transpose(1, 2))
    with torch.no_grad():
        expected = model(frames).last_hidden_state
    assert grid == (4, 2, 2)
    torch.testing.assert_close(states, expected[:, -16:])  # without ViViT's class token
    changed = pixel_values.clone()
    changed[:, :, 0] = 0
    assert torch.equal(teach(model)(changed)[0], states)


def test_the_encoder_of_v_jepa_teaches_and_its_predictor_does_not_run(teach, monkeypatch):
    teacher = teach(vjepa2())
    monkeypatch.delattr(teacher.model, "predictor")
    assert teacher(clips())[0].shape == (2, 16, 24)


def test_frames_of_another_size_are_resized_to_the_teachers_own(teach):
    states, grid = teach(videomae())(clips(size=48))
    assert (tuple(states.shape), grid) == ((2, 16, 24), (4, 2, 2))


@pytest.mark.parametrize("make, num_frames, message", [(videomae, 17, "reads 8 frames, got 16"), (vjepa2, 4, "a multiple of 2 frames, got 3")])  # fmt: skip
def test_a_number_of_frames_that_the_teacher_does_not_read_is_refused(teach, make, num_frames, message):
    with pytest.raises(ValueError, match=message):
        teach(make())(clips(num_frames=num_frames))


def test_a_teacher_of_images_teaches_frame_by_frame(teach):
    config = SiglipVisionConfig(**SIZES, intermediate_size=16, image_size=32)
    torch.manual_seed(0)
    model, pixel_values = SiglipVisionModel(config).eval(), clips(num_frames=5)
    states, grid = teach(model)(pixel_values)
    assert (tuple(states.shape), grid) == ((2, 16, 24), (4, 2, 2))
    with torch.no_grad():
        expected = model(
            pixel_values[:, :, 3]
        ).last_hidden_state  # [-1, 1] is what a mean and deviation of a half give
    torch.testing.assert_close(states.unflatten(1, (4, 4))[:, 2], expected)


def test_a_video_teacher_is_frozen_and_gives_no_gradient(teach):
    teacher = teach(videomae())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(clips().requires_grad_())[0].requires_grad


# Grids


def test_frames_are_averaged_and_maps_resized_to_the_teachers_grid():
    states = torch.randn(2, 4 * 2 * 3, 5, generator=torch.Generator().manual_seed(0))
    resized = resize_states(states, (4, 2, 3), (2, 4, 6)).unflatten(1, (2, 4, 6))
    maps = states.unflatten(1, (4, 2, 3))
    pair = (maps[:, 2] + maps[:, 3]) / 2
    expected = interpolate(pair.permute(0, 3, 1, 2), size=(4, 6), mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(resized[:, 1], expected)


def test_states_on_the_teachers_grid_are_left_alone():
    states = torch.randn(1, 8, 5)
    assert resize_states(states, (2, 2, 2), (2, 2, 2)) is states


def test_frames_that_cannot_be_averaged_are_refused():
    with pytest.raises(ValueError, match="4 frames of the student cannot be averaged to 3 of the teacher"):
        resize_states(torch.randn(1, 4, 5), (4, 1, 1), (3, 1, 1))


def test_the_loss_of_another_grid_is_that_of_the_resized_states():
    states, target = (torch.randn(2, count, 5, generator=torch.Generator().manual_seed(count)) for count in (16, 4))
    pooled = states.unflatten(1, (4, 4)).mean(1)
    expected = 1 - cosine_similarity(pooled, target, dim=-1).mean()
    torch.testing.assert_close(distill_loss([states], [target], (4, 2, 2), (1, 2, 2)), expected)
