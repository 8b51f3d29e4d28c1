"""Clips and edits in files, from the command's TASK=PATH to the losses of a run."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from hydra_hf.data.sources import Source, Sources, parse_source
from hydra_hf.files import write_video
from hydra_hf.modeling import (
    HydraForConditionalGeneration,
    HydraImageProcessor,
    HydraProcessor,
    HydraVideoProcessor,
    PixelViTDecoderConfig,
)
from hydra_hf.modeling.image_processing_hydra import packed_pixel_values
from hydra_hf.training.dry_run import dry_run
from hydra_hf.training.hydra_trainer import create_bundles, train_hydra
from hydra_hf.training.painted_grids import paint_hydra
from hydra_hf.training.recipe import HydraRecipe, HydraStage
from tiny_models import make_config, make_tok_config


pytest.importorskip("datasets")
SIZE = {"min_pixels": 64, "max_pixels": 32 * 32}
MODULES = ("vision_head", "model.vision_tower.sem_vit", "model.multi_modal_projector", "model.language_model")


def png(rng: np.random.Generator) -> bytes:
    buffer = BytesIO()
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips with captions and questions, one of which is broken, and edits."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    captions, questions, edits = [], [], []
    for number in range(3):
        frames = [Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)) for _ in range(11)]
        write_video(folder / f"{number}.mp4", frames, fps=10)
        for name in ("before", "after"):
            (folder / f"{name}{number}.png").write_bytes(png(rng))
        captions.append({"video": f"{number}.mp4", "caption": "a cat"})
        turns = [{"from": "human", "value": "<video>\nwhat is in it?"}, {"from": "gpt", "value": "a cat"}]
        questions.append({"video": f"{number}.mp4", "conversations": turns})
        edits.append(
            {"source_image": f"before{number}.png", "instruction": "a dog", "target_image": f"after{number}.png"}
        )
    (folder / "0.mp4").write_bytes(b"no clip")
    for name, rows in {"captions": captions, "questions": questions, "edits": edits}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def recipe(folder, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    sources = {"video_generate": "captions", "video_understand": "questions", "edit": "edits"}
    data = Sources(tuple(parse_source(f"{task}={folder / name}.jsonl") for task, name in sources.items()))
    processor = HydraProcessor(
        HydraImageProcessor(size=SIZE, patch_size=8), tiny_tokenizer, patch_size=8,
        video_processor=HydraVideoProcessor(size=SIZE, patch_size=8, num_frames=9),
    )  # fmt: skip
    decoder = PixelViTDecoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8,
        temporal_unfold_layers=[1, 2], rotary_axes=[4, 4, 8],
    )  # fmt: skip
    tower = make_tok_config(
        num_gen_layers=2,
        temporal_fold_layers=[0, 1],
        rotary_axes=[4, 4, 8],
        decoder_config=decoder,
        use_cls_token=False,
    )
    config = make_config(tiny_tokenizer, vision_config=tower, video_token_id=processor.video_token_id)
    stage = HydraStage(
        name="stage1", num_steps=2, tasks=dict.fromkeys(sources, 2), data=data, warmup_steps=1, mixed_precision="no",
        learning_rates=dict.fromkeys(MODULES, 1e-3), drop_prompt=0.5, clip_size=24,
    )  # fmt: skip
    return HydraRecipe(
        name="test", config=config, stages=(stage,), tokenizer=None, processor=processor, num_workers=0, log_every=1,
        max_length=128,
    )  # fmt: skip


def test_a_question_about_a_clip_is_trained_as_it_is_asked(recipe, folder):
    batch = create_bundles(recipe, recipe.stages[0], seed=0)[0]["video_understand"]
    processor = recipe.sized_for(recipe.stages[0]).processor
    parts = [{"type": "video", "path": str(folder / "1.mp4")}, {"type": "text", "text": "what is in it?"}]
    chats = [[{"role": "user", "content": [part | {"path": str(folder / f"{n}.mp4")} if "path" in part else part for part in parts]}]
             for n in (1, 2)]  # fmt: skip
    asked = [
        processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        for chat in chats
    ]
    length = asked[0]["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:1, :length], asked[0]["input_ids"])
    grid = asked[0]["video_grid_thw"]
    assert grid.tolist()[0][0] == 9
    assert torch.equal(batch["image_grid_thw"][:1], grid)
    trained = packed_pixel_values(batch["pixel_values"])[: grid.prod()]
    assert any(torch.equal(trained, one["pixel_values_videos"]) for one in asked)


def test_a_run_on_clips_and_edits_trains_and_skips_the_broken_clip(recipe, tmp_path):
    final = train_hydra(recipe, tmp_path / "run", only="stage1")
    records = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    names = ("video_generate/flow", "video_understand/language", "edit/flow")
    assert all(np.isfinite(records[0][name]) for name in names)
    assert sum(record.get("skipped", 0) for record in records) >= 2
    saved = HydraProcessor.from_pretrained(final, subfolder="processor")
    assert saved.video_processor.size.max_pixels == 24**2
    assert HydraForConditionalGeneration.from_pretrained(final, subfolder="model").config.video_token_id is not None


def test_edits_of_several_sizes_and_numbers_of_sources_are_painted_while_training(recipe, folder):
    rows = [
        {"input_images": ["before0.png", "before1.png"], "instruction": "a dog", "output_image": "after0.png"},
        {"input_images": ["wide.png"], "instruction": "a cat", "output_image": "wide.png"},
    ]
    Image.linear_gradient("L").resize((48, 16)).save(folder / "wide.png")
    model = HydraForConditionalGeneration(recipe.config).eval()
    painted = []
    for chosen in (rows, rows[:1], rows[1:]):
        (path := folder / "several.jsonl").write_text("\n".join(map(json.dumps, chosen)))
        stage = replace(
            recipe.stages[0],
            tasks={"edit": len(chosen)},
            data=Sources((Source(task="edit", path=str(path)),)),
            drop_prompt=0.0,
        )
        bundle = create_bundles(recipe, stage, seed=0)[0]
        painted.append(paint_hydra(model, bundle, "edit", torch.Generator().manual_seed(0)))
    both, *alone = painted
    assert len(both[2]) == 2
    pairs = [(given, expected) for (given,), (expected,), _ in alone]  # the last source and the target
    for given, expected in zip(*both[:2]):
        assert any(torch.equal(given, source) and torch.equal(expected, target) for source, target in pairs)
    assert [image.shape for image in both[2]] == [image.shape for image in both[1]]
    assert both[1][0].shape != both[1][1].shape


def test_a_dry_run_counts_the_latent_frames_of_clips(recipe):
    (seen,) = dry_run(recipe)
    stage = recipe.stages[0]
    (nominal,) = dry_run(recipe.with_overrides(data=None, image_size=32, clip_size=24))
    assert seen.tasks["video_generate"].num_frames == 3  # of 9 frames
    assert nominal.tasks["video_generate"].num_frames == 5  # of 17
    assert seen.tasks["video_generate"].image_tokens == 1 + 3 * 3 * 3  # 24 x 24 px
    assert nominal.tasks["video_generate"].image_tokens == 1 + 5 * 3 * 3
    assert nominal.tasks["edit"].image_tokens == 2 * (1 + 4 * 4)
    assert nominal.tasks["edit"].num_generated == 1
    assert all(task.flops > 0 for report in (seen, nominal) for task in report.tasks.values())
    assert stage.tasks.keys() == seen.tasks.keys()
