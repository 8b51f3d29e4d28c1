"""The embedded checkpoint's second half, from images to clips and edits.

hydra train tiny_x.tokenizer
hydra train tiny_x.hydra
"""

from dataclasses import replace

from hydra_hf.hub import subfolder_of
from hydra_hf.modeling import HydraConfig, HydraProcessor, HydraTokConfig, HydraVideoProcessor, PixelViTDecoderConfig
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.clips import clip_corpus
from hydra_hf.toy.edits import edit_corpus
from hydra_hf.toy.language import PAINTED
from hydra_hf.toy.teacher import ToyTeacher, ToyVideoTeacher
from hydra_hf.toy.text_tokenizer import extend_toy_tokenizer, words_of
from hydra_hf.toy.world import CANVASES
from hydra_hf.training.recipe import (
    HydraLossWeights,
    HydraRecipe,
    HydraStage,
    Recipe,
    TokenizerLossWeights,
    TokenizerStage,
)

from .tiny import ATTENTION, QUESTIONS, tokenizer_config


FOLDS = [0, 2]
SMALL = tuple(canvas for canvas in CANVASES if min(canvas) == 48)  # whose objects are half as large
IMAGES = "runs/tiny.hydra/final"  # what `tiny.hydra` has trained: a model of images


def video_config() -> HydraTokConfig:
    """`tiny.tokenizer_config` with two folds, and heads that turn with the frame, which leaves images as they are."""
    return HydraTokConfig.from_dict(
        {**tokenizer_config().to_dict(), "temporal_fold_layers": FOLDS, "rotary_axes": [8, 0, 0]}
    )


def tokenizer(init: str = f"{IMAGES}/model") -> Recipe:
    """Clips for a vision tower that knows images: folds and a ViT decoder, then Sem-ViT after the toy teachers.

    Latents of images stay as they are.
    """
    decoder = TokenizerStage(
        name="decoder",
        data=ToyData(canvases=CANVASES),
        held_out=ToyData(is_held_out=True),
        num_steps=4000,
        batch_size=32,
        clip_share=0.5,
        keeps_image_latents=True,
        learning_rates={
            "model.gen_vit.embeddings.projection.weight": 1e-3,
            "model.gen_vit.folds.2.projection.weight": 1e-3,
            "model.pixel_decoder": 1e-3,
            "model.bottleneck.decoder_up_proj": 1e-3,
        },
        muon_scale=3.0,
        weight_decay=0.0,  # it would change the latents of images
        decoder_config=PixelViTDecoderConfig(
            hidden_size=192, num_hidden_layers=3, num_attention_heads=6, intermediate_size=576, patch_size=16,
            temporal_unfold_layers=[1, 3], rotary_axes=[8, 8, 8],
        ),
        loss_weights=TokenizerLossWeights(cosine=0.0),
    )  # fmt: skip
    semantics = replace(
        decoder,
        name="semantics",
        num_steps=500,
        keeps_image_latents=False,  # the encoder is frozen
        learning_rates={"model.sem_vit": 5e-4, "model.bottleneck.semantic_up_proj": 5e-4, "decompressor": 1e-3},
        loss_weights=TokenizerLossWeights(regression=0.0, kl=0.0, cosine=0.0, distill=1.0, video_distill=1.0),
        teacher=ToyTeacher,
        video_teacher=ToyVideoTeacher,
        video_teacher_size=192,
    )
    return Recipe(
        name="tiny_x.tokenizer",
        config=video_config(),
        stages=(decoder, semantics),
        init=init,
        attn_implementation=ATTENTION,
        save_every=200,
        sample_every=500,
    )


