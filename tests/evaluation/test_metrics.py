import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from hydra_hf.evaluation.metrics import psnr


def pictures(seed: int) -> torch.Tensor:
    """Pixels (3, 3, 8, 10) that 8 bits hold exactly."""
    return torch.randint(256, (3, 3, 8, 10), generator=torch.Generator().manual_seed(seed)) / 127.5 - 1


def test_psnr_is_that_of_scikit_image():
    first, second = pictures(0), pictures(1)
    second[1] = 0.9 * first[1] + 0.1 * second[1]
    pairs = zip(*(((x + 1) * 127.5).round().byte().numpy() for x in (first, second)))
    expected = torch.tensor([peak_signal_noise_ratio(a, b) for a, b in pairs], dtype=torch.float32)
    torch.testing.assert_close(psnr(first, second), expected)


def test_equal_pictures_have_100_db():
    assert psnr(pictures(0), pictures(0)).tolist() == [100.0] * 3


def test_what_8_bits_cannot_show_does_not_count():
    assert psnr(pictures(0), pictures(0) + 1e-3).tolist() == [100.0] * 3


def test_pixels_out_of_range_are_judged_as_they_are_shown():
    assert psnr(torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), 7.0)).item() == 100


def test_pictures_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 3, 8, 10\) and \(2, 3, 8, 10\)"):
        psnr(pictures(0), pictures(0)[:2])
