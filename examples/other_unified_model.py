"""Another unified model under UniMRG: the contract of `hydra_hf.training.adapters` for a new kind of model, on the toy world.

The model sees patches and paints them with one linear layer each, around a language model. It paints all patches at once.

    python examples/other_unified_model.py --out runs/painter --num_steps 200
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.processing_hydra import CHAT_TEMPLATE
from hydra_hf.toy.batches import ToyData
from hydra_hf.toy.language import ToyLanguage
from hydra_hf.toy.text_tokenizer import train_toy_tokenizer
from hydra_hf.toy.world import ToyWorld
from hydra_hf.training.adapters import PaintingOutput, UnifiedProcessor, train_unified, unified_rates
from hydra_hf.training.recipe import HydraStage, UnifiedLossWeights, UnifiedRecipe


PATCH, NUM_PATCHES = 16, 16  # an image of 64 x 64 pixels


class PatchPainter(PreTrainedModel):
    """The model. UniMRG needs `frozen_modules`, `adapted_modules`, `forward` and `generate_images`."""

    config_class = Qwen2Config
    _supports_sdpa = True
    frozen_modules = ("language_model.model.embed_tokens",)  # UniMRG's rule; all else is trained
    adapted_modules = ("language_model.model",)

    def __init__(self, config: Qwen2Config):
        super().__init__(config)
        self.language_model = Qwen2ForCausalLM(config)
        self.see = nn.Linear(3 * PATCH**2, config.hidden_size)
        self.paint = nn.Linear(config.hidden_size, 3 * PATCH**2)
        self.queries = nn.Embedding(NUM_PATCHES, config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids, attention_mask, pixel_values=None, labels=None, target_pixel_values=None, generators=None
    ):
        """`generators` are not used: nothing is random here."""
        if target_pixel_values is None:
            embeds = self.embed(input_ids, pixel_values)
            return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)
        painted = self.paint_patches(input_ids, attention_mask, pixel_values)
        return PaintingOutput(loss=nn.functional.mse_loss(painted, patches_of(target_pixel_values)))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embedded prompts (B, L, D), with the given images in place of their tokens."""
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        is_image = (input_ids == self.config.image_token_id)[..., None]
        return embeds.masked_scatter(is_image, self.see(patches_of(pixel_values)))

    def paint_patches(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Patches (B, N, 3 p p) that follow a prompt, which ends where the image begins."""
        queries = self.queries.weight.expand(len(input_ids), -1, -1)
        hidden_states = self.language_model.model(
            inputs_embeds=torch.cat([self.embed(input_ids, pixel_values), queries], dim=1),
            attention_mask=nn.functional.pad(attention_mask, (0, NUM_PATCHES), value=1),
        ).last_hidden_state
        return self.paint(hidden_states[:, -NUM_PATCHES:])

    @torch.no_grad()
    def generate_images(self, input_ids, attention_mask, pixel_values=None, *, guidance_scale, generator) -> Tensor:
        if guidance_scale != 1.0:
            raise ValueError(f"{guidance_scale=}, expected 1: this model has no guidance.")
        patches = self.paint_patches(input_ids, attention_mask, pixel_values).transpose(1, 2)
        return nn.functional.fold(patches, 4 * PATCH, PATCH, stride=PATCH)


def patches_of(pixel_values: Tensor) -> Tensor:
    """Patches (B, N, 3 p p) of images (B, 3, H, W)."""
    return nn.functional.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2)


def create_recipe(init: Path, num_steps: int) -> UnifiedRecipe:
    """The toy world's four tasks for a new model, which is saved in `init`."""
    tokenizer = train_toy_tokenizer(ToyLanguage(ToyWorld(1)).corpus())
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    torch.manual_seed(0)
    PatchPainter(config).save_pretrained(init)
    image_processor = HydraImageProcessor(size={"height": 4 * PATCH, "width": 4 * PATCH}, patch_size=PATCH)
    processor = UnifiedProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=NUM_PATCHES,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
    stage = HydraStage(
        name="unimrg", num_steps=num_steps, learning_rates=unified_rates(PatchPainter, 5e-3),
        tasks=dict.fromkeys(("understand", "reconstruct", "depth", "segment"), 8), data=ToyData(),
        held_out=ToyData(is_held_out=True), loss_weights=UnifiedLossWeights(), warmup_steps=5, ema_decay=0.0,
        mixed_precision="no",
    )  # fmt: skip
    return UnifiedRecipe(
        name="painter", config=config, stages=(stage,), init=str(init), processor=processor, model_class=PatchPainter,
        guidance_scale=1.0, log_every=10, sample_every=100,
    )  # fmt: skip


def main(out: Path, num_steps: int) -> Path:
    """The folder of the trained model."""
    return train_unified(create_recipe(out / "init", num_steps), out / "run", on_stage=print)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/painter"))
    parser.add_argument("--num_steps", type=int, default=200)
    options = parser.parse_args()
    print(main(options.out, options.num_steps))
