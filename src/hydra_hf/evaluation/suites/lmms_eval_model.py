"""HYDRA for lmms-eval, under the name `hydra`: it answers, draws, edits, and draws before it answers.

lmms-eval finds it by the entry point: `python -m lmms_eval --model hydra --model_args pretrained=FOLDER --tasks mme`.
Only lmms-eval imports this file, since its base class is needed for the classes here.
"""

import json
import re
from itertools import groupby, islice
from pathlib import Path

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from hydra_hf.data.seeds import hashed_generator
from hydra_hf.pipelines.answering import answer_conversations
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .answer_log import AnswerLog
from .drawing import write_drawn


MODES = ("understanding", "generation")
DEFAULT_NEW_TOKENS = 64
GENERATION_PROMPT = re.compile(r"\[GEN_PROMPT\](.*?)\[/GEN_PROMPT\]", re.DOTALL)
QUESTION = re.compile(r"\[QUESTION\](.*?)\[/QUESTION\]", re.DOTALL)


class HydraSimple(lmms):
    """
    The model for tasks that give a text and its images or clips, which come first.

    Args:
        pretrained: folder or Hub id.
        device, dtype: as in torch; None is the accelerator of this process, if there is one, and the checkpoint's own type.
        mode: "understanding" answers in text; "generation" draws the text, or edits the image by it, and returns the JSON of
            lmms-eval, {"text": ..., "images": [path]}.
        output_dir: where drawn images and answers go; what it has is not computed again. Needed to draw.
        max_new_tokens: where the task does not say.
        pipeline: one that is already loaded, instead of `pretrained`.
    """

    is_simple = True

    def __init__(
        self, pretrained: str | None = None, batch_size: int = 1, device: str | None = None, dtype: str | None = None,
        mode: str = "understanding", output_dir: str | None = None, seed: int = 0, num_inference_steps: int | None = None,
        guidance_scale: float | None = None, max_new_tokens: int = DEFAULT_NEW_TOKENS, pipeline: HydraPipeline | None = None,
    ):  # fmt: skip
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"Got {mode=}, expected one of {', '.join(MODES)}.")
        if (pretrained is None) == (pipeline is None):
            raise ValueError("Expected one of pretrained, a folder or Hub id, and pipeline.")
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        if pipeline is None:
            pipeline = HydraPipeline.from_pretrained(pretrained).to(device or state.device)
            pipeline = pipeline if dtype in (None, "auto") else pipeline.to(getattr(torch, dtype))
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.mode, self.batch_size = pipeline, mode, int(batch_size)
        if mode == "generation" and output_dir is None:
            raise ValueError("Got mode='generation' without output_dir, expected a folder for the images.")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.answers = AnswerLog(None if output_dir is None else self.output_dir / "answers.jsonl")
        self.seed, self.max_new_tokens = int(seed), int(max_new_tokens)
        self.drawing_options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        if self.mode == "generation":
            return [self.draw(request) for request in tqdm(requests, desc="drawn")]
        missing = [request for request in requests if self.key_of(request) not in self.answers]
        with tqdm(total=len(requests), initial=len(requests) - len(missing), desc="answered") as bar:
            for options, group in groupby(missing, key=self.options_of):
                while batch := list(islice(group, self.batch_size)):
                    given = self.answer([self.conversation_of(request) for request in batch], options)
                    self.answers.add(zip(map(self.key_of, batch), given))
                    bar.update(len(batch))
        return [self.answers[self.key_of(request)] for request in requests]

    def generate_visual_cot(self, requests: list[Instance]) -> list[str]:
        """Draws what the prompt asks for, editing the given image if there is one, and answers with both images before it."""
        if self.output_dir is None:
            raise ValueError("Got no output_dir, expected a folder for the images that are drawn before the answers.")
        for request in tqdm(requests, desc="drawn and answered"):
            if self.key_of(request) in self.answers:
                continue
            text, visuals = request.args[0], self.visuals_of(request)
            drawing, question = GENERATION_PROMPT.search(text), QUESTION.search(text)
            question = question.group(1).strip() if question else text
            prompt = drawing.group(1).strip().replace("{question}", question) if drawing else text
            path = self.draw_file(request, prompt, [visual for visual in visuals if isinstance(visual, Image.Image)])
            parts = [*map(self.part_of, visuals), {"type": "image", "image": Image.open(path)}]
            conversation = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
            self.answers.add([(self.key_of(request), *self.answer([conversation], self.options_of(request)))])
        return [self.answers[self.key_of(request)] for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("HYDRA has no adapter for tasks of several rounds.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("HYDRA answers in text: choose the task's variant with generate_until.")

    # Parts of a request: (text, generation options, doc_to_visual, number of the document, task, split)

    def options_of(self, request: Instance) -> dict:
        return dict(request.args[1])

    def address_of(self, request: Instance) -> tuple[int, str, str]:
        return request.args[3:6]

    def key_of(self, request: Instance) -> str:
        """What an answer is kept under: the document, its question, and how it is asked."""
        return json.dumps(
            [*self.address_of(request), request.args[0], self.options_of(request), self.is_simple], default=str
        )

    def document_of(self, request: Instance) -> dict:
        index, task, split = self.address_of(request)
        return self.task_dict[task][split][index]

    def visuals_of(self, request: Instance) -> list:
        visuals = request.args[2](self.document_of(request)) if request.args[2] else []
        return list(visuals or [])

    def conversation_of(self, request: Instance) -> list[dict]:
        parts = [self.part_of(visual) for visual in self.visuals_of(request)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": request.args[0]}]}]

    def part_of(self, visual) -> dict:
        """An image of PIL, or a clip by its path. Raises ValueError for anything else, and for clips of a model of images."""
        if isinstance(visual, Image.Image):
            return {"type": "image", "image": visual.convert("RGB")}
        if isinstance(visual, str) and self.pipeline.processor.video_token is not None:
            return {"type": "video", "video": visual}
        kinds = "an image" if self.pipeline.processor.video_token is None else "an image or the file of a clip"
        raise ValueError(f"Got {visual!r:.100}, but this model reads {kinds}.")

    # Work

    def answer(self, conversations: list[list[dict]], options: dict) -> list[str]:
        """Greedy answers up to the first of the strings in `until`."""
        if options.get("do_sample") or options.get("num_beams", 1) not in (None, 1):
            raise ValueError(f"Got {options}, expected greedy answers: do_sample=False and num_beams=1.")
        length = int(options.get("max_new_tokens", self.max_new_tokens))
        texts = answer_conversations(self.pipeline.model, self.pipeline.processor, conversations, length)
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        return [min((text.split(stop)[0] for stop in stops), key=len, default=text).strip() for text in texts]

    def draw(self, request: Instance) -> str:
        images = [visual for visual in self.visuals_of(request) if isinstance(visual, Image.Image)]
        return json.dumps({"text": "", "images": [str(self.draw_file(request, request.args[0], images))]})

    def draw_file(self, request: Instance, prompt: str, images: list[Image.Image]) -> Path:
        """The file of the drawn image, or of the edited one if images are given."""
        index, task, split = self.address_of(request)
        path = self.output_dir / task / split / f"{index}.png"
        if not path.is_file():
            options = {name: value for name, value in self.drawing_options.items() if value is not None}
            if images:
                options["image"] = [[image.convert("RGB") for image in images]]
            generator = hashed_generator(self.seed, int(index))
            write_drawn(path, self.pipeline([prompt], generator=generator, return_dict=False, **options)[0][0])
        return path


class HydraChat(HydraSimple):
    """The model for tasks that give messages, in which text and images take turns.

    Parts of a request: (text, doc_to_messages, generation options, number of the document, task, split).
    """

    is_simple = False

    def options_of(self, request: Instance) -> dict:
        return dict(request.args[2])

    def messages_of(self, request: Instance) -> ChatMessages:
        return ChatMessages(messages=request.args[1](self.document_of(request)))

    def visuals_of(self, request: Instance) -> list:
        images, clips, sounds = self.messages_of(request).extract_media()
        if sounds:
            raise ValueError("Got a sound, expected images and clips.")
        return [*images, *clips]

    def conversation_of(self, request: Instance) -> list[dict]:
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if part.type == "text" else self.part_of(part.url)
                    for part in message.content
                ],
            }
            for message in self.messages_of(request).messages
        ]
