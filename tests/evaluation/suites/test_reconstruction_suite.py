"""The suites that rebuild images and clips of a folder."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import VideoMAEConfig, VideoMAEModel

from hydra_hf.cli import main
from hydra_hf.evaluation.crops import read_crop
from hydra_hf.evaluation.metrics import psnr, ssim
from hydra_hf.evaluation.reconstruction import reconstruct
from hydra_hf.evaluation.report import SuiteResult
from hydra_hf.evaluation.suites.reconstruction import run
from hydra_hf.modeling import HydraTokModel
from hydra_hf.modeling.configuration_hydra import PixelViTDecoderConfig
from tiny_models import PATCH_SIZE, make_tok_config


ARCHITECTURE = "test_efficientnet"


@pytest.fixture(scope="module")
def tower() -> HydraTokModel:
    torch.manual_seed(0)
    return HydraTokModel(make_tok_config()).eval()


@pytest.fixture(scope="module")
def clip_tower() -> HydraTokModel:
    torch.manual_seed(0)
    decoder = PixelViTDecoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=PATCH_SIZE,
        temporal_unfold_layers=[0, 2],
    )  # fmt: skip
    return HydraTokModel(
        make_tok_config(decoder_config=decoder, temporal_fold_layers=[0, 0], rotary_axes=[4, 0, 0])
    ).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(generator.integers(256, size=(32, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for name in ("bear", "camel", "dog"):
        (folder / name).mkdir()
        for index in range(9):
            frame = Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8))
            frame.save(folder / name / f"{index}.png")
    return folder


def test_scores_are_means_over_the_crops_whatever_the_batch(tower, images, tmp_path):
    result = run(tower, "tiny", suite="images", data=images, size=32, batch_size=2)
    crops = torch.stack([read_crop(path, 32) for path in sorted(images.iterdir())])
    copies = reconstruct(tower, crops, seed=0)
    expected = {"images/psnr": psnr(crops, copies).mean().item(), "images/ssim": ssim(crops, copies).mean().item()}
    assert result.scores == pytest.approx(expected, rel=1e-5)
    assert result.counts == {"images": 5}
    assert result.protocol["num_inference_steps"] == 2  # the decoder's own
    result.save(tmp_path / "scores.json")
    assert SuiteResult.load(tmp_path / "scores.json") == result


def test_only_the_whole_benchmark_at_its_size_is_comparable(tower, images):
    result = run(tower, "tiny", suite="imagenet_256", data=images, size=32, model_size=16, limit=2)
    assert not result.is_comparable
    assert [note.split(",")[0] for note in result.notes[:2]] == ["2 images", "Crops of 32 px"]
    assert "sees 16 px" in result.notes[2]


def test_copies_that_the_model_made_at_another_size_come_back(tower, images):
    result = run(tower, "tiny", suite="images", data=images, size=20, model_size=32, limit=2)
    assert 0 < result.scores["images/psnr"] < 100


def test_a_size_that_patches_do_not_divide_is_refused_with_one_that_works(tower, images):
    with pytest.raises(ValueError, match="patches of 8 px do not divide 20. Give --model_size, such as 32"):
        run(tower, "tiny", suite="images", data=images, size=20)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trunk") / "trunk.safetensors"
    save_file(timm.create_model(ARCHITECTURE).state_dict(), path)
    return str(path)


def test_a_frechet_distance_has_its_backbones_name(tower, images, trunk):
    options = {"backbone": f"timm:{ARCHITECTURE}", "backbone_weights": trunk}
    result = run(tower, "tiny", suite="images", data=images, size=32, **options)
    assert result.scores[f"images/frechet/{ARCHITECTURE}"] > 0
    assert result.protocol["frechet_backbone"] == f"timm:{ARCHITECTURE}"
    assert "compare it only with others over the same" in result.notes[-1]


def test_a_perceptual_distance_is_a_mean_over_images_and_not_over_batches(tower, images, trunk):
    options = {"perceptual_backbone": f"timm:{ARCHITECTURE}", "perceptual_weights": trunk}
    results = [run(tower, "tiny", suite="images", data=images, size=32, batch_size=n, **options) for n in (2, 5)]
    first, second = (result.scores["images/feature_distance"] for result in results)
    assert first > 0
    assert first == pytest.approx(second, rel=1e-4)


def test_clips_are_scored_by_frame_and_by_a_named_video_model(clip_tower, clips, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 16}
    VideoMAEModel(
        VideoMAEConfig(**sizes, intermediate_size=16, image_size=32, num_frames=8, tubelet_size=2)
    ).save_pretrained(tmp_path / "videomae")
    options = {"suite": "davis", "data": clips, "size": 32, "num_frames": 9, "batch_size": 2}
    result = run(clip_tower, "tiny", backbone=str(tmp_path / "videomae"), **options)
    assert list(result.scores) == ["davis/psnr", "davis/ssim", "davis/rfvd/videomae"]
    assert result.scores["davis/rfvd/videomae"] > 0
    assert result.counts == {"clips": 3}


def test_an_image_model_is_no_judge_of_clips(clip_tower, clips, tmp_path):
    torch.manual_seed(0)
    HydraTokModel(make_tok_config(decoder_config=None)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads images, expected a video model"):
        run(clip_tower, "tiny", suite="clips", data=clips, size=32, num_frames=9, backbone=str(tmp_path))


def test_clips_need_a_tokenizer_of_clips(tower, clips):
    with pytest.raises(ValueError, match="expected a HYDRA-XTok for clips"):
        run(tower, "tiny", suite="davis", data=clips, size=32)


@pytest.mark.parametrize("is_alone", [True, False])
def test_the_command_measures_a_tokenizer_alone_and_that_of_a_pipeline(
    is_alone, tiny_pipeline, images, tmp_path, capsys
):
    tower, model, out = tiny_pipeline.model.model.vision_tower, tmp_path / "model", tmp_path / "scores.json"
    (tower if is_alone else tiny_pipeline).save_pretrained(model)
    options = ["--data", str(images), "--size", "32", "--device", "cpu", "--out", str(out)]
    assert main(["evaluate", str(model), "--suite", "images", *options]) == 0
    expected = run(tower, str(model), suite="images", data=images, size=32)
    assert SuiteResult.load(out) == expected
    assert expected.markdown() in capsys.readouterr().out


def test_a_word_of_the_command_that_is_not_the_suites_is_refused(images, tmp_path, capsys):
    options = ["--data", str(images), "--num_neighbors", "5", "--out", str(tmp_path / "scores.json")]
    assert main(["evaluate", "--suite", "images", *options]) == 2
    assert "--num_neighbors does not go with --suite images" in capsys.readouterr().err
