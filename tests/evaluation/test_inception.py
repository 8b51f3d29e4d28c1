"""FID's Inception of torch-fidelity. Its weights are not here, so the network is tested with random ones."""

import hashlib

import pytest
import torch

from hydra_hf.evaluation.backbones import InceptionFeatures, check_hashed_file
from hydra_hf.evaluation.metrics import frechet_distance


inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def test_without_weights_the_command_that_fetches_them_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError) as error:
        InceptionFeatures()
    assert str(error.value).endswith(f"curl -L --create-dirs -o {path} {inception.URL_INCEPTION_V3}")


def test_a_damaged_file_is_not_read(tmp_path):
    path = tmp_path / "weights-6726825d.pth"
    path.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"has the SHA-256 [0-9a-f]{64}, expected 6726825d\.\.\."):
        check_hashed_file(path, "https://example.org/weights-6726825d.pth")


@pytest.fixture
def features(tmp_path, monkeypatch) -> InceptionFeatures:
    torch.manual_seed(0)
    network = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network, "load_state_dict", lambda self, weights: None)
        first = network("inception-v3-compat", ["2048"])
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(first.state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    (folder / "weights.pth").rename(folder / f"weights-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "URL_INCEPTION_V3", f"https://example.org/weights-{digest[:8]}.pth")
    return InceptionFeatures()


def test_images_are_seen_as_they_are_saved(features):
    levels = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixel_values = levels / 127.5 - 1 + 1e-3  # less than 8 bits can show
    found = features(pixel_values)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, features.model(levels)[0])
    assert features.score == "rfid"


def test_the_frechet_distance_is_torch_fidelitys_fid():
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    sets = [torch.randn(50, 12, generator=torch.Generator().manual_seed(seed)) + seed / 4 for seed in (0, 1)]
    statistics = [fid_features_to_statistics(values.double()) for values in sets]
    expected = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-5)
