"""The Harmon kind under UniMRG: one masked autoencoder sees and paints, with a language model in between. UniMRG, section 4.1.

    class Harmon(HarmonForUniMRG, HarmonModel): ...      # HarmonModel: a `PreTrainedModel` with the published code's parts

`HarmonForUniMRG` uses these parts under their published names: `vae` (`encode(x).mode()`, `decode(z)`) and `vae_scale`; `llm`, a
causal language model of transformers; `mar` (`buffer_size`, `patch_size`, `fake_latent`, `forward_mae_encoder`,
`forward_mae_decoder`, `diffusion_batch_mul`) with `mar.diffloss` (`net`, `in_channels`, `train_diffusion`, `gen_diffusion`);
`proj_in` and `proj_out`. The published code itself has never been run here: the tests use a stand-in with this interface.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.compat import CACHE
from hydra_hf.modeling.layers import scale_gradient
from hydra_hf.modeling.processing_hydra import CHAT_TEMPLATE

from . import PaintingOutput, UnifiedProcessor


class HarmonChatProcessor(UnifiedProcessor):
    """Chats in Harmon's format: Qwen's, with no marks around images."""

    @classmethod
    def from_tokenizer(cls, tokenizer, image_size: int, num_image_tokens: int) -> "HarmonChatProcessor":
        """`num_image_tokens` includes the buffer: 1024 + 64 for the released models at 512 px."""
        image_processor = HydraImageProcessor(size={"height": image_size, "width": image_size}, patch_size=16)
        template = CHAT_TEMPLATE.read_text(encoding="utf-8")
        template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>")
        return cls(image_processor, tokenizer, num_image_tokens=num_image_tokens, chat_template=template)


class HarmonForUniMRG:
    """What UniMRG needs of Harmon; a base class to name before Harmon's own. Tokens are patches of the VAE's latents, (B, N, C).

    Args, as attributes of the class:
        image_token_id: the placeholder in prompts; <|image_pad|> of Qwen2.5.
        null_prompt_ids: "Generate an image." up to the image, for guidance; () turns guidance off.
        condition_grad_scale: factor on the gradient that reaches the encoder through given images, but not through painted
            ones; the value of the released code, the paper gives none.
        num_inference_steps: rounds in which an image is filled in.
    """

    _supports_sdpa = True  # of its language model
    frozen_modules: ClassVar = ("vae", "llm.model.embed_tokens", "mar.class_emb")  # nothing reads the classes
    adapted_modules: ClassVar = ("llm.model",)
    image_token_id = 151655
    null_prompt_ids: tuple[int, ...] = ()
    condition_grad_scale = 0.1
    num_inference_steps = 32

    def train(self, mode: bool = True):
        super().train(mode)
        self.vae.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        generators: list[torch.Generator] | None = None,
    ):
        """The language model's own output, or with `target_pixel_values` a `PaintingOutput`."""
        prompt_embeds = self.embed_prompts(input_ids, pixel_values)
        if target_pixel_values is None:
            return self.llm(inputs_embeds=prompt_embeds, attention_mask=attention_mask, labels=labels)
        return PaintingOutput(loss=self.masked_loss(prompt_embeds, attention_mask, target_pixel_values, generators))

    # Seeing

    @torch.no_grad()
    def encode_tokens(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, C) of images, and their grid (h, w)."""
        latents, patch = self.vae.encode(pixel_values).mode() * self.vae_scale, self.mar.patch_size
        grid = latents.shape[-2] // patch, latents.shape[-1] // patch
        return nn.functional.unfold(latents, patch, stride=patch).transpose(1, 2), grid

    def encode_visible(self, tokens: Tensor, grid: tuple[int, int], mask: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, buffer + visible, E) of the tokens that `mask` (B, N) leaves visible, and the LLM's input (B, visible +
        buffer, D)."""
        context = self.mar.fake_latent.expand(len(tokens), -1)
        states = self.mar.forward_mae_encoder(tokens, mask, context, image_shape=grid)
        return states, self.proj_in(states).roll(-self.mar.buffer_size, dims=1)

    def embed_prompts(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Embedded prompts (B, L, D) with the given images in place of their tokens. Raises ValueError if they do not match."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        tokens, grid = self.encode_tokens(pixel_values)
        _, seen = self.encode_visible(tokens, grid, tokens.new_zeros(tokens.shape[:2]))
        seen = scale_gradient(seen, self.condition_grad_scale)
        is_image = input_ids == self.image_token_id
        if is_image.sum() != seen.shape[0] * seen.shape[1]:
            raise ValueError(f"Got {int(is_image.sum())} placeholders for {tuple(seen.shape[:2])} visual tokens.")
        return embeds.masked_scatter(is_image[..., None], seen.to(embeds.dtype))

    # Painting

    def masked_loss(
        self, prompt_embeds: Tensor, attention_mask: Tensor, pixel_values: Tensor, generators: list[torch.Generator]
    ) -> Tensor:
        """The diffusion loss of masked tokens, from 0.7 to all of each image. The encoder needs the same number in every row,
        so the first row's generator draws their share."""
        tokens, grid = self.encode_tokens(pixel_values)
        share = nn.init.trunc_normal_(torch.empty(()), mean=1.0, std=0.25, a=0.7, b=1.0, generator=generators[0])
        num_masked = math.ceil(tokens.shape[1] * share.item())
        orders = torch.stack([torch.randperm(tokens.shape[1], generator=generator) for generator in generators])
        masked = orders[:, :num_masked].to(tokens.device)
        condition = self.read_masked(tokens, grid, masked, inputs_embeds=prompt_embeds, attention_mask=attention_mask)
        return self.diffusion_loss(take(condition, masked), take(tokens, masked), generators)

    def read_masked(
        self, tokens: Tensor, grid: tuple[int, int], masked: Tensor, *, attention_mask: Tensor, **prompt
    ) -> Tensor:
        """States (B, N, D) of every token, given the prompt (its embeddings or its cache) and the tokens that are not `masked`."""
        mask = tokens.new_zeros(tokens.shape[:2]).scatter(1, masked, 1.0)
        states, visible = self.encode_visible(tokens, grid, mask)
        attention_mask = nn.functional.pad(attention_mask, (0, visible.shape[1]), value=1)
        inputs_embeds = torch.cat([prompt.pop("inputs_embeds", visible[:, :0]), visible], dim=1)
        hidden_states = self.llm.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=bool(prompt), **prompt
        ).last_hidden_state[:, -visible.shape[1] :]
        states = states + self.proj_out(hidden_states.roll(self.mar.buffer_size, dims=1))
        return self.mar.forward_mae_decoder(states, mask, image_shape=grid)

    def diffusion_loss(self, condition: Tensor, tokens: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The diffusion loss of tokens (B, M, C), each at several noise levels; a row's noise is from its own generator."""
        diffusion, repeats = self.mar.diffloss.train_diffusion, self.mar.diffusion_batch_mul
        shape, device = (repeats, *tokens.shape[1:]), tokens.device
        steps = [torch.randint(diffusion.num_timesteps, shape[:2], generator=generator) for generator in generators]
        noise = [torch.randn(shape, generator=generator) for generator in generators]
        tokens, condition = (
            values[:, None].expand(-1, repeats, -1, -1).flatten(0, 2) for values in (tokens, condition)
        )
        losses = diffusion.training_losses(
            self.mar.diffloss.net, tokens, torch.cat(steps).flatten().to(device), {"c": condition},
            noise=torch.cat(noise).flatten(0, 1).to(device),
        )  # fmt: skip
        return losses["loss"].mean()

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Images of the size of the given ones, otherwise of the encoder's own size."""
        prompts, is_guided = self.embed_prompts(input_ids, pixel_values), guidance_scale != 1.0
        grid = (self.mar.seq_h, self.mar.seq_w) if pixel_values is None else self.encode_tokens(pixel_values)[1]
        if is_guided:
            null_ids, null_mask = self.null_prompt(input_ids)
            prompts = torch.cat([prompts, self.embed_prompts(null_ids)])
            attention_mask = torch.cat([attention_mask, null_mask.to(attention_mask)])
        cache = DynamicCache(config=self.llm.config)
        self.llm.model(inputs_embeds=prompts, attention_mask=attention_mask, use_cache=True, **{CACHE: cache})
        num_tokens, num_rows = grid[0] * grid[1], len(prompts)
        orders = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in input_ids])
        orders = orders.repeat(num_rows // len(orders), 1).to(prompts.device)
        tokens = prompts.new_zeros(num_rows, num_tokens, self.mar.diffloss.in_channels)
        for num_masked, num_left in rounds(num_tokens, self.num_inference_steps):
            condition = self.read_masked(
                tokens, grid, orders[:, :num_masked], attention_mask=attention_mask, **{CACHE: cache}
            )
            cache.crop(prompts.shape[1] - cache.get_seq_length())  # visible tokens change in each round
            places = orders[:, num_left:num_masked]
            drawn = self.sample_tokens(take(condition, places), guidance_scale, generator)
            tokens = tokens.scatter(1, places[..., None].expand_as(drawn), drawn.to(tokens.dtype))
        return self.decode_tokens(tokens[: len(input_ids)], grid)

    def sample_tokens(self, condition: Tensor, guidance_scale: float, generator: torch.Generator) -> Tensor:
        """Tokens (B, M, C). The published sampler draws from torch's global generator, which is seeded from `generator`."""
        diffloss, (num_rows, num_places, _) = self.mar.diffloss, condition.shape
        num_drawn = num_rows if guidance_scale == 1.0 else num_rows // 2
        noise = torch.randn(num_drawn, num_places, diffloss.in_channels, generator=generator).to(condition)
        noise = noise.repeat(num_rows // num_drawn, 1, 1).flatten(0, 1)
        arguments = {"c": condition.flatten(0, 1)}
        predict = diffloss.net.forward
        if guidance_scale != 1.0:
            arguments["cfg_scale"], predict = guidance_scale, diffloss.net.forward_with_cfg
        devices = [condition.device] if condition.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            drawn = diffloss.gen_diffusion.p_sample_loop(
                predict, noise.shape, noise, clip_denoised=False, model_kwargs=arguments, progress=False
            )
        drawn = drawn.unflatten(0, (num_rows, num_places))[:num_drawn]
        return drawn.repeat(num_rows // num_drawn, 1, 1)  # both branches of guidance continue with the same tokens

    def null_prompt(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The null prompt and its mask in the shape of `input_ids`, padded on the left.

        Raises ValueError if there is none or it is too long.
        """
        length, own_length = input_ids.shape[1], len(self.null_prompt_ids)
        if not 0 < own_length <= length:
            raise ValueError(
                f"guidance_scale must be 1: null_prompt_ids has {own_length} tokens, the prompts {length}."
            )
        null_ids = torch.full_like(input_ids, self.null_prompt_ids[0])
        null_ids[:, length - own_length :] = input_ids.new_tensor(self.null_prompt_ids)
        return null_ids, (torch.arange(length, device=null_ids.device) >= length - own_length).expand_as(null_ids)

    def decode_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pixels (B, 3, H, W), near [-1, 1], of tokens (B, N, C)."""
        patch = self.mar.patch_size
        size = grid[0] * patch, grid[1] * patch
        latents = nn.functional.fold(tokens.transpose(1, 2), size, patch, stride=patch)
        return self.vae.decode(latents / self.vae_scale)


def take(values: Tensor, places: Tensor) -> Tensor:
    """Rows (B, M, C) of `values` (B, N, C) at `places` (B, M)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def rounds(num_tokens: int, num_rounds: int) -> list[tuple[int, int]]:
    """How many tokens are masked before and after each round, along a cosine, at least one fewer each time."""
    masked, pairs = num_tokens, []
    for index in range(num_rounds):
        left = math.floor(num_tokens * math.cos(math.pi / 2 * (index + 1) / num_rounds))
        left = 0 if index == num_rounds - 1 else max(1, min(masked - 1, left))
        if left < masked:
            pairs.append((masked, left))
        masked = left
    return pairs
