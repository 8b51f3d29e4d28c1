"""HYDRA at the paper's two sizes: stages I, II and III. HYDRA, section 2.2 and its table of training stages.

hydra train hydra.hydra_1_5b --stage stage1 --init hydra-1.5b-init --tokenizer runs/hydra_tok/decoder/final \\
    --data generate=/data/captions/*.tar --data understand=/data/llava.jsonl

Each value has its source next to it: "given" in the paper, or "our choice" where the paper is silent. Stage III needs curated
instruction and aesthetic data, so run the stages one at a time, each with its own `--data`.
"""

from collections.abc import Callable
from dataclasses import replace

from hydra_hf.hub import subfolder_of
from hydra_hf.modeling import HydraConfig, HydraProcessor
from hydra_hf.training.recipe import HydraRecipe, HydraStage


BATCH_SIZE = 1024  # given
SAMPLE_PROMPTS = (  # our choice
    "a photo of a cat",
    "two red apples on a wooden table",
    "a blue bus left of a yellow bench",
    "a lighthouse at sunset, oil painting",
    "a portrait of an old fisherman",
    "a bowl of ramen seen from above",
    "a green bird on a branch in the rain",
    "a small house in the snow at night",
)


def tasks_of(text: int, understand: int, generate: int) -> dict[str, int]:
    """Samples of one step in this ratio, as many as fit into BATCH_SIZE (our choice if it cannot be divided)."""
    unit = BATCH_SIZE // (text + understand + generate)
    counts = {"text": text * unit, "understand": understand * unit, "generate": generate * unit}
    return {task: count for task, count in counts.items() if count}


def trained_modules(config: HydraConfig) -> tuple[list[str], list[str]]:
    """The names of the projector, and of the language model."""
    projector = ["model.multi_modal_projector"]
    if config.use_time_token:
        projector.append("model.time_embedding")  # our choice, at the projector's rate
    language_model = ["model.language_model"]
    if not config.tie_word_embeddings:
        language_model.append("lm_head")
    return projector, language_model


def stages(config: HydraConfig) -> tuple[HydraStage, ...]:
    """Stages I to III. Gen-ViT, bottleneck and pixel decoder are frozen in all of them: they make and read the latents."""
    projector, language_model = trained_modules(config)
    stage1 = HydraStage(
        name="stage1",
        num_steps=150_000,  # given
        tasks=tasks_of(0, 1, 3),  # given
        learning_rates={  # given; the language model is frozen
            "vision_head": 1e-4,
            "model.vision_tower.sem_vit": 5e-5,
            **dict.fromkeys(projector, 5e-5),
        },
        muon_scale=0.0,  # given: AdamW
        weight_decay=0.01,  # our choice, as are betas of (0.9, 0.95) in `optimizers`
        warmup_steps=1000,  # our choice
        decay_share=0.0,  # our choice: constant
        max_grad_norm=1.0,  # our choice
        ema_decay=0.0,  # our choice: no average
        mixed_precision="bf16",  # our choice, over fp32 weights
        drop_prompt=0.1,  # our choice
    )
    stage2 = replace(
        stage1,
        name="stage2",
        num_steps=100_000,  # given
        tasks=tasks_of(0, 2, 2),  # given
        learning_rates={  # given; the projector's is our choice
            "vision_head": 5e-5,
            "model.vision_tower.sem_vit": 2e-5,
            **dict.fromkeys([*projector, *language_model], 2e-5),
        },
    )
    stage3 = replace(
        stage2,
        name="stage3",
        num_steps=20_000,  # given
        tasks=tasks_of(1, 2, 2),  # given; 204 : 408 : 408
        task_weights={
            "text": 1 / 3,
            "understand": 2 / 3,
        },  # our choice: as the samples, so that L_NTP keeps its weight
        warmup_steps=500,  # our choice
    )
    return stage1, stage2, stage3


def hydra_1_5b(init: str | None = None, tokenizer: str | None = None) -> HydraRecipe:
    """Qwen2.5-1.5B-Instruct and InternViT-300M, as `hydra convert` puts them together in `init`."""
    return recipe_of("hydra.hydra_1_5b", HydraConfig.hydra_1_5b, stages, init, tokenizer)


def hydra_7b(init: str | None = None, tokenizer: str | None = None) -> HydraRecipe:
    """Qwen2.5-7B-Instruct and InternViT-300M, as `hydra convert` puts them together in `init`."""
    return recipe_of("hydra.hydra_7b", HydraConfig.hydra_7b, stages, init, tokenizer)


def recipe_of(
    name: str,
    preset: Callable[[], HydraConfig],
    stages: Callable[[HydraConfig], tuple[HydraStage, ...]],
    init: str | None,
    tokenizer: str | None,
    max_length: int = 4096,
) -> HydraRecipe:
    """The sizes and tokenizer of `init`; without it, the preset's sizes and no tokenizer, enough for a dry run."""
    config = preset() if init is None else HydraConfig.from_pretrained(init, subfolder=subfolder_of(init, "model"))
    return HydraRecipe(
        name=name,
        config=config,
        stages=stages(config),
        init=init,
        tokenizer=tokenizer,
        processor=None
        if init is None
        else HydraProcessor.from_pretrained(init, subfolder=subfolder_of(init, "processor")),
        gradient_checkpointing=True,  # our choice
        max_length=min(max_length, config.text_config.max_position_embeddings),  # our choice
        num_inference_steps=50,  # our choice
        guidance_scale=4.5,  # our choice
        sample_prompts=SAMPLE_PROMPTS,
    )
