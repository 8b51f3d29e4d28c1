"""UniMRG: post-training in which a unified model paints what it sees, so that it understands better. UniMRG, section 3.

hydra train unimrg.hydra_1_5b --init hydra-1.5b --data understand=llava.json,image_root=images \\
    --data reconstruct=llava.json,image_root=images --data depth=llava.json,image_root=images,targets=targets/depth \\
    --data segment=llava.json,image_root=images,targets=targets/segment

The baselines and the ablation differ only in their mixture: `--mixture sft`, `reca`, `depth` or `segment`.

For a model other than HYDRA: `hydra train unimrg.janus --model ID --data ...`, with the same sources.
"""

from hydra_hf.hub import subfolder_of
from hydra_hf.modeling import HydraConfig, HydraProcessor
from hydra_hf.training.recipe import HydraRecipe, HydraStage, UnifiedLossWeights, UnifiedRecipe


RATE = 1e-5  # given
MIXTURES = {  # the same number of samples of each task in every step: given
    "unimrg": ("understand", "reconstruct", "depth", "segment"),
    "sft": ("understand",),
    "reca": ("understand", "reconstruct"),  # also shows what pixels alone add
    "depth": ("understand", "depth"),
    "segment": ("understand", "segment"),
}


def tasks_of(mixture: str, num_samples: int) -> dict[str, int]:
    """`num_samples` of each task of a mixture. Raises ValueError for an unknown one."""
    if mixture not in MIXTURES:
        raise ValueError(f"{mixture=} must be one of {list(MIXTURES)}.")
    return dict.fromkeys(MIXTURES[mixture], num_samples)


def trained_modules(config: HydraConfig, rate: float) -> dict[str, float]:
    """Module -> rate. Given: the shared visual encoder, language model and heads are trained. Gen-ViT, bottleneck and pixel
    decoder, which play the part of a VAE, and the word embeddings are frozen."""
    names = ["model.vision_tower.sem_vit", "model.vision_tower.bottleneck.semantic_up_proj", "model.multi_modal_projector",
             "model.language_model", "vision_head"]  # fmt: skip
    if config.use_time_token:
        names.append("model.time_embedding")
    if not config.tie_word_embeddings:
        names.append("lm_head")
    return {**dict.fromkeys(names, rate), "model.language_model.embed_tokens": 0.0}


def stage_of(mixture: str, learning_rates: dict[str, float], **model) -> HydraStage:
    """The single stage, for every model; `model` are further fields for one that is not HYDRA."""
    return HydraStage(
        name=mixture,
        num_steps=1000,  # given, if the 4,000 of the paper count micro batches of one task, as its code does
        tasks=tasks_of(mixture, 128),  # given for Harmon: 16 on each of 8 GPUs
        learning_rates=learning_rates,
        muon_scale=0.0,  # given: AdamW
        weight_decay=0.02,  # given by the code
        warmup_steps=10,  # given by the code: a hundredth
        decay_share=0.99,  # our choice: linear, where the code has a cosine
        ema_decay=0.0,  # given: no average
        drop_prompt=0.0,  # our choice; the code drops a tenth of the reconstruction prompts
        **model,
    )


def hydra_1_5b(init: str | None = None, mixture: str = "unimrg") -> HydraRecipe:
    """UniMRG for a trained HYDRA of 1.5B; `init` is its folder or Hub id."""
    return _recipe("unimrg.hydra_1_5b", HydraConfig.hydra_1_5b, init, mixture)


def hydra_7b(init: str | None = None, mixture: str = "unimrg") -> HydraRecipe:
    """UniMRG for a trained HYDRA of 7B; `init` is its folder or Hub id."""
    return _recipe("unimrg.hydra_7b", HydraConfig.hydra_7b, init, mixture)


def _recipe(name: str, preset, init: str | None, mixture: str) -> HydraRecipe:
    """The sizes and tokenizer of `init`; without it, the preset's sizes and no tokenizer, enough for a dry run."""
    config = preset() if init is None else HydraConfig.from_pretrained(init, subfolder=subfolder_of(init, "model"))
    stage = stage_of(mixture, trained_modules(config, RATE))
    return HydraRecipe(
        name=name,
        config=config,
        stages=(stage,),
        init=init,
        tokenizer=None,
        processor=None
        if init is None
        else HydraProcessor.from_pretrained(init, subfolder=subfolder_of(init, "processor")),
        gradient_checkpointing=True,  # given
        max_length=min(4096, config.text_config.max_position_embeddings),  # our choice
    )


def janus(model: str, mixture: str = "unimrg") -> UnifiedRecipe:
    """UniMRG for transformers' Janus; `model` is its folder or Hub id. The paper does not train it: values are those of HYDRA's
    recipe."""
    from transformers import JanusConfig, JanusProcessor

    from hydra_hf.training.adapters import unified_rates
    from hydra_hf.training.adapters.janus import JanusChatProcessor, JanusForUniMRG

    config = JanusConfig.from_pretrained(model)
    rates, adapted = unified_rates(JanusForUniMRG, RATE), JanusForUniMRG.adapted_modules
    stage = stage_of(mixture, rates, loss_weights=UnifiedLossWeights(), lora_targets=adapted)
    processor, vision = JanusProcessor.from_pretrained(model), config.vision_config
    return UnifiedRecipe(
        name="unimrg.janus",
        config=config,
        stages=(stage,),
        init=model,
        processor=JanusChatProcessor.from_janus(processor, vision.image_size, vision.patch_size),
        model_class=JanusForUniMRG,
        gradient_checkpointing=True,
        max_length=min(4096, config.text_config.max_position_embeddings),
        guidance_scale=5.0,  # transformers' default for Janus
    )
