"""What several users ask for, as one forward of the model each: prompts, next tokens, denoising steps, images to decode."""

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from ..modeling.grid import num_tokens
from ..modeling.image_generation import GuidanceBranch, ImagePrefix
from ..modeling.modeling_hydra import HydraForConditionalGeneration
from ..modeling.prefix_cache import join_rows
from .work import Decode, Prompt, Row, Step, Token, Work


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")  # what a prompt has for each of its tokens


class PromptBatch:
    """The prompts of new answers, padded on the left, with all their images."""

    def __init__(self, model: HydraForConditionalGeneration):
        self.model = model

    def key(self, work: Prompt) -> Hashable:
        return frozenset(work.inputs) - {"pixel_values", "image_grid_thw"}

    def run(self, works: list[Prompt]) -> list[tuple[Row, Tensor]]:
        inputs = {}
        for name in {name: None for work in works for name in work.inputs}:
            values = [work.inputs[name] for work in works if name in work.inputs]
            if name in PER_TOKEN:
                inputs[name] = pad_sequence([value[0] for value in values], True, padding_side="left")
            else:
                inputs[name] = torch.cat(values)
        cache = DynamicCache(config=self.model.config.text_config)
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = self.model(
            **inputs, position_ids=position_ids, cache=cache, use_cache=True, logits_to_keep=1
        ).logits  # (B, 1, V)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        return [(Row(cache, length, index), logits[index]) for index, length in enumerate(lengths)]


class TokenBatch:
    """The next tokens of answers of any lengths, whose rows share a cache for as long as the same ones continue."""

    def __init__(self, model: HydraForConditionalGeneration):
        self.model, self.rows = model, []
        self.cache = self.attention_mask = None

    def key(self, work: Token) -> Hashable:
        return None

    def run(self, works: list[Token]) -> list[Tensor]:
        rows = [work.row for work in works]
        if not _are_same(rows, self.rows) or any(row.cache is not self.cache for row in rows):
            self._regroup(rows)
        lengths = self.attention_mask.new_tensor([[row.length] for row in rows])
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(lengths)], dim=1)
        logits = self.model(
            input_ids=lengths.new_tensor([[work.token] for work in works]), attention_mask=self.attention_mask,
            position_ids=lengths, cache=self.cache, use_cache=True,
        ).logits  # (B, 1, V)  # fmt: skip
        for row in rows:
            row.length += 1
        return list(logits)

    def _regroup(self, rows: list[Row]) -> None:
        """Joins the rows that continue now; those that do not are kept as they are."""
        cache = join_rows([row.leave() for row in rows])
        for row in self.rows:
            if row.cache is self.cache:
                row.leave()
        for index, row in enumerate(rows):
            row.cache, row.index = cache, index
        lengths = torch.tensor([row.length for row in rows], device=self.model.device)[:, None]
        places = torch.arange(cache.get_seq_length(), 0, -1, device=self.model.device)
        self.rows, self.cache, self.attention_mask = rows, cache, (places <= lengths).long()


class StepBatch:
    """Denoising steps of images at any noise levels and of any sizes, each after its own prompts."""

    def __init__(self, model: HydraForConditionalGeneration):
        self.model, self.joined = model, {}

    def key(self, work: Step) -> Hashable:
        """What must agree in one forward: the number of branches, and the sizes of an edit and of the images it is made from."""
        sources = tuple(
            None if branch.prefix.sources is None else branch.prefix.sources.num_tokens for branch in work.branches
        )
        return sources, work.grid if any(sources) else None

    def run(self, works: list[Step]) -> list[Tensor]:
        grids = [work.grid for work in works]
        sigma = torch.tensor([work.sigma for work in works], device=self.model.device)
        velocity = self.model.denoise_step(
            torch.cat([work.latents for work in works]),
            sigma,
            self._branches(works),
            image_grid_thw=torch.tensor(grids),
        )  # (total_tokens, C)
        return list(velocity.split([num_tokens(grid) for grid in grids]))

    def _branches(self, works: list[Step]) -> list[GuidanceBranch]:
        """The branches of all images, joined anew only when other images are drawn than the step before."""
        if len(works) == 1:
            return works[0].branches
        key, parts = self.key(works[0]), [work.branches for work in works]
        before, joined = self.joined.get(key, ([], None))
        if not _are_same(parts, before):
            joined = [
                GuidanceBranch(
                    ImagePrefix.joined([branch.prefix for branch in branches]),
                    torch.tensor([float(branch.weight) for branch in branches]),
                )
                for branches in zip(*parts)
            ]
            self.joined[key] = parts, joined
        return joined

    def forget(self, works: list[Step]) -> None:
        """Frees the prompts of kinds of images that are not drawn any more."""
        self.joined = {key: value for key, value in self.joined.items() if key in {self.key(work) for work in works}}


class DecodeBatch:
    """Images of clean latents."""

    def __init__(self, model: HydraForConditionalGeneration):
        self.model = model

    def key(self, work: Decode) -> Hashable:
        return None

    def run(self, works: list[Decode]) -> list[Tensor]:
        return self.model.decode_latents(
            torch.cat([work.latents for work in works]), torch.tensor([work.grid for work in works]),
            generator=[work.generator for work in works],
        )  # fmt: skip


def create_batches(model: HydraForConditionalGeneration) -> dict[type[Work], object]:
    """What runs each kind of work."""
    return {Prompt: PromptBatch(model), Token: TokenBatch(model), Step: StepBatch(model), Decode: DecodeBatch(model)}


def _are_same(values: list, others: list) -> bool:
    return len(values) == len(others) and all(value is other for value, other in zip(values, others))
