"""Models of the papers' sizes with random weights, and a prompt for them."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from hydra_hf import HydraConfig, HydraForConditionalGeneration, HydraTokConfig, PixelFlowDecoderConfig
from hydra_hf.modeling.layers import ZeroLinear


# Qwen2.5 with the vision head of the same width: hidden, MLP, heads, layers.
SIZES = {"0.5B": (896, 4864, 14, 24), "1.5B": (1536, 8960, 12, 28)}
SPECIAL_TOKENS = {"image_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5, "null_prompt_ids": [1, 4]}


def hydra_config(size: str, layers: int) -> HydraConfig:
    """HYDRA at 448 px, 1024 image tokens. With fewer layers, Sem-ViT, vision head and vocabulary shrink by the same factor.

    Each part then takes the same share of a step as in the whole model.
    """
    hidden_size, intermediate_size, num_heads, all_layers = SIZES[size]
    share = layers / all_layers
    text_config = AutoConfig.for_model(
        "qwen2", hidden_size=hidden_size, intermediate_size=intermediate_size, num_attention_heads=num_heads,
        num_key_value_heads=2, num_hidden_layers=layers, vocab_size=round(share * 151_936),
        max_position_embeddings=32_768, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    vision_layers = max(1, round(share * 12))
    return HydraConfig(
        text_config=text_config,
        vision_config=HydraTokConfig.internvit_300m("S", num_gen_layers=vision_layers, num_sem_layers=vision_layers),
        vision_head_config={
            "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_attention_heads": num_heads,
            "num_hidden_layers": max(1, round(share * 4)),
        },
        **SPECIAL_TOKENS,
    )  # fmt: skip


def tiny_tok_config(width: int = 32) -> HydraTokConfig:
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 14}
    decoder = PixelFlowDecoderConfig(num_global_layers=1, num_flow_layers=1, **sizes)
    return HydraTokConfig(num_gen_layers=1, num_sem_layers=1, image_size=56, decoder_config=decoder, **sizes)


def tiny_config(width: int = 32) -> HydraConfig:
    sizes = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    text_config = AutoConfig.for_model(
        "qwen2", vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, **sizes,
    )  # fmt: skip
    vision_config = tiny_tok_config(width)
    return HydraConfig(
        text_config=text_config, vision_config=vision_config, vision_head_config=sizes, **SPECIAL_TOKENS
    )


@torch.no_grad()
def random_model(
    config: HydraConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> HydraForConditionalGeneration:
    """A model with random weights, also where training starts from zero, so that results can be compared."""
    torch.manual_seed(0)
    with torch.device(device):  # billions of numbers, which a CPU takes minutes to draw
        model = HydraForConditionalGeneration._from_config(config, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, ZeroLinear):
            module.weight.normal_(std=0.02)
    return model


def size_name(size: str, arguments) -> str:
    """What was measured, for a title."""
    layers = SIZES[size][-1]
    return (
        "tiny model" if arguments.tiny else f"HYDRA {size}, {arguments.layers}/{layers} of its layers and vocabulary"
    )


def guided_prompt(
    config: HydraConfig, length: int, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A prompt of `length` tokens, and the empty one at its own length."""
    ids = torch.randint(6, config.text_config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = config.vision_start_token_id
    null = torch.tensor([config.null_prompt_ids])
    rows = ids.to(device), null.to(device)
    prompt, negative = ({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows)
    return prompt, negative


def padded_together(*rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """One batch, left-padded to the longest row; token 0 pads, attention 0 hides it."""
    length = max(row["input_ids"].shape[1] for row in rows)
    return {
        name: torch.cat([nn.functional.pad(row[name], (length - row[name].shape[1], 0)) for row in rows])
        for name in rows[0]
    }


def gaussian_latents(config: HydraConfig, device: str = "cpu") -> Tensor:
    side = config.vision_config.image_size // config.vision_config.patch_size
    shape = (1, config.vision_config.latent_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def whole_sequence_step(model, prompt: dict[str, Tensor], latents: Tensor, sigma: Tensor, scale: float) -> Tensor:
    """A step without a cache: prompt, padding and image through every part of both branches, the language head too.

    `prompt` are the rows of both branches.
    """
    num_tokens = model.config.num_time_tokens + latents[0, 0].numel()
    images = torch.full((2, num_tokens), model.config.image_token_id, device=latents.device)
    attention_mask = torch.cat([prompt["attention_mask"], torch.ones_like(images)], dim=1)
    velocity = model(
        input_ids=torch.cat([prompt["input_ids"], images], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        latents=latents.repeat(2, 1, 1, 1),
        sigma=sigma.repeat(2),
        is_generated=torch.ones(2, dtype=torch.bool, device=latents.device),
        use_cache=False,
    ).velocity
    conditional, unconditional = velocity.chunk(2)
    return unconditional + scale * (conditional - unconditional)
