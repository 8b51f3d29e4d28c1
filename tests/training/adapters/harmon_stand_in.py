"""A STAND-IN for Harmon: small random parts under the names, shapes and calls of its published code, and nothing of its weights.

It shows that `HarmonForUniMRG` fits that interface as far as it is copied here; it shows nothing of the released models.
"""

from functools import cached_property

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hydra_hf.training.adapters.harmon import HarmonForUniMRG


class HarmonStandInConfig(PreTrainedConfig):
    model_type = "harmon_stand_in"

    def __init__(self, vocab_size: int = 512, image_size: int = 64, max_position_embeddings: int = 512, **kwargs):
        self.vocab_size, self.image_size, self.max_position_embeddings = (
            vocab_size,
            image_size,
            max_position_embeddings,
        )
        super().__init__(**kwargs)

    @property
    def text_config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=self.max_position_embeddings, initializer_range=0.1,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip


class Posterior:
    def __init__(self, mean: Tensor):
        self.mean = mean

    def mode(self) -> Tensor:
        return self.mean


class StandInVAE(nn.Module):
    """Patches of 16 x 16 pixels, by their 4 x 4 means of grey, exactly invertible up to that."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # something to stay frozen

    def encode(self, pixels: Tensor) -> Posterior:
        grey = nn.functional.avg_pool2d(pixels.mean(dim=1, keepdim=True), 4)
        return Posterior(nn.functional.pixel_unshuffle(grey, 4) * self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        grey = nn.functional.pixel_shuffle(latents / self.scale, 4)
        return nn.functional.interpolate(grey, scale_factor=4).expand(-1, 3, -1, -1)


class StandInNet(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.in_channels = channels
        self.time_embed = nn.Linear(1, width)
        self.cond_embed = nn.Linear(width, width)
        self.input_proj = nn.Linear(channels, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, channels))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.layers(self.input_proj(x) + self.time_embed(t[:, None].float() / 100) + self.cond_embed(c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: float) -> Tensor:
        noise, null_noise = self(x, t, c).chunk(2)
        return (null_noise + cfg_scale * (noise - null_noise)).repeat(2, 1)


class StandInDiffusion:
    """`training_losses` and `p_sample_loop` as guided-diffusion has them, by diffusers' DDPM."""

    num_timesteps = 100

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        """Made when it is first used: the model itself may be built on the meta device."""
        return DDPMScheduler(
            self.num_timesteps, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
        )

    def training_losses(self, model, x_start: Tensor, t: Tensor, model_kwargs: dict, noise: Tensor) -> dict:
        noisy = self.scheduler.add_noise(x_start, noise, t)
        return {"loss": (model(noisy, t, **model_kwargs) - x_start).square().mean(dim=-1)}

    def p_sample_loop(
        self, model, shape, noise: Tensor, clip_denoised: bool, model_kwargs: dict, progress: bool
    ) -> Tensor:
        assert noise.shape == shape
        self.scheduler.set_timesteps(10)
        for t in self.scheduler.timesteps:
            predicted = model(noise, t.expand(len(noise)), **model_kwargs)
            noise = self.scheduler.step(predicted, t, noise).prev_sample
        return noise


class StandInDiffLoss(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.in_channels = channels
        self.net = StandInNet(channels, width)
        self.train_diffusion = self.gen_diffusion = StandInDiffusion()


class StandInMAR(nn.Module):
    """A masked autoencoder that drops masked tokens in the encoder and fills their places in the decoder."""

    buffer_size, patch_size, diffusion_batch_mul = 4, 1, 4

    def __init__(self, image_size: int, channels: int = 16, width: int = 32):
        super().__init__()
        self.seq_h = self.seq_w = image_size // 16
        length = self.buffer_size + self.seq_h * self.seq_w
        self.class_emb = nn.Embedding(10, width)
        self.fake_latent = nn.Parameter(torch.randn(1, width) * 0.1)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.z_proj = nn.Linear(channels, width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, width) * 0.5)
        self.decoder_pos_embed_learned = nn.Parameter(torch.randn(1, length, width) * 0.5)
        self.encoder, self.decoder = (
            nn.TransformerEncoderLayer(width, 2, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.diffloss = StandInDiffLoss(channels, width)

    def forward_mae_encoder(self, x: Tensor, mask: Tensor, class_embedding: Tensor, image_shape=None) -> Tensor:
        buffer = class_embedding[:, None].expand(-1, self.buffer_size, -1)
        x = torch.cat([buffer, self.z_proj(x)], dim=1) + self.encoder_pos_embed_learned
        mask = torch.cat([mask.new_zeros(len(mask), self.buffer_size), mask], dim=1)
        return self.encoder(x[mask == 0].reshape(len(x), -1, x.shape[-1]))

    def forward_mae_decoder(self, x: Tensor, mask: Tensor, image_shape=None) -> Tensor:
        mask = torch.cat([mask.new_zeros(len(mask), self.buffer_size), mask], dim=1)
        filled = self.mask_token.repeat(*mask.shape, 1)
        filled[mask == 0] = x.flatten(0, 1)
        return self.decoder(filled + self.decoder_pos_embed_learned)[:, self.buffer_size :]


class HarmonStandIn(PreTrainedModel):
    config_class = HarmonStandInConfig
    vae_scale = 0.5

    def __init__(self, config: HarmonStandInConfig):
        super().__init__(config)
        self.vae = StandInVAE()
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.mar = StandInMAR(config.image_size)
        self.proj_in = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
        self.proj_out = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
        self.post_init()


class HarmonStandInForUniMRG(HarmonForUniMRG, HarmonStandIn):
    num_inference_steps = 8
