"""GenEval: its layout, its rules, and a scorer of our own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from hydra_hf.evaluation.suites.detection import COLORS, ColorClassifier, Detector, Found
from hydra_hf.evaluation.suites.geneval import Judge, mean_scores, relations_of, run


ROWS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "a photo of two cats"},
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def draw(pipeline, data, folder, **options):
    return run(pipeline, "tiny", data=data, folder=folder, **{"num_images": 2, "num_inference_steps": 1} | options)


def pictures(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


# Drawing


def test_the_folder_has_the_official_layout(tiny_pipeline, data, tmp_path):
    result = draw(tiny_pipeline, data, tmp_path / "out")
    expected = [f"{prompt:05}/samples/{sample:04}.png" for prompt in range(2) for sample in range(2)]
    assert list(pictures(tmp_path / "out")) == expected
    assert [json.loads((tmp_path / "out" / f"{i:05}" / "metadata.jsonl").read_text()) for i in range(2)] == ROWS
    assert result.scores == {}
    assert result.counts == {"prompts": 2, "images": 4}
    assert not result.is_comparable
    assert result.protocol["prompts"] == "raw"
    assert "not the 553" in result.notes[-1]


def test_a_killed_run_is_resumed_with_the_same_images(tiny_pipeline, data, tmp_path):
    draw(tiny_pipeline, data, tmp_path / "out")
    before = pictures(tmp_path / "out")
    kept, lost = (tmp_path / "out" / name for name in ("00000/samples/0000.png", "00001/samples/0001.png"))
    lost.unlink()
    time = kept.stat().st_mtime_ns
    draw(tiny_pipeline, data, tmp_path / "out", batch_size=1)
    assert pictures(tmp_path / "out") == before
    assert kept.stat().st_mtime_ns == time
    assert len(set(before.values())) == 4  # each has its own noise


def test_a_limit_is_the_start_of_the_whole(tiny_pipeline, data, tmp_path):
    draw(tiny_pipeline, data, tmp_path / "part", limit=1)
    draw(tiny_pipeline, data, tmp_path / "whole")
    part, whole = pictures(tmp_path / "part"), pictures(tmp_path / "whole")
    assert len(part) == 2
    assert part.items() <= whole.items()


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_inference_steps": 2}, {"guidance_scale": 2.0}])
def test_a_folder_does_not_mix_settings(tiny_pipeline, data, tmp_path, change):
    draw(tiny_pipeline, data, tmp_path / "out", limit=1)
    with pytest.raises(ValueError, match=f"other settings: {next(iter(change))}"):
        draw(tiny_pipeline, data, tmp_path / "out", **change)


def test_a_folder_does_not_mix_weights(tiny_pipeline, data, tmp_path):
    draw(tiny_pipeline, data, tmp_path / "out", limit=1)
    with torch.no_grad():
        tiny_pipeline.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights"):
        draw(tiny_pipeline, data, tmp_path / "out")


@pytest.mark.parametrize("line", ["{", '{"tag": "x", "include": [], "prompt": ""}', '{"tag": "colors", "prompt": "a"}',
                                  '{"tag": "colors", "include": [{"class": "a", "count": 1, "color": "grey"}], "prompt": "a"}'])  # fmt: skip
def test_other_data_are_an_error(tiny_pipeline, tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        draw(tiny_pipeline, tmp_path / "rows.jsonl", tmp_path / "out")


def test_the_official_verdicts_are_read(tiny_pipeline, data, tmp_path):
    verdicts = [("single_object", True), ("single_object", False), ("counting", True), ("counting", True)]
    rows = [{"tag": tag, "correct": is_right} for tag, is_right in verdicts]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = draw(tiny_pipeline, data, tmp_path / "out", official_results=tmp_path / "results.jsonl")
    assert result.scores == {"geneval/single_object": 0.5, "geneval/counting": 1.0, "geneval/overall": 0.75}
    assert not result.is_comparable  # two prompts
    with pytest.raises(ValueError, match="judges 4 images, expected the 2"):
        draw(tiny_pipeline, data, tmp_path / "out", limit=1, official_results=tmp_path / "results.jsonl")


def test_the_overall_score_is_the_mean_of_categories_not_of_images():
    assert mean_scores([("colors", True), ("colors", True), ("colors", True), ("position", False)])["overall"] == 0.5


# Rules


def thing(left, top, right, bottom, confidence=0.95):
    return Found((left, top, right, bottom), confidence, np.zeros((1, 1), bool))


@pytest.mark.parametrize(
    ("box", "expected"),
    [((0, 40, 20, 60), {"left of"}), ((80, 40, 100, 60), {"right of"}), ((40, 0, 60, 20), {"above"}),
     ((40, 80, 60, 100), {"below"}), ((0, 0, 20, 20), {"left of", "above"}), ((42, 40, 62, 60), set())],
)  # fmt: skip
def test_relations_are_those_of_the_centres(box, expected):
    assert relations_of(box, (40, 40, 60, 60)) == expected


def judge_of(color="red") -> Judge:
    return Judge(None, lambda image, objects, name: [color] * len(objects))


def test_every_clause_counts():
    judge, cats = judge_of(), [thing(0, 0, 9, 9), thing(20, 0, 29, 9)]
    assert judge.agrees(None, {"cat": cats[:1]}, ROWS[0])
    assert judge.agrees(None, {"cat": cats}, ROWS[0])
    assert not judge.agrees(None, {"dog": cats}, ROWS[0])
    assert judge.agrees(None, {"cat": cats}, ROWS[1])
    assert not judge.agrees(None, {"cat": cats[:1]}, ROWS[1])
    assert not judge.agrees(None, {"cat": [*cats, cats[0]]}, ROWS[1])
    red = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    assert judge.agrees(None, {"cat": cats}, red)
    assert not judge_of("blue").agrees(None, {"cat": cats}, red)
    left = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    }
    assert judge.agrees(None, {"dog": cats[1:], "cat": cats[:1]}, left)
    assert not judge.agrees(None, {"dog": cats[:1], "cat": cats[1:]}, left)


# The scorer


def test_masks_become_boxes_and_names_become_those_of_geneval(detector):
    """Two queries: a sure "mouse" in the upper left quarter, and one that is below the threshold."""
    masks = torch.full((1, 2, 96, 96), -20.0)
    masks[:, 0, :48, :48] = masks[:, 1, 48:, 48:] = 20.0
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1], logits[0, 1, 3] = 20.0, 20.0
    detector.model.forward = lambda **kwargs: Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=logits, masks_queries_logits=masks
    )
    found = detector(Image.new("RGB", (64, 32)), threshold=0.9)
    assert list(found) == ["computer mouse"]
    ((box, confidence, mask),) = [(thing.box, thing.confidence, thing.mask) for thing in found["computer mouse"]]
    assert box == (0, 0, 32, 16)
    assert confidence > 0.99
    assert mask.shape == (32, 64)
    assert mask[:16, :32].all()


def test_the_color_is_of_the_pixels_under_the_mask(color_classifier):
    image, mask = np.full((32, 32, 3), 200, np.uint8), np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    image[mask] = (255, 0, 0)
    found = Found((8, 8, 24, 24), 1.0, mask & (np.arange(32) % 2 == 0))
    noisy = image.copy()
    noisy[~found.mask] = np.random.default_rng(0).integers(0, 255, (int((~found.mask).sum()), 3))
    assert color_classifier(Image.fromarray(image), [found], "cat") == color_classifier(
        Image.fromarray(noisy), [found], "cat"
    )
    assert color_classifier.colors_of("cat").norm(dim=-1) == pytest.approx(torch.ones(len(COLORS)), abs=1e-5)


def test_own_scores_are_named_as_not_comparable(tiny_pipeline, data, tmp_path, detector_folder, clip_folder):
    result = draw(tiny_pipeline, data, tmp_path / "out", detector=detector_folder, clip=clip_folder)
    assert result.scores.keys() == {"geneval/single_object", "geneval/counting", "geneval/overall"}
    assert not result.is_comparable
    assert "not comparable" in result.notes[0]
    assert result.protocol["scorer"] == f"own: {detector_folder}, {clip_folder}"
    assert "0*" in result.markdown()


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory) -> str:
    """A random Mask2Former with three classes."""
    from transformers import Mask2FormerImageProcessorPil

    backbone = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
                          out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=1, dim_feedforward=16, encoder_feedforward_dim=16, num_queries=2,
        id2label={0: "cat", 1: "mouse", 2: "keyboard"}, label2id={"cat": 0, "mouse": 1, "keyboard": 2},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def detector(detector_folder) -> Detector:
    return Detector(detector_folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """A random CLIP that reads letters."""
    letters = {name: index for index, name in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz-"])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", model_max_length=64
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(letters), "eos_token_id": 1, "max_position_embeddings": 64},
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def color_classifier(clip_folder) -> ColorClassifier:
    return ColorClassifier(clip_folder)
