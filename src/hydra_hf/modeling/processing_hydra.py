"""Chat messages with images and clips to the model's inputs, and its outputs to text and images."""

import re
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoInput

from .chat_messages import (
    AnswerParts,
    answer_parts,
    as_dicts,
    check_parts,
    check_placeholders,
    check_unicode,
    parts_of,
    token_starts,
)
from .compat import TypedProcessingKwargs
from .grid import Grid, folded_length, image_grid, num_tokens
from .image_processing_hydra import HydraImageProcessor
from .pretrained import IS_CODE_OF_A_REPO
from .video_processing_hydra import HydraVideoProcessor


CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
WORD_JOINER = "\u2060"  # invisible and without a line break: the text looks the same
VIDEO_TOKEN = "<|video_pad|>"


class HydraProcessor(ProcessorMixin):
    """
    Image processor, video processor and tokenizer in one.

    Text in chat messages (`apply_chat_template`, `build_image_prompt`, `encode_conversations`) is read as text: a special
    token in it is broken up by a word joiner, whoever wrote the message. `processor(text=...)` is trusted, as everywhere in
    transformers: it takes rendered templates, so never pass it what a stranger typed.

    Args:
        patch_size: side of the tokenizer's patch in pixels; the image processor has the same.
        num_time_tokens: positions for the noise level in front of the patches of every image.
        known_words: all words, in lower case, that a model of a small world has ever read; None means any word.
        chat_template: None is ChatML with images and clips (`chat_template.jinja` in this folder).
        video_processor: None for a model that only reads images. A dict holds the settings that a saved processor has.
    """

    return_mm_token_type_ids = True
    image_token = "<|image_pad|>"
    video_token = None  # without a video processor, whose attribute is then missing too, as in transformers
    vision_start_token = "<|vision_start|>"
    vision_end_token = "<|vision_end|>"
    valid_processor_kwargs = TypedProcessingKwargs

    def __init__(
        self,
        image_processor: HydraImageProcessor,
        tokenizer,
        patch_size: int = 14,
        num_time_tokens: int = 1,
        known_words: list[str] | None = None,
        chat_template: str | dict[str, str] | None = None,
        video_processor: HydraVideoProcessor | dict | None = None,
    ):
        if isinstance(video_processor, dict):
            video_processor = HydraVideoProcessor(**video_processor)
        vars(image_processor).pop("auto_map", None)  # of a repo's code, which a save would name without copying it
        added_tokens = tokenizer.get_added_vocab()
        expected_tokens = [self.image_token, self.vision_start_token, self.vision_end_token]
        if image_processor.patch_size != patch_size:
            raise ValueError(f"{patch_size=} is not the image processor's {image_processor.patch_size}.")
        if video_processor is not None:
            self.video_processor, self.video_token = video_processor, VIDEO_TOKEN
            expected_tokens.append(VIDEO_TOKEN)
            if video_processor.patch_size != patch_size:
                raise ValueError(f"{patch_size=} is not the video processor's {video_processor.patch_size}.")
        if missing_tokens := [token for token in expected_tokens if token not in added_tokens]:
            raise ValueError(f"The tokenizer has no {missing_tokens}, expected the vision tokens of Qwen.")
        self.image_token_id = added_tokens[self.image_token]
        self.video_token_id = added_tokens[VIDEO_TOKEN] if video_processor is not None else None
        self.patch_size = patch_size
        self.num_time_tokens = num_time_tokens
        self.known_words = known_words
        tokenizer.padding_side = "left"  # generation continues at the right end
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Only for a repo's own code: marking the installed class would make every later save copy this file into the folder."""
        if IS_CODE_OF_A_REPO:
            super().register_for_auto_class(auto_class)

    @classmethod
    def _get_arguments_from_pretrained(cls, name, *args, **kwargs):
        """As in transformers; in a repo's own code, which somebody has trusted, the image processor is the one next to it."""
        if not IS_CODE_OF_A_REPO:
            return super()._get_arguments_from_pretrained(name, *args, **kwargs)
        kwargs.pop("trust_remote_code", None)
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", name, **kwargs, trust_remote_code=False)
        return [HydraImageProcessor.from_pretrained(name, **kwargs), tokenizer]

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @property
    def model_input_names(self) -> list[str]:
        of_clips = [] if self.video_token is None else self.video_processor.model_input_names
        return [*super().model_input_names, *of_clips, "mm_token_type_ids"]

    # Images and clips in text

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs) -> str:
        grid = [int(side) for side in image_inputs["image_grid_thw"][image_idx]]
        return self.image_token * self.image_length(grid)

    def image_length(self, grid: Grid) -> int:
        """How many positions an image of `grid` takes in the sequence."""
        return self.num_time_tokens + num_tokens(grid)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs) -> str:
        grid = [int(side) for side in video_inputs["video_grid_thw"][video_idx]]
        return self.video_token * self.video_length(grid)

    def video_length(self, grid: Grid) -> int:
        """How many positions a clip of `grid` takes in the sequence: one image per latent frame, and the time tokens once."""
        num_frames, height, width = grid
        num_latent_frames = folded_length(num_frames, self.video_processor.temporal_patch_size)
        return self.num_time_tokens + num_latent_frames * height * width

    def prepare_inputs_layout(self, images=None, text=None, videos: VideoInput | None = None, **kwargs) -> tuple:
        if videos is not None:
            if self.video_token is None:
                raise ValueError("Got videos, but this processor has no video_processor: its model only reads images.")
            videos = self.video_processor.clips(videos)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        **kwargs,
    ) -> MultiModalData:
        """What images of (height, width) and clips of (frames, height, width) will take."""
        counts = {}
        if image_sizes is not None:
            sizes = [self.image_processor.output_size(*image_size, **kwargs) for image_size in image_sizes]
            grids = [image_grid(*size, self.patch_size) for size in sizes]
            counts["num_image_tokens"] = [self.image_length(grid) for grid in grids]
            counts["num_image_patches"] = [num_tokens(grid) for grid in grids]
        if video_sizes is not None:
            sizes = [(t, *self.video_processor.output_size(h, w, **kwargs)) for t, h, w in video_sizes]
            grids = [(t, *image_grid(h, w, self.patch_size)[1:]) for t, h, w in sizes]
            counts["num_video_tokens"] = [self.video_length(grid) for grid in grids]
        return MultiModalData(**counts)

    def validate_inputs(self, images=None, text=None, videos=None, **kwargs) -> None:
        if isinstance(text, list) and not text:
            raise ValueError("Got an empty list of texts, expected at least one.")
        if text is not None:
            for one in text:
                check_unicode("text", one)
            num_images = None if images is None else len(make_flat_list_of_images(images))
            check_placeholders(text, self.image_token, num_images, "images")
            if self.video_token is not None:
                check_placeholders(text, self.video_token, None if videos is None else len(videos), "videos")
        super().validate_inputs(images=images, text=text, videos=videos, **kwargs)

    # Chats

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text` that the model has never read, in order; none if `known_words` is None."""
        if self.known_words is None:
            return []
        known = set(self.known_words)
        return [word for word in dict.fromkeys(re.findall(r"\w+", text.lower())) if word not in known]

    def escape_special_tokens(self, text: str) -> str:
        """`text` with a word joiner inside everything that the tokenizer would read as a special token.

        Raises ValueError if it is not valid Unicode.
        """
        check_unicode("text", text)
        tokens = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= {*self.tokenizer.all_special_tokens, *self.all_special_multimodal_tokens}
        tokens |= {self.vision_start_token, self.vision_end_token}
        return token_starts(tuple(sorted(tokens))).sub(rf"\g<0>{WORD_JOINER}", text)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchFeature:
        """
        Renders messages, and with `tokenize=True` encodes them and their images.

        Special tokens in the text of any message come out as text, see the class. The messages stay as they are.
        """
        conversations, is_batched = self._readable_conversations(conversation)
        if tokenize:
            check_parts(conversations, "video")
            if not (processor_kwargs or {}).get("images"):
                check_parts(conversations, "image")
        return super().apply_chat_template(
            conversations if is_batched else conversations[0],
            chat_template,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def _readable_conversations(self, conversation) -> tuple[list[list[dict]], bool]:
        """A batch, copied, whose texts cannot be mistaken for special tokens, and whether `conversation` was a batch."""
        if not conversation:
            raise ValueError("Got no messages, expected at least one.")
        conversation = as_dicts(conversation)
        if not isinstance(conversation, (list, tuple)):
            raise ValueError(f"Got a {type(conversation).__name__}, expected a list of messages or of such lists.")
        is_batched = not isinstance(conversation[0], dict)
        conversations = conversation if is_batched else [conversation]
        return [self._readable_messages(messages) for messages in conversations], is_batched

    def _readable_messages(self, messages: list[dict]) -> list[dict]:
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"Got the conversation {messages!r}, expected a list of at least one message.")
        readable = []
        for message in messages:
            if not isinstance(message, dict):
                raise ValueError(f"Got the message {message!r}, expected a dict with the keys 'role' and 'content'.")
            content = message.get("content")
            if isinstance(content, str):
                content = self.escape_special_tokens(content)
            elif isinstance(content, (list, tuple)):
                content = self._readable_parts(content)
            else:
                raise ValueError(f"Got {content=} in a message, expected a string or a list of parts.")
            readable.append({**message, "content": content})
        return readable

    def _readable_parts(self, parts: list[dict]) -> list[dict]:
        readable = []
        for part in parts:
            if not isinstance(part, dict) or "type" not in part:
                raise ValueError(f"Got {part!r} as part of a message, expected a dict with the key 'type'.")
            if part["type"] != "text":
                readable.append(part)
                continue
            if not isinstance(part.get("text"), str):
                raise ValueError(f"Got a text part with {part.get('text')!r}, expected a string under 'text'.")
            text = part["text"]
            if readable and readable[-1]["type"] == "text":
                text = readable.pop()["text"] + text  # two neighbours may each hold half a special token
            readable.append({**part, "text": text})
        return [
            {**part, "text": self.escape_special_tokens(part["text"])} if part["type"] == "text" else part
            for part in readable
        ]

    def build_image_prompt(self, prompt: str, num_images: int = 0) -> str:
        """
        The text that makes the model generate an image of `prompt`: the user's turn, and the assistant's up to `<|vision_start|>`.

        Args:
            prompt: may be empty, the null condition of guidance.
            num_images: given images, in front of the prompt (editing).
        """
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
        chat = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return chat + self.vision_start_token

    def expand_images(self, text: str, grids: list[Grid]) -> str:
        """A rendered chat with as many placeholders for each of its images as `grids` need."""
        first, *rest = text.split(self.image_token)
        if len(rest) != len(grids):
            raise ValueError(f"Got {len(grids)} images for {len(rest)} image parts.")
        return first + "".join(self.image_token * self.image_length(grid) + part for grid, part in zip(grids, rest))

    def encode_conversations(
        self,
        conversations: list[list[dict]],
        images: list[Tensor | Grid] | None = None,
        max_length: int | None = None,
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """
        What `apply_chat_template` returns for a batch whose images are already pixels in [-1, 1], without the pixels:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, `assistant_masks`, each (B, L), and, if there are images or clips,
        `image_grid_thw` (num_images, 3), whose t is the number of frames.

        Args:
            images: tensors (3, H, W), of clips (3, T, H, W), or only their grids, in the order of the parts; None takes those in
                the parts.
            max_length: longer conversations lose their end; cutting an image is a ValueError.
        """
        conversations, is_batched = self._readable_conversations(conversations)
        if not is_batched:
            raise ValueError("Got one conversation, expected a list of conversations.")
        if images is None:
            images = _visuals(conversations)
        return self.pad_encodings(self._encode_each(conversations, images, max_length), padding_side)

    def encode_each(self, conversations: list[list[dict]]) -> list[dict[str, Tensor]]:
        """What `encode_conversations` gives for each conversation alone, without the axis of the batch: quicker than one by one."""
        conversations, _ = self._readable_conversations(conversations)
        return self._encode_each(conversations, _visuals(conversations))

    def _encode_each(
        self, conversations: list[list[dict]], images: list[Tensor | Grid], max_length: int | None = None
    ) -> list[dict[str, Tensor]]:
        if self.video_token is None and any(parts_of(conversations, "video")):
            raise ValueError(
                "Got a part of type 'video', but this processor has no video_processor: its model only reads images."
            )
        texts, generated_spans = render_jinja_template(
            conversations,
            chat_template=self._default_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        counts = [text.count(self.image_token) + text.count(self.video_token or "\0") for text in texts]
        if sum(counts) != len(images):
            raise ValueError(f"Got {len(images)} images for {sum(counts)} image parts.")
        encodings = self.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, padding=False)
        grids = iter([self._grid_of(image) for image in images])
        return [
            self._expanded(ids, offsets, spans, list(islice(grids, count)), max_length)
            for ids, offsets, spans, count in zip(
                encodings["input_ids"], encodings["offset_mapping"], generated_spans, counts
            )
        ]

    def pad_encodings(self, encodings: list[dict[str, Tensor]], padding_side: str = "left") -> dict[str, Tensor]:
        """What `encode_each` gives as one batch."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"Got {padding_side=}, expected 'left' or 'right'.")
        fillings = {"input_ids": self.tokenizer.pad_token_id}
        batch = {
            name: pad_sequence(
                [encoding[name] for encoding in encodings], True, fillings.get(name, 0), padding_side=padding_side
            )
            for name in ("input_ids", "attention_mask", "assistant_masks", "mm_token_type_ids")
        }
        grids = [encoding["image_grid_thw"] for encoding in encodings if "image_grid_thw" in encoding]
        return {**batch, "image_grid_thw": torch.cat(grids)} if grids else batch

    def _default_chat_template(self) -> str:
        if isinstance(self.chat_template, str):
            return self.chat_template
        if "default" not in self.chat_template:
            raise ValueError(f"Got the chat templates {[*self.chat_template]}, expected one named 'default'.")
        return self.chat_template["default"]

    def _grid_of(self, image: Tensor | Grid) -> Grid:
        if isinstance(image, tuple):
            return image
        if not isinstance(image, Tensor) or image.ndim not in (3, 4):
            raise ValueError(
                f"Got {getattr(image, 'shape', image)} for an image, expected a tensor (3, H, W), or (3, T, H, W) for a clip."
            )
        _, height, width = image_grid(*image.shape[-2:], self.patch_size)
        return (1 if image.ndim == 3 else image.shape[1], height, width)

    def _expanded(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        generated_spans: list[tuple[int, int]],
        grids: list[Grid],
        max_length: int | None,
    ) -> dict[str, Tensor]:
        """The encoding of one conversation, with every image expanded to its length."""
        ids, (starts, ends) = np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        is_generated = np.zeros_like(ids)
        for span_start, span_end in generated_spans:
            is_generated[(starts < span_end) & (ends > span_start)] = 1
        types = np.where(ids == self.image_token_id, 1, 0)
        if self.video_token_id is not None:
            types[ids == self.video_token_id] = 2
        lengths = np.ones_like(ids)
        lengths[types > 0] = [
            self.video_length(grid) if kind == 2 else self.image_length(grid)
            for kind, grid in zip(types[types > 0], grids)
        ]
        row, types = ids.repeat(lengths), types.repeat(lengths)
        if max_length is not None and (types[max_length:] > 0).any():
            raise ValueError(f"Got {len(row)} tokens and {max_length=}, which would cut an image.")
        row = torch.from_numpy(row[:max_length])
        encoding = {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            "assistant_masks": torch.from_numpy(is_generated.repeat(lengths)[:max_length]),
            "mm_token_type_ids": torch.from_numpy(types[:max_length]),
        }
        return {**encoding, "image_grid_thw": torch.tensor(grids)} if grids else encoding

    # Outputs

    def post_process_multimodal_output(
        self,
        generated_outputs: Tensor | Mapping[str, Any],
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs,
    ) -> list[str] | list[Image.Image] | list[AnswerParts]:
        """
        What the model generated, as text, images, or lists of parts such as messages hold.

        Args:
            generated_outputs: token ids, `pixel_values` (B, 3, H, W) when `generation_mode` is "image", or what
                `generate(generation_mode="interleaved")` returned.
            generation_mode: "text" (also when None), "image" or "interleaved".
        """
        if isinstance(generated_outputs, Mapping):  # pipelines keep its fields and not its class, and name no mode
            return [self._parts_of_answer(generated_outputs, skip_special_tokens, **kwargs)]
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        if generation_mode == "image":
            return self.image_processor.postprocess(generated_outputs, output_type="pil")
        raise ValueError(f"Got {generation_mode=}, expected 'text', 'image', or 'interleaved' with what it generates.")

    def _parts_of_answer(self, output: Mapping[str, Any], skip_special_tokens: bool, **kwargs) -> AnswerParts:
        images = self.image_processor.postprocess(output["images"])
        decode = partial(self.tokenizer.decode, skip_special_tokens=skip_special_tokens, **kwargs)
        answer = output["sequences"][0, output["prompt_length"] :].tolist()
        return answer_parts(answer, images, self.image_token_id, decode)


def _visuals(conversations: list[list[dict]]) -> list:
    """What the image and video parts of conversations hold, in order."""
    return [part.get(part["type"]) for part in parts_of(conversations, "image", "video")]
