import pytest
import torch
from torch import nn

from hydra_hf.training.discriminator import PatchDiscriminator, adaptive_weight, adversarial_loss, discriminator_loss


@pytest.fixture
def discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(hidden_size=8)


def test_the_judgement_of_a_picture_does_not_depend_on_its_batch(discriminator):
    pictures = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    logits = discriminator(pictures)
    assert logits.shape == (3, 1, 4, 4)
    torch.testing.assert_close(discriminator(pictures[:1]), logits[:1])


def test_the_default_size_is_that_of_its_docstring():
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchDiscriminator().parameters()) == pytest.approx(2.8e6, rel=0.02)


def test_a_patch_sees_seventy_pixels(discriminator):
    pictures = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layers = [layer for layer in discriminator.layers if not isinstance(layer, nn.GroupNorm)]  # which sees everything
    nn.Sequential(*layers)(pictures)[0, 0, 7, 7].backward()
    rows = pictures.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 70


def test_the_hinge_is_satisfied_by_margins_of_one():
    assert discriminator_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -5.0])) == 0
    assert discriminator_loss(torch.zeros(2), torch.zeros(2)) == 1
    assert discriminator_loss(torch.tensor([-1.0]), torch.tensor([-1.0])) == 1  # 0.5 * (2 + 0)


def test_the_decoder_wants_high_logits():
    assert adversarial_loss(torch.tensor([1.0, 3.0])) == -2


def test_the_adaptive_weight_is_the_ratio_of_the_gradients():
    assert adaptive_weight(torch.full((4,), 3.0), torch.full((4,), 1.5)).item() == pytest.approx(2, rel=1e-3)


def test_the_adaptive_weight_has_an_end():
    assert adaptive_weight(torch.full((4,), 1e3), torch.zeros(4)) == 1e4
