import torch

from hydra_hf.toy.evaluation import evaluate_reconstruction, photo_crops, reconstruct
from toy_models import toy_language, toy_pipeline


def test_scores_have_their_keys_and_one_seed_gives_one_score():
    model = toy_pipeline().model.model.vision_tower
    scores = evaluate_reconstruction(model, toy_language(), 3)
    assert list(scores) == ["reconstruction/psnr", "reconstruction/psnr_photos"]
    assert all(0 < score < 40 for score in scores.values())
    assert evaluate_reconstruction(model, toy_language(), 3) == scores


def test_a_reconstruction_has_the_pictures_shape_whatever_the_batch():
    model = toy_pipeline().model.model.vision_tower
    pixel_values = torch.rand(3, 3, 64, 64) * 2 - 1
    assert reconstruct(model, pixel_values, batch_size=2).shape == pixel_values.shape


def test_photographs_are_cut_into_whole_tiles():
    tiles = photo_crops(64)
    assert tiles.shape == (4 * 4 + 2 * 3 + 3 * 4 + 3 * 5, 3, 64, 64)  # 256x256, 150x225, 200x300, 213x320
    assert tiles.min() >= -1
    assert tiles.max() <= 1
    assert tiles.std() > 0.3
