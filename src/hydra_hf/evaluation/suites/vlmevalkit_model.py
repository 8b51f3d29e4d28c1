"""HYDRA for VLMEvalKit. Only `vlmevalkit.py` imports this file, since VLMEvalKit's base class is needed for the class here."""

from PIL import Image
from vlmeval.vlm.base import BaseModel

from hydra_hf.pipelines.answering import answer_conversations
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline


class HydraVLM(BaseModel):
    """Greedy answers to messages of text, images and clips, in their order."""

    INTERLEAVE = True

    def __init__(self, pipeline: HydraPipeline, max_new_tokens: int = 64):
        super().__init__()
        self.pipeline, self.max_new_tokens = pipeline, max_new_tokens

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The answer to parts {"type": "text", "image" or "video", "value": text or file}."""
        conversation = [{"role": "user", "content": [self.part_of(part) for part in message]}]
        (given,) = answer_conversations(
            self.pipeline.model, self.pipeline.processor, [conversation], self.max_new_tokens
        )
        return given

    def part_of(self, part: dict) -> dict:
        kind, value = part["type"], part["value"]
        if kind == "image":
            return {"type": "image", "image": Image.open(value).convert("RGB")}
        if kind == "text" or (kind == "video" and self.pipeline.processor.video_token is not None):
            return {"type": kind, kind: value}
        raise ValueError(f"Got a part of the type {kind!r}, which this model does not read.")
