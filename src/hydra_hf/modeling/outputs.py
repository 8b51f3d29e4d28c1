"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class HydraTokOutput(ModelOutput):
    """`last_hidden_state` (B, N, D): the semantic states; `latents` (B, C, h, w), of clips (B, C, T', h, w): the normalised
    mean; `mean` and `logvar` (B, N, C): the posterior; `hidden_states`: the embeddings and the outputs of every layer,
    Gen-ViT's with the class tokens."""

    last_hidden_state: Tensor | None = None
    latents: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class HydraTokEncoderOutput(ModelOutput):
    """`latent_dist`: diffusers' Gaussian over normalised latents (B, C, h, w), of clips (B, C, T', h, w)."""

    latent_dist: object | None = None

    @property
    def latent(self) -> Tensor:
        """The mode, for pipelines that expect a deterministic autoencoder."""
        return self.latent_dist.mode()


@dataclass
class HydraTokDecoderOutput(ModelOutput):
    """`sample` (B, 3, H, W), of clips (B, 3, T, H, W), near [-1, 1] and not clamped."""

    sample: Tensor | None = None


@dataclass
class HydraTokForPreTrainingOutput(ModelOutput):
    """The inputs of the tokenizer's losses. `clean_pixel_values` (B, 3, H, W); `velocity` and its target (B, N, 3 p p) only
    with a flow decoder; `hidden_states`: the outputs of `distill_layers`, Gen-ViT's with the class token."""

    clean_pixel_values: Tensor | None = None
    velocity: Tensor | None = None
    velocity_target: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    gen_states: Tensor | None = None
    bottleneck_states: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class HydraModelOutput(BaseModelOutputWithPast):
    """`last_hidden_state` (B, L, D); `image_hidden_states` (total_tokens, D): the part of it at the images' patches, packed;
    `image_outputs`: what `get_image_features` returned for images passed as pixels."""

    image_hidden_states: Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class HydraOutput(CausalLMOutputWithPast):
    """`loss` is the sum of the losses whose targets were passed.

    `logits` are (B, L, V); with labels they are (num_labelled, V), for the positions whose next token is a label, row by row,
    except in a compiled graph.
    `velocity` is (num_generated, C, h, w), or packed if the latents are: (total_tokens of the generated images, C).
    """

    velocity: Tensor | None = None
    language_loss: Tensor | None = None
    flow_loss: Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class HydraInterleavedOutput(ModelOutput):
    """`sequences` (1, L): the prompt of `prompt_length` tokens and the answer, with a placeholder for each token of an image;
    `images`: those that were drawn, in order, each (3, H, W) near [-1, 1]; `latents`: theirs, each (1, C, h, w)."""

    sequences: Tensor | None = None
    prompt_length: int | None = None
    images: list[Tensor] | None = None
    latents: list[Tensor] | None = None
