"""Answers and images as generators: each yields the forward that it needs next, gets its result, and reads as for one user.

An answer is `generate_interleaved` and an image a call of `HydraPipeline`, with the same numbers; `engine.py` runs what several of
them ask for in one forward.
"""

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LogitsProcessorList
from transformers.generation import GenerationConfig

from ..modeling.flow import euler_step, inference_sigmas
from ..modeling.grid import Grid, noise_tokens, num_tokens
from ..modeling.image_generation import GuidanceBranch
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..pipelines.answering import FiniteLogits
from ..pipelines.arguments import check_finite
from ..pipelines.editing import Sources
from ..pipelines.pipeline_hydra import HydraPipeline
from .text_stream import TextStream
from .work import Decode, Prompt, Step, Token, Work


@dataclass
class Drawing:
    """How images are drawn; see `HydraPipeline`."""

    height: int | None
    width: int | None
    num_inference_steps: int
    guidance_scale: float
    seed: int


@dataclass
class ImageRequest:
    """An image of a prompt, or an edit of `sources`."""

    prompt: str
    drawing: Drawing
    negative_prompt: str = ""
    sources: Sources | None = None
    image_guidance_scale: float = 1.0


@dataclass
class ChatRequest:
    """The next answer of a conversation.

    Args:
        inputs: what the processor gives for it, one row.
        text_options: what `generate` takes for text, such as do_sample, temperature and top_p.
        max_images: 0 for text alone.
        source_interaction: images are drawn as edits of the one before, see `generate_interleaved`.
    """

    inputs: BatchFeature
    max_new_tokens: int
    drawing: Drawing
    text_options: dict = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    max_images: int = 0
    source_interaction: bool = False


@dataclass
class Text:
    """The next part of the text of an answer."""

    text: str


@dataclass
class Drawn:
    """A finished image, and how many tokens it took."""

    image: Image.Image
    num_tokens: int


