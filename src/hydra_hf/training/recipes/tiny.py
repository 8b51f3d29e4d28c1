"""The embedded checkpoint: the papers' stages at a size that two CPU cores train in hours, on the toy world.

hydra train tiny.tokenizer
hydra train tiny.hydra
"""

from dataclasses import replace
from pathlib import Path

from transformers import Qwen2Config

from hydra_hf.hub import subfolder_of
from hydra_hf.modeling import (
    HydraConfig,
    HydraImageProcessor,
    HydraProcessor,
    HydraTokConfig,
    PixelFlowDecoderConfig,
    PixelViTDecoderConfig,
    VisionHeadConfig,
)
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.language import PAINTED, ToyLanguage
from hydra_hf.toy.teacher import ToyTeacher
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.toy.world import CANVASES, ToyWorld
from hydra_hf.training.recipe import HydraRecipe, HydraStage, Recipe, TokenizerLossWeights, TokenizerStage

from .unimrg import tasks_of, trained_modules


EMBEDDED = str(Path(__file__).parents[2] / "assets" / "hydra-tiny")
QUESTIONS = {"what": 2, "color": 2, "count": 2, "exist": 2, "horizontal": 3, "vertical": 3, "nearer": 3, "place": 2,
             "distance": 1, "describe": 1}  # fmt: skip
ATTENTION = "eager"  # torch 2.15's fused attention takes 5 to 20 times as long backwards in bf16 on a CPU


def tokenizer_config() -> HydraTokConfig:
    """A preset in small: 2.9M parameters without decoder; 16 tokens of 64 channels for a 64 px picture."""
    return HydraTokConfig(
        hidden_size=192,
        num_gen_layers=3,
        num_sem_layers=2,
        num_attention_heads=6,
        intermediate_size=576,
        image_size=64,
        patch_size=16,
    )


def tokenizer() -> Recipe:
    """Foundation with a regressing decoder, Sem-ViT after the toy teacher, then the flow decoder on the frozen encoder."""
    foundation = TokenizerStage(
        name="foundation",
        data=ToyData(canvases=CANVASES),
        held_out=ToyData(is_held_out=True),
        num_steps=3000,
        batch_size=32,
        learning_rates={"model.gen_vit": 1e-3, "model.bottleneck": 1e-3, "model.pixel_decoder": 1e-3},
        muon_scale=3.0,
        decoder_config=PixelViTDecoderConfig(
            hidden_size=192, num_hidden_layers=3, num_attention_heads=6, intermediate_size=576, patch_size=16
        ),
        loss_weights=TokenizerLossWeights(cosine=0.1),
    )
    # The papers distill from the ViT that they start from, in the same stage; here nothing is pretrained.
    semantics = replace(
        foundation,
        name="semantics",
        num_steps=500,
        batch_size=64,
        learning_rates={"model.sem_vit": 1e-3, "model.bottleneck.semantic_up_proj": 1e-3},
        loss_weights=TokenizerLossWeights(regression=0.0, kl=0.0, cosine=0.0, distill=1.0),
        teacher=ToyTeacher,
        distill_layers=(5,),
    )
    decoder = TokenizerStage(
        name="decoder",
        data=ToyData(canvases=CANVASES),
        held_out=ToyData(is_held_out=True),
        num_steps=9000,
        batch_size=32,
        learning_rates={"model.pixel_decoder": 1e-3, "model.bottleneck.decoder_up_proj": 1e-3},
        muon_scale=3.0,
        decoder_config=PixelFlowDecoderConfig(
            hidden_size=192,
            num_global_layers=2,
            num_flow_layers=4,
            num_attention_heads=6,
            intermediate_size=576,
            patch_size=16,
        ),
        loss_weights=TokenizerLossWeights(kl=0.0, cosine=0.0),
    )
    return Recipe(
        name="tiny.tokenizer",
        config=tokenizer_config(),
        stages=(foundation, semantics, decoder),
        attn_implementation=ATTENTION,
    )


def hydra_config(vision_config: HydraTokConfig, tokenizer) -> HydraConfig:
    """`HydraConfig.hydra_1_5b` in small: a Qwen2 of 6 layers over the toy world's words."""
    image_token_id, start_id, end_id = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    null_prompt = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
    return HydraConfig(
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=vision_config,
        vision_head_config=VisionHeadConfig(
            hidden_size=256, num_hidden_layers=2, num_attention_heads=8, intermediate_size=768
        ),
        null_prompt_ids=tokenizer(null_prompt).input_ids,
        image_token_id=image_token_id,
        vision_start_token_id=start_id,
        vision_end_token_id=end_id,
    )


def processor(vision_config: HydraTokConfig, tokenizer, known_words: frozenset[str]) -> HydraProcessor:
    size, patch_size = vision_config.image_size, vision_config.patch_size
    image_processor = HydraImageProcessor(size={"height": size, "width": size}, patch_size=patch_size)
    return HydraProcessor(image_processor, tokenizer, patch_size=patch_size, known_words=sorted(known_words))


