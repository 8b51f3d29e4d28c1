"""Janus, an autoregressive model with one encoder for seeing and one for painting, under UniMRG. UniMRG, section 4.1.

transformers has no loss for generated images, computes codes without the normalisation of its own decoder, and generates
images only from text; this file adds all three.
"""

from functools import wraps

import torch
from torch import Tensor, nn
from transformers import DynamicCache, JanusForConditionalGeneration, JanusProcessor

from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.compat import CACHE

from . import PaintingOutput, UnifiedProcessor


CHAT_TEMPLATE = """
{%- macro render(content) -%}
    {%- for part in content -%}
        {%- if part.type == 'image' -%}
            {{- '<begin_of_image><image_placeholder><end_of_image>\\n' -}}
        {%- else -%}
            {{- part.text -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|User|>: ' ~ render(message.content) ~ '\\n\\n' -}}
    {%- elif message.role == 'assistant' and message.content[0].type == 'image' -%}
        {{- '<|Assistant|>:' -}}{%- generation -%}{{- '<begin_of_image><image_placeholder>' -}}{%- endgeneration -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|Assistant|>:' -}}{%- generation -%}{{- ' ' ~ render(message.content) ~ eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- render(message.content) ~ '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
"""  # the text of the released models; the generation marks and the assistant's images are added


class JanusChatProcessor(UnifiedProcessor):
    """Chats in Janus's format."""

    image_token = "<image_placeholder>"
    vision_start_token = "<begin_of_image>"
    vision_end_token = "<end_of_image>"

    @classmethod
    def from_janus(cls, own: JanusProcessor, image_size: int, patch_size: int) -> "JanusChatProcessor":
        """Made from the processor and the sizes of a checkpoint. Raises ValueError for one whose pixels are not in [-1, 1]."""
        if [*own.image_processor.image_mean, *own.image_processor.image_std] != [0.5] * 6:
            raise ValueError(
                f"Got a Janus whose pixels have the mean {own.image_processor.image_mean} and the standard deviation"
                f" {own.image_processor.image_std}, expected 0.5 for both."
            )
        image_processor = HydraImageProcessor(size={"height": image_size, "width": image_size}, patch_size=patch_size)
        num_image_tokens = (image_size // patch_size) ** 2
        return cls(
            image_processor, own.tokenizer, num_image_tokens=num_image_tokens, chat_template=CHAT_TEMPLATE, own=own
        )


class JanusForUniMRG(JanusForConditionalGeneration):
    """Janus with a loss for generated images, and with images painted from given ones."""

    frozen_modules = ("model.vision_model", "model.vqmodel", "model.language_model.embed_tokens")
    adapted_modules = ("model.language_model",)

    def train(self, mode: bool = True) -> "JanusForUniMRG":
        super().train(mode)
        self.model.vqmodel.eval()
        return self

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Saves the model under the name of transformers' own class."""
        super().save_pretrained(save_directory, **kwargs)
        self.config.architectures = [JanusForConditionalGeneration.__name__]
        self.config.save_pretrained(save_directory)

    @wraps(JanusForConditionalGeneration.forward)  # `generate` reads the signature
    def forward(self, *args, target_pixel_values: Tensor | None = None, generators=None, **kwargs):
        """With `target_pixel_values`, a `PaintingOutput`, which has no randomness."""
        if target_pixel_values is None:
            return super().forward(*args, **kwargs)
        return PaintingOutput(loss=self.image_loss(target_pixel_values=target_pixel_values, **kwargs))

    def image_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        target_pixel_values: Tensor,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy of the target's codes; every image has the same number."""
        codes = self.encode_codes(target_pixel_values)  # (B, N)
        prompt_embeds = self.embed_prompts(input_ids, pixel_values)  # (B, L, D)
        code_embeds = self.prepare_embeddings_for_image_generation(codes[:, :-1])  # (B, N - 1, D)
        attention_mask = nn.functional.pad(attention_mask, (0, code_embeds.shape[1]), value=1)
        hidden_states = self.model.language_model(
            inputs_embeds=torch.cat([prompt_embeds, code_embeds], dim=1),
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        logits = self.model.generation_head(
            hidden_states[:, input_ids.shape[1] - 1 :]
        )  # (B, N, V), from begin-of-image on
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    @torch.no_grad()
    def encode_codes(self, pixel_values: Tensor) -> Tensor:
        """Codes (B, N) of images: the entries of the codebook nearest in direction, which is all that its decoder sees."""
        vqmodel = self.model.vqmodel
        codebook = nn.functional.normalize(vqmodel.quantize.embedding.weight, dim=-1)  # (V, C)
        with torch.autocast(pixel_values.device.type, enabled=False):  # in bf16 other entries would be the nearest
            latents = vqmodel.quant_conv(vqmodel.encoder(pixel_values.to(codebook.dtype)))
            latents = latents.flatten(2).transpose(1, 2)  # (B, N, C)
            return (latents @ codebook.T).argmax(dim=-1)

    def embed_prompts(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Embedded prompts (B, L, D) with the given images in place of their tokens."""
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        features = self.model.get_image_features(pixel_values).pooler_output.to(embeds.dtype)
        return embeds.masked_scatter(self.model.get_placeholder_mask(input_ids, embeds, features), features)

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
        """Images (B, 3, H, W), near [-1, 1], decoded from `sample_codes`."""
        codes = self.sample_codes(
            input_ids, attention_mask, pixel_values, guidance_scale=guidance_scale, generator=generator
        )
        return self.model.vqmodel.decode(codes)

    @torch.no_grad()
    def sample_codes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        *,
        guidance_scale: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Codes (B, N), sampled one after the other at temperature 1. The null condition for guidance is that of transformers:
        padding between the first token and begin-of-image."""
        embeds = self.embed_prompts(input_ids, pixel_values)
        if guidance_scale != 1.0:
            is_kept = attention_mask.cumsum(dim=1) == 1
            is_kept[:, -1] = True
            null_ids = input_ids.masked_fill(~is_kept, self.generation_config.pad_token_id)
            embeds = torch.cat([embeds, self.embed_prompts(null_ids)])
            attention_mask = attention_mask.repeat(2, 1)
        cache, codes = DynamicCache(config=self.config.text_config), []
        for _ in range(self.model.vqmodel.quantize.quant_state_dims[0] ** 2):
            hidden_states = self.model.language_model(
                inputs_embeds=embeds, attention_mask=attention_mask, use_cache=True, **{CACHE: cache}
            ).last_hidden_state
            logits = self.model.generation_head(hidden_states[:, -1]).float()
            if guidance_scale != 1.0:
                logits, null_logits = logits.chunk(2)
                logits = null_logits + guidance_scale * (logits - null_logits)
            probabilities = logits.softmax(dim=-1).to(generator.device)
            codes.append(torch.multinomial(probabilities, 1, generator=generator).to(logits.device))  # (B, 1)
            embeds = self.prepare_embeddings_for_image_generation(codes[-1])
            embeds = embeds.repeat(len(attention_mask) // len(embeds), 1, 1)
            attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
        return torch.cat(codes, dim=1)