@dataclass
class Done:
    """The end: "stop", or "length" where the limit of tokens or of the context came first."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int


Emit = Callable[[Text | Drawn | Done], None]


def image_job(pipeline: HydraPipeline, request: ImageRequest, emit: Emit) -> Generator[Work, object, None]:
    """One image, the same as `pipeline(prompt, generator=...)` draws."""
    branches, grid, generator = prepare_image(pipeline, request)
    prompt_tokens = int(branches[-1].prefix.attention_mask.sum())
    latents = yield from denoise(pipeline.model, branches, grid, request.drawing.num_inference_steps, generator)
    emit((yield from decode(pipeline, latents, grid, generator)))
    emit(Done("stop", prompt_tokens, num_tokens(grid), num_tokens(grid)))


def prepare_image(
    pipeline: HydraPipeline, request: ImageRequest
) -> tuple[list[GuidanceBranch], Grid, torch.Generator]:
    """The prefilled branches of an image, its grid, and what draws its noise."""
    drawing, sources = request.drawing, request.sources
    grid = pipeline.get_grid(*((drawing.height, drawing.width) if sources is None else sources.size))
    pipeline.set_guidance(drawing.guidance_scale, request.image_guidance_scale)
    conditions = pipeline.get_conditions([request.prompt], [request.negative_prompt], sources)
    prefixes = [pipeline.prepare_prefix(texts, grid, sources=given) for texts, given in conditions]
    return pipeline.get_branches(prefixes, is_guided=True), grid, torch.Generator().manual_seed(drawing.seed)


def chat_job(pipeline: HydraPipeline, request: ChatRequest, emit: Emit) -> Generator[Work, object, None]:
    """One answer, the same as `reply` gives."""
    model, drawing, inputs = (
        pipeline.model,
        request.drawing,
        request.inputs.to(pipeline.model.device, pipeline.model.dtype),
    )
    start_id, context = model.config.vision_start_token_id, model.config.text_config.max_position_embeddings
    generator, sampler = (torch.Generator().manual_seed(drawing.seed) for _ in range(2))
    grid = model.get_latent_grid(drawing.height, drawing.width)
    num_image_tokens = model.config.num_time_tokens + num_tokens(grid)
    source = model.last_image(inputs) if request.source_interaction else None
    stream, reason, num_text, num_images = TextStream(pipeline.processor.tokenizer, request.stop), "stop", 0, 0
    row, logits = yield Prompt(inputs)
    ids = inputs["input_ids"]
    choice = TokenChoice(model, ids, request, can_draw=request.max_images > 0)
    while True:
        if num_text == request.max_new_tokens or ids.shape[1] >= context:
            reason = "length"
            break
        token = choice(ids, logits, sampler)
        ids, num_text = torch.cat([ids, ids.new_full((1, 1), token)], dim=1), num_text + 1
        if token == start_id:
            if ids.shape[1] + num_image_tokens >= context:
                reason = "length"
                break
            emit(Text(stream.finish()))
            yield Token(row, token)
            branches = model.branches_after(ids, row.leave(), drawing.guidance_scale, source)
            latents = yield from denoise(model, branches, grid, drawing.num_inference_steps, generator)
            emit((yield from decode(pipeline, latents, grid, generator)))
            num_images, source = num_images + 1, (latents, grid) if request.source_interaction else None
            ids = model.read_again(ids, row.leave(), grid, latents)  # the last token, <|vision_end|>, has not run yet
            row.length, token = ids.shape[1] - 1, int(ids[0, -1])
            choice = TokenChoice(model, ids, request, can_draw=num_images < request.max_images)
        elif token in choice.ends:
            break
        else:
            emit(Text(stream.push(token)))
            if stream.is_stopped:
                break
        logits = yield Token(row, token)
    emit(Text(stream.finish()))
    prompt_length = inputs["input_ids"].shape[1]
    emit(Done(reason, prompt_length, ids.shape[1] - prompt_length, num_images * num_image_tokens))


def denoise(
    model: HydraForConditionalGeneration, branches: list[GuidanceBranch], grid: Grid, num_inference_steps: int,
    generator: torch.Generator,
) -> Generator[Step, Tensor, Tensor]:  # fmt: skip
    """Clean latents (N, C), as `sample_latents`."""
    sigmas = inference_sigmas(num_inference_steps, model.get_sigma_shift(num_tokens(grid))).tolist()
    latents = noise_tokens([grid], model.config.vision_config.latent_channels, generator, model.device)
    for sigma, next_sigma in pairwise([*sigmas, 0.0]):
        velocity = yield Step(latents, sigma, branches, grid)
        latents = euler_step(latents, velocity.float(), *latents.new_tensor([[sigma], [next_sigma]]))
    return check_finite("latents", latents)


def decode(
    pipeline: HydraPipeline, latents: Tensor, grid: Grid, generator: torch.Generator
) -> Generator[Decode, Tensor, Drawn]:
    """The image of clean latents (N, C)."""
    pixels = yield Decode(latents, grid, generator)
    pixels = check_finite("images", pixels.float())
    image = pipeline.processor.image_processor.postprocess(pixels[None])[0]
    return Drawn(image, num_tokens(grid))


class TokenChoice:
    """Chooses tokens as `generate` would: with its logits processors, and its ends of the text."""

    def __init__(self, model: HydraForConditionalGeneration, ids: Tensor, request: ChatRequest, can_draw: bool):
        config = copy.deepcopy(model.generation_config)
        config.update(**request.text_options)
        config = model.text_config(config, request.max_new_tokens, can_draw)
        self.processors, config = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
            logits_processor=LogitsProcessorList([FiniteLogits()]), custom_generate=_prepared,
        )  # fmt: skip
        self.do_sample, self.ends = config.do_sample, set(config.eos_token_id) - {model.config.vision_start_token_id}

    def __call__(self, ids: Tensor, logits: Tensor, sampler: torch.Generator) -> int:
        """The next token of `ids` (1, L) for its logits (1, V)."""
        scores = self.processors(ids, logits.float())
        if not self.do_sample:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=sampler))


def _prepared(
    model, input_ids, logits_processor: LogitsProcessorList, generation_config: GenerationConfig, **kwargs
) -> tuple[LogitsProcessorList, GenerationConfig]:
    """In place of the loop of `generate`: what it has prepared for it."""
    return logits_processor, generation_config
