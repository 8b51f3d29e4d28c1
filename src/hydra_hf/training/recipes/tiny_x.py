"""The embedded checkpoint's way to HYDRA-X: clips for its vision tower, at a size that two CPU cores train in hours.

hydra train tiny_x.tokenizer
"""

from dataclasses import replace

from hydra_hf.modeling import HydraTokConfig, PixelViTDecoderConfig
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.teacher import ToyTeacher, ToyVideoTeacher
from hydra_hf.toy.world import CANVASES
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage

from .tiny import ATTENTION, EMBEDDED, tokenizer_config


FOLDS = [0, 2]


def video_config() -> HydraTokConfig:
    """`tiny.tokenizer_config` with two folds, and heads that turn with the frame, which leaves images as they are."""
    return HydraTokConfig.from_dict(
        {**tokenizer_config().to_dict(), "temporal_fold_layers": FOLDS, "rotary_axes": [8, 0, 0]}
    )


def tokenizer(init: str = f"{EMBEDDED}/model") -> Recipe:
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