def hydra(init: str = IMAGES, tokenizer: str = "runs/tiny_x.tokenizer/decoder/final") -> HydraRecipe:
    """The five tasks of HYDRA-X for a trained toy model, on a tokenizer that encodes images as its own does.

    All tasks and the painted maps are in every step, at rates below those of `tiny.hydra`, so that what is known of images
    stays. Clips have all lengths alike at first, and most of them 17 frames later; images have a larger share later.
    """
    known = HydraProcessor.from_pretrained(init, subfolder=subfolder_of(init, "processor"))
    text_tokenizer = extend_toy_tokenizer(known.tokenizer, [*clip_corpus(), *edit_corpus()])
    config = HydraConfig.from_pretrained(init, subfolder=subfolder_of(init, "model"))
    config.text_config.vocab_size = len(text_tokenizer)
    config.video_token_id = text_tokenizer.convert_tokens_to_ids("<|video_pad|>")
    config.vision_config = HydraTokConfig.from_pretrained(tokenizer)
    heads = ("vision_head", "model.multi_modal_projector", "model.time_embedding", "model.language_model")
    semantics = ("model.vision_tower.sem_vit", "model.vision_tower.bottleneck.semantic_up_proj")
    video = HydraStage(
        name="video",
        num_steps=300,
        tasks={"understand": 6, "generate": 12, "video_understand": 12, "video_generate": 10, "edit": 8,
               **dict.fromkeys(PAINTED, 1)},
        task_weights={"generate": 0.8, "video_generate": 0.8, "edit": 0.6, **dict.fromkeys(PAINTED, 0.1)},
        learning_rates={**dict.fromkeys(heads, 6e-4), **dict.fromkeys(semantics, 1e-4)},
        muon_scale=3.0,
        warmup_steps=100,
        decay_share=0.0,
        data=ToyData(
            canvases=CANVASES, questions_per_image=6, question_weights=QUESTIONS, unknown_share=0.05, clip_lengths=(17, 9, 5)
        ),
        held_out=ToyData(is_held_out=True),
    )  # fmt: skip
    everything = replace(
        video, name="all", num_steps=900, warmup_steps=50, decay_share=0.8,
        tasks={**video.tasks, "generate": 20, "video_understand": 8, "video_generate": 12, "edit": 10},
        data=replace(video.data, clip_lengths=(17, 17, 17, 9, 5)),
    )  # fmt: skip
    edits = replace(
        everything, name="edits", num_steps=780, decay_share=0.5,  # on a GPU
        tasks={"understand": 48, "generate": 64, "video_understand": 24, "video_generate": 32, "edit": 96,
               **dict.fromkeys(PAINTED, 4)},
        task_weights={**everything.task_weights, "edit": 1.0},
        learning_rates=dict.fromkeys((*heads, *semantics), 5e-4),
        muon_scale=0.0,
        mixed_precision="no",
    )  # fmt: skip
    copies = replace(
        edits, name="copies", num_steps=300, decay_share=0.3, warmup_steps=20, weight_decay=0.0, ema_decay=0.98,
        tasks={"edit": 24},
        task_weights={},
        sigma_shifts={"edit": 50.0},
        data=ToyData(copy_share=0.5, clip_lengths=(17,)),
    )  # fmt: skip
    together = replace(
        edits, name="together", num_steps=800, decay_share=0.6,
        tasks={"understand": 12, "generate": 14, "video_understand": 2, "video_generate": 3, "edit": 24,
               **dict.fromkeys(PAINTED, 1)},
        learning_rates=dict.fromkeys((*heads, *semantics), 4e-4),
        sigma_shifts={"edit": 12.0},
        data=replace(everything.data, copy_share=0.15, first_canvas_share=0.75),
        mixed_precision="bf16",
    )  # fmt: skip
    finish = replace(
        together, name="finish", num_steps=500, warmup_steps=20, decay_share=1.0,
        tasks={**together.tasks, "understand": 14, "edit": 28},
        learning_rates=dict.fromkeys((*heads, *semantics), 3e-4),
        sigma_shifts={"edit": 8.0},
        data=replace(together.data, copy_share=0.05),
    )  # fmt: skip
    sizes = replace(
        finish, name="sizes", num_steps=470, warmup_steps=30,  # on a GPU
        tasks={"understand": 96, "generate": 140, "video_understand": 28, "video_generate": 40, "edit": 220,
               **dict.fromkeys(PAINTED, 6)},
        learning_rates=dict.fromkeys((*heads, *semantics), 5e-4),
        sigma_shifts={"edit": 5.0},
        data=replace(finish.data, first_canvas_share=0.3),
        mixed_precision="no",
    )  # fmt: skip
    background = replace(
        copies, name="background", num_steps=450, decay_share=0.4, tasks={"edit": 24, "generate": 4},
        sigma_shifts={"edit": 30.0}, data=replace(copies.data, copy_share=0.25),
    )  # fmt: skip
    # Which background a noisy picture has, is still open at sigma .6 (`LOG.md`).
    middle = replace(background, name="middle", num_steps=950, decay_share=0.5, sigma_shifts={"edit": 2.0})
    last = replace(
        finish, name="last", sigma_shifts={"edit": 2.5},
        data=replace(finish.data, canvases=(*CANVASES, *SMALL, *SMALL), first_canvas_share=0.5),
    )  # fmt: skip
    # Edits of 64 px alone cost the pictures of other sizes. `small` started from an average of the weights after `sizes` (.62) and after
    # `last` (.38), `wide` from one of `small` (.45), `sizes` and `last` (.275 each), `wide_again` and `wide_edits` both from the mean of
    # what `wide` had before and after it. The embedded checkpoint is an average, too: see its card.
    small = replace(
        last, name="small", num_steps=200, warmup_steps=10,
        tasks={"understand": 8, "generate": 28, "video_understand": 1, "video_generate": 2, "edit": 12, **dict.fromkeys(PAINTED, 1)},
        learning_rates=dict.fromkeys((*heads, *semantics), 2e-4),
        data=replace(finish.data, canvases=(*CANVASES, *SMALL), first_canvas_share=0.3),
    )  # fmt: skip
    wide = replace(
        finish, name="wide", num_steps=1100, sigma_shifts={"edit": 2.0},
        tasks={"understand": 7, "generate": 22, "video_understand": 1, "video_generate": 2, "edit": 26, **dict.fromkeys(PAINTED, 1)},
        data=replace(last.data, first_canvas_share=0.4, copy_share=0.15),
    )  # fmt: skip
    wide_again = replace(wide, name="wide_again", num_steps=1000)
    wide_edits = replace(
        wide_again, name="wide_edits", tasks={**wide.tasks, "generate": 14, "edit": 34},
        data=replace(wide.data, first_canvas_share=0.7, copy_share=0.2),
    )  # fmt: skip
    # What a flat background weighs in a latent is little, and in pixels much (`LOG.md`). `pixels` and `pixels_more` started from an
    # average of the three before them, `pixels_again` from `pixels`; `narrow`, twice, from an average of them and what they started from.
    pixels = replace(
        wide, name="pixels", num_steps=400, learning_rates=dict.fromkeys((*heads, *semantics), 2e-4),
        tasks={**wide.tasks, "generate": 16, "edit": 30},
        loss_weights=HydraLossWeights(pixels=1.0),
        data=replace(wide.data, first_canvas_share=0.6, color_field_share=0.2),
    )  # fmt: skip
    pixels_more = replace(
        pixels, name="pixels_more", num_steps=700, learning_rates=wide.learning_rates,
        loss_weights=HydraLossWeights(pixels=3.0), data=replace(pixels.data, color_field_share=0.1),
    )  # fmt: skip
    pixels_again = replace(pixels_more, name="pixels_again", num_steps=600, loss_weights=HydraLossWeights(pixels=2.0))
    narrow = replace(
        pixels_again, name="narrow", num_steps=200, learning_rates=pixels.learning_rates,
        tasks={**pixels.tasks, "understand": 4, "generate": 34, "video_generate": 1, "edit": 12},
        data=replace(pixels_again.data, canvases=(*CANVASES, *(SMALL * 6)), first_canvas_share=0.15),
    )  # fmt: skip
    stages = (
        video, everything, edits, copies, together, finish, sizes, background, middle, last, small, wide, wide_again, wide_edits,
        pixels, pixels_more, pixels_again, narrow,
    )  # fmt: skip
    return HydraRecipe(
        name="tiny_x.hydra",
        config=config,
        stages=stages,
        attn_implementation=ATTENTION,
        init=init,
        save_every=200,
        sample_every=500,
        tokenizer=tokenizer,
        processor=with_clips(known, text_tokenizer, config),
        num_inference_steps=24,
        guidance_scale=2.0,
    )


def with_clips(known: HydraProcessor, text_tokenizer, config: HydraConfig) -> HydraProcessor:
    """A processor of images that reads clips and knows what is said of clips and edits, too."""
    patch_size, image_processor = known.patch_size, known.image_processor
    video_processor = HydraVideoProcessor(
        size=dict(image_processor.size), patch_size=patch_size,
        temporal_patch_size=config.vision_config.temporal_compression_ratio,
    )  # fmt: skip
    known_words = sorted({*known.known_words, *words_of([*clip_corpus(), *edit_corpus()])})
    return HydraProcessor(
        image_processor,
        text_tokenizer,
        patch_size=patch_size,
        known_words=known_words,
        video_processor=video_processor,
    )
