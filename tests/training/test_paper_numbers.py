"""Every value of the full-size HYDRA recipes against the paper, or against what we chose where it is silent."""

from dataclasses import fields, replace

import pytest
import torch

from hydra_hf.modeling import HydraForConditionalGeneration
from hydra_hf.training.recipe import HydraLossWeights, HydraStage, freeze_unnamed
from hydra_hf.training.recipes import hydra


GIVEN = "HYDRA, section 2.2 and the table of its training stages"
OURS = "not given: our choice"
SEM_VIT, PROJECTOR, TIME = "model.vision_tower.sem_vit", "model.multi_modal_projector", "model.time_embedding"
LANGUAGE = "model.language_model"

STAGE_TABLE = {  # field -> (stage I, stage II, stage III, source)
    "name": ("stage1", "stage2", "stage3", GIVEN),
    "num_steps": (150_000, 100_000, 20_000, GIVEN),
    "tasks": (
        {"understand": 256, "generate": 768},  # 0 : 1 : 3 of 1024
        {"understand": 512, "generate": 512},  # 0 : 2 : 2
        {"text": 204, "understand": 408, "generate": 408},  # 1 : 2 : 2, the most that 1024 has room for
        GIVEN,
    ),
    "muon_scale": (0.0, 0.0, 0.0, GIVEN),  # AdamW
    "loss_weights": (*[HydraLossWeights(language=1.0, flow=1.0)] * 3, GIVEN),
    "weight_decay": (0.01, 0.01, 0.01, OURS),
    "warmup_steps": (1000, 1000, 500, OURS),
    "decay_share": (0.0, 0.0, 0.0, OURS),
    "max_grad_norm": (1.0, 1.0, 1.0, OURS),
    "ema_decay": (0.0, 0.0, 0.0, OURS),
    "mixed_precision": ("bf16", "bf16", "bf16", OURS),
    "task_weights": ({}, {}, {"text": 1 / 3, "understand": 2 / 3}, OURS),  # L_NTP as a whole keeps its weight
    "lora_rank": (0, 0, 0, GIVEN),  # trained in full
    "lora_targets": (*[(LANGUAGE, SEM_VIT)] * 3, OURS),
    "condition_grad_scale": (1.0, 1.0, 1.0, GIVEN),  # nothing is scaled
    "drop_prompt": (0.1, 0.1, 0.1, OURS),
    "sigma_shifts": ({}, {}, {}, OURS),  # those of the model
    "image_size": (None, None, None, GIVEN),  # that of the processor, 448
    "clip_size": (None, None, None, GIVEN),  # there are no clips
}
RATES = {  # module -> (stage I, stage II, stage III, source)
    "vision_head": (1e-4, 5e-5, 5e-5, GIVEN),
    SEM_VIT: (5e-5, 2e-5, 2e-5, GIVEN),
    PROJECTOR: (5e-5, 2e-5, 2e-5, f"{GIVEN} for stage I, then {OURS}"),
    TIME: (5e-5, 2e-5, 2e-5, OURS),
    LANGUAGE: (None, 2e-5, 2e-5, GIVEN),
    "lm_head": (None, 2e-5, 2e-5, GIVEN),  # of the language model, where it is not its embedding
}
RECIPES = {"1.5b": hydra.hydra_1_5b, "7b": hydra.hydra_7b}


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return RECIPES[request.param]()


@pytest.fixture(scope="module")
def model(recipe):
    with torch.device("meta"):
        return HydraForConditionalGeneration(recipe.config)


def test_the_table_has_every_field_of_a_stage():
    names = {field.name for field in fields(HydraStage)}
    assert set(STAGE_TABLE) | {"learning_rates", "data", "held_out", "num_held_out"} == names


@pytest.mark.parametrize("name", STAGE_TABLE)
def test_a_stage_has_the_values_of_the_table(recipe, name):
    assert tuple(getattr(stage, name) for stage in recipe.stages) == STAGE_TABLE[name][:3]


def test_a_module_has_the_rates_of_the_table(recipe):
    is_tied = recipe.config.tie_word_embeddings
    for index, stage in enumerate(recipe.stages):
        rates = {module: row[index] for module, row in RATES.items() if row[index] is not None}
        assert stage.learning_rates == {
            module: rate for module, rate in rates.items() if module != "lm_head" or not is_tied
        }


def test_the_batch_of_every_ratio_is_the_largest_that_the_paper_has_room_for():
    for ratio in ((0, 1, 3), (0, 2, 2), (1, 2, 2)):
        counts = hydra.tasks_of(*ratio)
        units = {counts[task] / share for task, share in zip(("text", "understand", "generate"), ratio) if share}
        assert len(units) == 1  # exactly in proportion
        assert sum(counts.values()) <= 1024 < sum(counts.values()) + sum(ratio)


def test_images_have_448_pixels(recipe):
    assert recipe.config.vision_config.image_size == 448


def test_every_stage_trains_the_named_modules_and_never_what_makes_or_reads_latents(recipe, model):
    for stage in recipe.stages:
        freeze_unnamed(model, stage)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(stage.learning_rates))}
        assert trained == expected
        for module in ("gen_vit", "bottleneck", "pixel_decoder"):
            assert not [name for name in trained if f"vision_tower.{module}" in name]


def test_stage_one_freezes_the_language_model_and_later_ones_train_all_of_it(recipe, model):
    language = {name for name, _ in model.named_parameters() if name.startswith((LANGUAGE, "lm_head"))}
    for index, stage in enumerate(recipe.stages):
        freeze_unnamed(model, stage)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert language & trained == (language if index else set())


def test_sizes_are_those_of_the_published_models(recipe, model):
    language = sum(p.numel() for name, p in model.named_parameters() if name.startswith((LANGUAGE, "lm_head")))
    assert language == {1536: 1_543_714_304, 3584: 7_615_616_512}[recipe.config.text_config.hidden_size]


def test_a_full_size_recipe_has_no_toy_world_to_fall_back_on(recipe):
    assert [stage.data for stage in recipe.stages] == [None, None, None]
    assert replace(recipe, micro_batch_size=16).processor is None
