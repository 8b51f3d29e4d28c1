import numpy as np
import pytest
import scipy.linalg
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hydra_hf.evaluation.metrics import frechet_distance, psnr, ssim


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


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures (3, 20, 25) and noisy copies, which 8 bits hold exactly."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(256, (2, 3, 20, 25), generator=generator)
    second = (first + torch.randint(-40, 41, first.shape, generator=generator)).clamp(0, 255)
    return first / 127.5 - 1, second / 127.5 - 1


def test_ssim_is_that_of_scikit_image_with_a_gaussian_window(pairs):
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
        "channel_axis": 0,
    }
    arrays = zip(*(((x + 1) * 127.5).round().byte().numpy() for x in pairs))
    expected = torch.tensor([structural_similarity(a, b, **settings) for a, b in arrays], dtype=torch.float32)
    torch.testing.assert_close(ssim(*pairs), expected, rtol=0, atol=1e-5)


def test_equal_pictures_have_an_ssim_of_one(pairs):
    torch.testing.assert_close(ssim(pairs[0], pairs[0]), torch.ones(2))


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(pictures(0), pictures(0))


def test_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    white = (features - features.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(features.T.cov())).T
    first, second = white * torch.tensor([1.0, 2.0, 3.0]), white * torch.tensor([4.0, 2.0, 1.0]) + 1
    expected = (
        3 + (1 - 4) ** 2 + 0 + (3 - 1) ** 2
    )  # |difference of means|^2 + sum of squared differences of deviations
    assert frechet_distance(first, second) == pytest.approx(expected)


def test_frechet_distance_of_covariances_that_do_not_commute_is_the_trace_formula():
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.randn(40, 4, generator=generator) @ torch.randn(4, 4, generator=generator) for _ in range(2)
    )
    a, b = (x.double().T.cov().numpy() for x in (first, second))
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    expected += ((first.double().mean(0) - second.double().mean(0)) ** 2).sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3))])
def test_frechet_distance_refuses_features_that_have_no_distance(shapes):
    with pytest.raises(ValueError, match="eatures"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))
