"""HYDRA-TOK at full size. HYDRA, section 3.3; values that the paper does not give are marked as our choice.

hydra convert --vision OpenGVLab/InternViT-300M-448px-V2_5 --out init
accelerate launch --config_file examples/accelerate/multi_gpu.yaml -m hydra_hf.cli train hydra_tok.internvit_300m \\
    --init init --data generate=images --held_out generate=others --perceptual_weights vgg16.safetensors
"""

from dataclasses import replace

from hydra_hf.modeling import HydraTokConfig
from hydra_hf.training.recipe import Recipe, TokenizerLossWeights, TokenizerStage


def internvit_300m(init: str, teacher: str | None = None, decoder: str = "S") -> Recipe:
    """Foundation, then the decoder with a discriminator, on the frozen encoder.

    Args:
        init: folder of the converted InternViT-300M-448px-V2.5.
        teacher: the frozen ViT to distill from; None is `init`, which the student starts from, as in the paper.
        decoder: size of the flow decoder, "S", "M" or "L".
    """
    config = HydraTokConfig.internvit_300m(decoder)
    foundation = TokenizerStage(
        name="foundation",
        num_steps=300_000,
        batch_size=256,
        learning_rates={"model": 2e-5},
        decoder_config=config.decoder_config,
        loss_weights=TokenizerLossWeights(flow=1.0, kl=1e-4, cosine=1.0, distill=1.0, perceptual=0.1),
        teacher=teacher or init,
        distill_layers=(3, 6, 9, 12, 15, 18, 21, 24),  # not given: our choice
        perceptual_backbone="lpips:vgg",  # LPIPS is given, its trunk is our choice
        one_step_prob=0.1,  # not given: our choice
        warmup_steps=2000,  # not given: our choice
        weight_decay=0.01,  # not given: our choice
        decay_share=0.0,  # not given: our choice
        max_grad_norm=1.0,  # not given: our choice
        ema_decay=0.9999,  # not given: our choice
        num_held_out=1024,  # not given: our choice
    )
    refinement = replace(
        foundation,
        name="decoder",
        num_steps=100_000,
        learning_rates={"model.pixel_decoder": 1e-5, "model.bottleneck.decoder_up_proj": 1e-5},  # "lower": our number
        loss_weights=TokenizerLossWeights(
            flow=1.0, kl=0.0, cosine=0.0, distill=0.0, perceptual=0.1, adversarial=0.075, discriminator=1.0
        ),
        one_step_prob=0.5,  # not given: our choice; judged images should resemble decoded ones
        discriminator_learning_rate=1e-4,  # not given: our choice
        discriminator_start=5000,  # not given: our choice
    )
    return Recipe(
        name="hydra_tok.internvit_300m",
        config=config,
        stages=(foundation, refinement),
        init=init,
        gradient_checkpointing=True,  # our choice
        save_every=5000,
        sample_every=5000,
    )
