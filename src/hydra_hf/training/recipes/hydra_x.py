"""HYDRA-X at two sizes: stages I, II and III of the unified model, on images and clips. HYDRA-X, section 3 and its appendix.

hydra train hydra_x.hydra_x_1_5b --stage stage2 --init hydra-x-1.5b-init --tokenizer runs/hydra_xtok/final \\
    --data generate=/data/captions/*.tar --data understand=/data/captions/*.tar --data edit=/data/edits/*.parquet \\
    --data video_understand=/data/llava_video.json,image_root=/data/clips --data video_generate=/data/clips/*.tar

Each value has its source next to it: "given" in the paper, or "our choice" where the paper is silent. Run the stages one at a time,
each with its own `--data`.
"""

from dataclasses import replace

from hydra_hf.data.tasks import TASKS
from hydra_hf.modeling import HydraConfig
from hydra_hf.training.recipe import HydraRecipe, HydraStage

from .hydra import recipe_of, trained_modules


BATCH_SIZE = 1024  # our choice: that of HYDRA
MAX_LENGTH = 16_384  # our choice: an edit at 1024 px has two images of 4097 tokens each, a clip at 512 px has 5121


def tasks_of(
    text: int = 0, image_caption: int = 0, image_generation: int = 0, video_caption: int = 0, video_sft: int = 0, image_sft: int = 0,
    edit: float = 0,
) -> dict[str, int]:  # fmt: skip
    """Samples of one step in the paper's ratio of seven parts, as many as fit into BATCH_SIZE.

    Which part trains text to video is not given. Our choice: half of the captioned clips are drawn, half are described.
    """
    parts = {
        "text": text,
        "understand": image_caption + image_sft,
        "generate": image_generation,
        "video_understand": video_caption / 2 + video_sft,
        "video_generate": video_caption / 2,
        "edit": edit,
    }
    unit = BATCH_SIZE / sum(parts.values())
    return {task: int(part * unit) for task, part in parts.items() if part}


def task_weights_of(tasks: dict[str, int]) -> dict[str, float]:
    """A task's share in the samples of its head (our choice), so that L_NTP and L_FM each keep the weight 1."""
    heads = {generates: [task for task in tasks if TASKS[task].generates == generates] for generates in (False, True)}
    return {task: tasks[task] / sum(tasks[other] for other in head) for head in heads.values() for task in head}


def stages(config: HydraConfig) -> tuple[HydraStage, ...]:
    """Stages I to III. Gen-ViT, bottleneck and pixel decoder are frozen in all of them: they make and read the latents."""
    projector, language_model = trained_modules(config)
    tasks = tasks_of(image_caption=1, image_generation=3)  # given
    stage1 = HydraStage(
        name="stage1",
        num_steps=50_000,  # given
        tasks=tasks,
        task_weights=task_weights_of(tasks),
        image_size=256,  # given
        learning_rates={
            "vision_head": 1e-4,  # given
            "model.vision_tower.sem_vit": 5e-5,  # given by the table of rates; the text freezes it
            **dict.fromkeys(projector, 5e-5),  # trained: given; the rate is our choice, that of HYDRA
        },
        muon_scale=0.0,  # our choice: AdamW
        weight_decay=0.01,  # our choice
        warmup_steps=1000,  # our choice
        decay_share=0.0,  # our choice: constant
        max_grad_norm=1.0,  # our choice
        ema_decay=0.0,  # our choice: no average
        mixed_precision="bf16",  # our choice, over fp32 weights
        drop_prompt=0.1,  # our choice: 5 % of the edits keep their source, 5 % have neither, as InstructPix2Pix
    )
    # given, except the share of edits (our choice): about 2M, next to 70M pairs
    tasks = tasks_of(image_caption=2, image_generation=6, video_caption=1, video_sft=1, edit=10 / 35)
    stage2 = replace(
        stage1,
        name="stage2",
        num_steps=200_000,  # given
        tasks=tasks,
        task_weights=task_weights_of(tasks),
        image_size=512,  # given
        clip_size=512,  # our choice: 640 x 384, the size of the paper's clips, has nearly as many pixels
        learning_rates={  # our choice: those of HYDRA
            "vision_head": 5e-5,
            "model.vision_tower.sem_vit": 2e-5,
            **dict.fromkeys([*projector, *language_model], 2e-5),
        },
    )
    tasks = tasks_of(text=1, image_generation=3, video_caption=3, image_sft=1, edit=3)  # given
    stage3 = replace(
        stage2,
        name="stage3",
        num_steps=20_000,  # given
        tasks=tasks,
        task_weights=task_weights_of(tasks),
        image_size=1024,  # given
        warmup_steps=500,  # our choice
    )
    return stage1, stage2, stage3


def hydra_x_1_5b(init: str | None = None, tokenizer: str | None = None) -> HydraRecipe:
    """Qwen2.5-1.5B-Instruct and SigLIP2-So400m, as `hydra convert --video` puts them together in `init`."""
    return recipe_of("hydra_x.hydra_x_1_5b", HydraConfig.hydra_x_1_5b, stages, init, tokenizer, MAX_LENGTH)


def hydra_x_7b(init: str | None = None, tokenizer: str | None = None) -> HydraRecipe:
    """Qwen2.5-7B-Instruct and SigLIP2-So400m, as `hydra convert --video` puts them together in `init`."""
    return recipe_of("hydra_x.hydra_x_7b", HydraConfig.hydra_x_7b, stages, init, tokenizer, MAX_LENGTH)