def hydra(tokenizer: str = "runs/tiny.tokenizer/decoder/final") -> HydraRecipe:
    """Stages I to III on a trained tokenizer; Gen-ViT, bottleneck and decoder stay frozen.

    The language model starts from nothing, so stage I is short and stage II has to teach it to look. Descriptions come
    first, for the words; then only questions of the place and distance of one thing by its name, which make it find
    things: among descriptions, whose order is chance, it does not learn that. Sem-ViT, which knows the words from its
    teacher, follows at a tenth of the rate once image generation begins. Other canvases than 64 px come with it, and are most
    of stage III.
    """
    language = ToyLanguage(ToyWorld(difficulty=1))
    text_tokenizer = train_toy_tokenizer(language.corpus())
    vision_config = HydraTokConfig.from_pretrained(tokenizer)
    heads = {"vision_head": 1e-3, "model.multi_modal_projector": 1e-3, "model.time_embedding": 1e-3}
    language_model = {**heads, "model.language_model": 1e-3}
    everything = {**language_model, "model.vision_tower.sem_vit": 1e-4,
                  "model.vision_tower.bottleneck.semantic_up_proj": 1e-4}  # fmt: skip
    stage1 = HydraStage(
        name="stage1",
        num_steps=50,
        tasks={"understand": 8, "generate": 24},  # 0 : 1 : 3
        learning_rates=heads,
        muon_scale=3.0,
        decay_share=0.0,
        data=ToyData(max_objects=1, questions_per_image=1, question_weights={"describe": 1}),
        held_out=ToyData(is_held_out=True),
    )
    describe = replace(
        stage1, name="stage2_describe", num_steps=400, tasks={"understand": 64, "generate": 4}, learning_rates=language_model,
        decay_share=0.3, data=replace(stage1.data, max_objects=4),
    )  # fmt: skip
    find = replace(
        describe, name="stage2_find", num_steps=200, decay_share=0.0,
        data=ToyData(questions_per_image=6, question_weights={"place": 3, "distance": 1}),
    )  # fmt: skip
    # Painting an image, its depth and its boundaries takes hundreds of steps to begin at a rate that text to image does not
    # survive afterwards (`LOG.md`), so UniMRG is prepared for here.
    stage2 = replace(
        find, name="stage2", num_steps=800, tasks={"understand": 20, "generate": 28, **dict.fromkeys(PAINTED, 3)},
        task_weights={"generate": 0.8, **dict.fromkeys(PAINTED, 0.15)}, learning_rates=everything,
        data=ToyData(
            canvases=CANVASES, questions_per_image=6, question_weights=QUESTIONS, unknown_share=0.05
        ),
    )  # fmt: skip
    stage3 = replace(
        stage2, name="stage3", num_steps=1000, tasks={"understand": 12, "generate": 28, **dict.fromkeys(PAINTED, 5)},
        task_weights={"generate": 0.8, **dict.fromkeys(PAINTED, 0.3)}, decay_share=0.7,
        data=replace(stage2.data, first_canvas_share=0.25),
    )  # fmt: skip
    # The last to come right are pictures with a side of 48 px, whose objects are a patch each.
    small = tuple(canvas for canvas in CANVASES if min(canvas) < 64)
    last = replace(
        stage3, name="stage3_small", num_steps=600, tasks={"understand": 20, "generate": 28, **dict.fromkeys(PAINTED, 2)},
        task_weights={"generate": 1.0, **dict.fromkeys(PAINTED, 0.2)}, decay_share=0.8,
        learning_rates={name: 0.4 * rate for name, rate in everything.items()},
        data=replace(stage3.data, canvases=(*CANVASES, *small)),
    )  # fmt: skip
    return HydraRecipe(
        name="tiny.hydra",
        config=hydra_config(vision_config, text_tokenizer),
        stages=(stage1, describe, find, stage2, stage3, last),
        attn_implementation=ATTENTION,
        save_every=200,
        sample_every=500,
        tokenizer=tokenizer,
        processor=processor(vision_config, text_tokenizer, language.known_words),
        num_inference_steps=24,
        guidance_scale=2.0,
    )


def unimrg(init: str = EMBEDDED, mixture: str = "unimrg") -> HydraRecipe:
    """UniMRG, or another mixture of `recipes.unimrg`, on a trained toy model."""
    config = HydraConfig.from_pretrained(init, subfolder=subfolder_of(init, "model"))
    stage = HydraStage(
        name=mixture,
        num_steps=300,
        tasks=tasks_of(mixture, 12),
        learning_rates=trained_modules(config, 6e-4),
        muon_scale=3.0,
        decay_share=0.5,
        data=ToyData(questions_per_image=6),
        held_out=ToyData(is_held_out=True),
    )
    return HydraRecipe(
        name="tiny.unimrg",
        config=config,
        stages=(stage,),
        attn_implementation=ATTENTION,
        init=init,
        save_every=200,
        sample_every=500,
        tokenizer=None,
        processor=HydraProcessor.from_pretrained(init, subfolder=subfolder_of(init, "processor")),
        num_inference_steps=24,
        guidance_scale=2.0,
    )
