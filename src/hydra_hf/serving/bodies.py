"""Bodies of requests, as OpenAI's clients send them; what is not in them is refused, not ignored."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


MAX_SEED = 2**63 - 1


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def parse_size(size: str) -> tuple[int, int] | None:
    """(height, width) of "WIDTHxHEIGHT"; None for "auto"."""
    if size == "auto":
        return None
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)):
        raise ValueError(f"got {size!r:.60}, expected WIDTHxHEIGHT such as 256x256, or auto")
    return int(match[2]), int(match[1])


def _check_size(size: str) -> str:
    parse_size(size)
    return size


def _as_list(value):
    return [value] if isinstance(value, str) else value


def _none_given(value):
    """None for an empty list or dict."""
    return value or None


Size = Annotated[str, AfterValidator(_check_size)]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4), BeforeValidator(_as_list)]
Nothing = Annotated[None, BeforeValidator(_none_given)]


class ImageURL(Body):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL


class AnswerImage(ImagePart):
    """An image of an answer, after `offset` characters of its text."""

    index: int | None = None
    offset: Annotated[int, Field(ge=0)] = 0


class Message(Body):
    """A message of a chat; an assistant's may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    images: list[AnswerImage] | None = None
    name: str | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None


class Drawn(Body):
    """What says how images are drawn."""

    size: Size = "auto"
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None


class WithoutEffect(Body):
    """What clients may send to have requests accounted for."""

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(Body):
    type: Literal["text"]


class ChatBody(Drawn, WithoutEffect):
    """/v1/chat/completions"""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    max_images: Annotated[int, Field(ge=1)] = 4
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class ImageBody(Drawn, WithoutEffect):
    """/v1/images/generations"""

    model: str
    prompt: str
    negative_prompt: str = ""
    n: Annotated[int, Field(ge=1)] | None = 1
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None


class EditBody(ImageBody):
    """/v1/images/edits, without its files"""

    image_guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    input_fidelity: Literal["low", "high"] | None = None
