"""HYDRA-XTok at full size. HYDRA-X, section 2; what the paper does not give is marked as our choice.

hydra convert --vision google/siglip2-so400m-patch16-naflex --video --out init-xtok
accelerate launch --config_file examples/accelerate/multi_gpu.yaml -m hydra_hf.cli train hydra_x_tok.siglip2_so400m --init init-xtok \\
    --teacher google/siglip2-so400m-patch16-naflex --video_teacher VIDEO_TEACHER --perceptual_weights vgg16.safetensors \\
    --data generate=images --data video_generate=clips --held_out generate=others --held_out video_generate=other_clips
"""

from dataclasses import replace

from hydra_hf.modeling import HydraTokConfig
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage


def siglip2_so400m(init: str, teacher: str, video_teacher: str, video_teacher_size: int = 1024) -> Recipe:
    """Foundation on images of 256 px, then on images up to 2048 px and clips; the decoder with a discriminator on the frozen
    encoder; harmonisation, in which Sem-ViT alone is trained on the latents that have been normalised.

    Args:
        init: folder of the converted SigLIP2-So400m, with `--video`.
        teacher: SigLIP2-So400m-patch16-naflex, the paper's teacher of images.
        video_teacher: the paper's is InternVideo-Next-L; a model of transformers such as V-JEPA 2-L can take its place.
        video_teacher_size: its width.
    """
    config = HydraTokConfig.siglip2_so400m_video()
    images = TokenizerStage(
        name="foundation_images",
        num_steps=150_000,  # of the 300k that are given for the foundation; the division is our choice
        batch_size=256,  # not given: HYDRA's
        learning_rates={"model": 2e-4},
        decoder_config=config.decoder_config,
        # Which losses is given, no weight is: those of HYDRA, L1 with ours of L2. HYDRA-X does not name the cosine loss.
        loss_weights=TokenizerLossWeights(regression=1.0, kl=1e-4, cosine=0.0, distill=1.0, perceptual=0.1),
        teacher=teacher,
        distill_layers=(),  # the output of Sem-ViT
        perceptual_backbone="lpips:vgg",  # LPIPS is given, its trunk is our choice
        warmup_steps=2000,  # not given: our choice
        weight_decay=0.01,  # not given: our choice
        decay_share=0.0,  # not given: our choice
        max_grad_norm=1.0,  # not given: our choice
        ema_decay=0.9999,  # not given: our choice
        num_held_out=1024,  # not given: our choice
    )
    foundation = replace(
        images,
        name="foundation",
        learning_rates={"model": 2e-4, "decompressor": 2e-4},
        image_sizes=(256, 512, 1024, 2048),  # "256 to 2048" is given, the steps between are our choice
        clip_share=0.5,  # not given: our choice
        num_frames=17,
        images_per_clip=4,  # not given: our choice
        loss_weights=replace(images.loss_weights, video_distill=1.0),
        video_teacher=video_teacher,
        video_teacher_size=video_teacher_size,
    )
    decoder = replace(
        foundation,
        name="decoder",
        num_steps=100_000,  # not given: HYDRA's
        learning_rates={"model.pixel_decoder": 1e-5, "model.bottleneck.decoder_up_proj": 1e-5},  # not given: HYDRA's
        loss_weights=TokenizerLossWeights(
            regression=1.0, kl=0.0, cosine=0.0, perceptual=0.1, adversarial=0.075, discriminator=1.0
        ),
        discriminator_learning_rate=1e-4,  # not given: our choice
        discriminator_start=5000,  # not given: our choice
    )
    harmonisation = replace(
        foundation,
        name="harmonisation",
        num_steps=50_000,  # not given: our choice
        learning_rates={
            "model.sem_vit": 5e-5,
            "model.bottleneck.semantic_up_proj": 5e-5,
            "decompressor": 5e-5,
        },  # our choice
        loss_weights=TokenizerLossWeights(regression=0.0, kl=0.0, cosine=0.0, distill=1.0, video_distill=1.0),
    )
    return Recipe(
        name="hydra_x_tok.siglip2_so400m",
        config=config,
        stages=(images, foundation, decoder, harmonisation),
        init=init,
        gradient_checkpointing=True,  # our choice
        save_every=5000,
        sample_every=5000,
    )
