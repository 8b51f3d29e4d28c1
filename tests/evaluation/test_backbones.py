import pytest
import timm
import torch
from safetensors.torch import save_file

from hydra_hf.evaluation.backbones import PooledFeatures, load_timm, load_weights, to_imagenet
from hydra_hf.evaluation.reconstruction import score_reconstructions


ARCHITECTURE = "test_efficientnet"  # timm's own model for tests, 0.36M parameters


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "trunk.safetensors"
    save_file(timm.create_model(ARCHITECTURE).state_dict(), path)
    return str(path)


def pictures(number: int, seed: int) -> torch.Tensor:
    return 2 * torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) - 1


def test_a_timm_model_gets_the_weights_of_its_file_and_is_frozen(weights):
    model = load_timm(f"timm:{ARCHITECTURE}", weights, num_classes=0)
    found = load_weights(weights)
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_another_model_are_refused(weights, tmp_path):
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not hold timm's test_efficientnet: \d+ of \d+ are missing"):
        load_timm(f"timm:{ARCHITECTURE}", str(tmp_path / "other.safetensors"))


def test_weights_of_another_width_are_refused(weights):
    with pytest.raises(ValueError, match="(?s)does not hold timm's test_efficientnet: .*size mismatch"):
        load_timm(f"timm:{ARCHITECTURE}", weights, in_chans=1)


@pytest.mark.parametrize("name", ["timm:no_such_model", "test_efficientnet"])
def test_a_name_that_timm_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' must be timm:NAME"):
        load_timm(name, None)


def test_a_pickle_is_refused_with_the_command_that_converts_it():
    with pytest.raises(
        ValueError, match=r'save_file\(torch.load\("trunk.pth", weights_only=True\), "trunk.safetensors"\)'
    ):
        load_weights("trunk.pth")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        load_weights(str(tmp_path / "trunk.safetensors"))


def test_imagenet_statistics_are_those_of_pixels_in_zero_to_one():
    white = to_imagenet(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(white, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


def test_scores_name_the_backbone_of_their_frechet_distance(weights):
    features = PooledFeatures(f"timm:{ARCHITECTURE}", weights)
    originals = pictures(8, seed=0)
    batches = originals.split(3)
    same = score_reconstructions([(batch, batch) for batch in batches], features)
    other = score_reconstructions([(batch, -batch) for batch in batches], features)
    assert list(same) == ["psnr", "ssim", f"frechet/{ARCHITECTURE}"]
    assert (same["psnr"], same["ssim"]) == (100, pytest.approx(1))
    assert same[f"frechet/{ARCHITECTURE}"] == pytest.approx(0, abs=1e-4)
    assert other[f"frechet/{ARCHITECTURE}"] > same[f"frechet/{ARCHITECTURE}"] + 1e-4


def test_scores_are_means_over_all_pictures_and_not_over_batches():
    originals, copies = pictures(3, seed=0), pictures(3, seed=1)
    copies[0] = originals[0]
    whole = score_reconstructions([(originals, copies)])
    parts = score_reconstructions([(originals[:1], copies[:1]), (originals[1:], copies[1:])])
    assert parts == pytest.approx(whole)
