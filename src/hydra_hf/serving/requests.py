"""From the bodies of requests to what the engine runs; everything that is wrong with a request is found here."""

import copy
import secrets

from PIL import Image

from ..pipelines.editing import encode_sources
from ..pipelines.pipeline_hydra import HydraPipeline
from .bodies import MAX_SEED, ChatBody, Drawn, EditBody, ImageBody, Message, parse_size
from .errors import invalid
from .images import decode_data_url, decode_image
from .jobs import ChatRequest, Drawing, ImageRequest
from .limits import Limits


class RequestReader:
    """Turns bodies into requests. It has a processor of its own, since tokenizers are not to be used by two threads."""

    def __init__(self, pipeline: HydraPipeline, limits: Limits):
        self.pipeline, self.limits = pipeline, limits
        self.processor = copy.deepcopy(pipeline.processor)
        self.context = pipeline.model.config.text_config.max_position_embeddings

    def read_chat(self, body: ChatBody) -> list[ChatRequest]:
        """One request for each of `n` answers. Raises APIError or ValueError for what cannot be answered."""
        conversation = [self._read_message(message, index) for index, message in enumerate(body.messages)]
        num_images = sum(part["type"] == "image" for message in conversation for part in message["content"])
        if num_images > self.limits.max_input_images:
            raise invalid(f"Got {num_images} images, expected at most {self.limits.max_input_images}.", "messages")
        inputs = self.processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        self._check_length(length, "messages")
        wanted = body.max_completion_tokens or body.max_tokens
        if length + (wanted or 1) > self.context:
            raise invalid(
                f"The context of the model has {self.context} tokens: {length} in the messages and {wanted or 1} for the"
                " answer are too many.", "messages", "context_length_exceeded",
            )  # fmt: skip
        can_draw = body.modalities is None or "image" in body.modalities
        return [
            ChatRequest(
                inputs, wanted or self.context - length, drawing, _text_options(body), body.stop or [],
                max_images=body.max_images if can_draw else 0,
                source_interaction=self.processor.video_token is not None,  # HYDRA-X edits what it saw last
            )
            for drawing in self._drawings(body, body.n or 1)
        ]  # fmt: skip

    def read_image(self, body: ImageBody, files: list[bytes] | None = None) -> list[ImageRequest]:
        """One request for each of `n` images. Raises APIError or ValueError for what cannot be drawn."""
        for name in ("prompt", "negative_prompt"):
            chat = self.processor.build_image_prompt(getattr(body, name), len(files or ()))
            self._check_length(len(self.processor.tokenizer(chat).input_ids), name)
        drawings = self._drawings(body, body.n or 1)
        sources, image_scale = None, 1.0
        if isinstance(body, EditBody):
            sources = self._read_sources(files or [], drawings[0])
            image_scale = body.image_guidance_scale
            if image_scale is None:
                image_scale = self.pipeline.config.default_image_guidance_scale
        return [ImageRequest(body.prompt, drawing, body.negative_prompt, sources, image_scale) for drawing in drawings]

    def _read_message(self, message: Message, index: int) -> dict:
        role = "system" if message.role == "developer" else message.role
        if message.images and role != "assistant":
            raise invalid("Only an assistant's message has images; others have parts.", f"messages.{index}.images")
        if isinstance(message.content, list):
            parts = [
                {"type": "text", "text": part.text} if part.type == "text" else self._read_part(part.image_url.url)
                for part in message.content
            ]
        else:
            parts = self._read_answer(message)
        if not parts and role == "user":
            raise invalid("A user's message needs a content.", f"messages.{index}.content")
        return {"role": role, "content": parts}

    def _read_answer(self, message: Message) -> list[dict]:
        """Text, and images where they were in it."""
        text, parts, place = message.content or "", [], 0
        for image in message.images or []:
            parts += [{"type": "text", "text": text[place : image.offset]}, self._read_part(image.image_url.url)]
            place = image.offset
        parts.append({"type": "text", "text": text[place:]})
        return [part for part in parts if part["type"] == "image" or part["text"]]

    def _read_part(self, url: str) -> dict:
        return {"type": "image", "image": decode_data_url(url, self.limits.max_input_pixels)}

    def _read_sources(self, files: list[bytes], drawing: Drawing):
        if not 1 <= len(files) <= self.limits.max_input_images:
            raise invalid(f"Got {len(files)} images, expected 1 to {self.limits.max_input_images}.", "image")
        images: list[Image.Image] = [decode_image(content, self.limits.max_input_pixels) for content in files]
        sources = encode_sources(self.processor, [images], 1, drawing.height, drawing.width)
        self._check_pixels(sources.size)
        return sources

    def _drawings(self, body: Drawn, count: int) -> list[Drawing]:
        """How each of `count` images is drawn: with the seeds after the first."""
        config, limits = self.pipeline.config, self.limits
        if count > limits.max_n:
            raise invalid(f"Got n={count}, expected at most {limits.max_n}.", "n")
        steps = body.num_inference_steps or config.default_num_inference_steps
        if steps > limits.max_inference_steps:
            raise invalid(
                f"Got num_inference_steps={steps}, expected at most {limits.max_inference_steps}.",
                "num_inference_steps",
            )
        size = parse_size(body.size) or (None, None)
        self.pipeline.get_grid(*size)
        if size[0] is not None:
            self._check_pixels(size)
        scale = config.default_guidance_scale if body.guidance_scale is None else body.guidance_scale
        seed = secrets.randbits(62) if body.seed is None else body.seed
        return [Drawing(*size, steps, scale, (seed + index) % (MAX_SEED + 1)) for index in range(count)]

    def _check_pixels(self, size: tuple[int, int]) -> None:
        height, width = size
        if height * width > self.limits.max_image_pixels:
            raise invalid(
                f"Got an image of {width}x{height}, expected at most {self.limits.max_image_pixels} pixels.", "size"
            )

    def _check_length(self, length: int, param: str) -> None:
        if length > min(self.limits.max_prompt_tokens, self.context):
            raise invalid(
                f"Got a prompt of {length} tokens, expected at most {min(self.limits.max_prompt_tokens, self.context)}.",
                param, "context_length_exceeded",
            )  # fmt: skip


def _text_options(body: ChatBody) -> dict:
    """What `generate` takes for text; what a body leaves out is the model's own."""
    options = {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    if options.get("temperature") == 0:
        return {"do_sample": False}
    return options | {"do_sample": True, "top_k": 0} if options else {}
