"""Which tokens attend to which in a sequence: causal over text, bidirectional inside an image, nothing across samples packed
into one row."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate

from .grid import get_image_block_ids


def create_masks(
    config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None = None,
    position_ids: Tensor | None = None, mm_token_type_ids: Tensor | None = None,
):  # fmt: skip
    """transformers' masks with image blocks; `mm_token_type_ids` cover only the current chunk."""
    block_ids = None
    if mm_token_type_ids is not None and (torch.compiler.is_compiling() or (mm_token_type_ids > 0).any()):
        past_length = 0 if cache is None else int(cache.get_seq_length())
        block_ids = get_image_block_ids(mm_token_type_ids[:, -inputs_embeds.shape[1] :], past_length)
    return create_masks_for_generate(
        config.get_text_config(), inputs_embeds, attention_mask, cache, position_ids, block_sequence_ids=block_ids
    )


def choose_masks(
    config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | dict | None, cache: Cache | None,
    position_ids: Tensor | None, mm_token_type_ids: Tensor, document_ids: Tensor | None,
) -> tuple:  # fmt: skip
    """The masks and positions of a forward: of packed documents if there are any, otherwise of rows; a dict holds masks already."""
    if document_ids is not None:
        check_documents(document_ids, inputs_embeds, attention_mask, cache)
        masks = create_packed_masks(config, inputs_embeds, document_ids, mm_token_type_ids)
        return masks, document_positions(document_ids) if position_ids is None else position_ids
    if isinstance(attention_mask, dict):
        return attention_mask, position_ids
    attention_mask = full_mask(inputs_embeds, cache) if attention_mask is None else attention_mask
    return create_masks(config, inputs_embeds, attention_mask, cache, position_ids, mm_token_type_ids), position_ids


def full_mask(inputs_embeds: Tensor, cache: Cache | None) -> Tensor:
    """Ones (B, past + L). Without a mask, transformers takes jumps in the positions for packed sequences and cuts attention
    there."""
    past_length = 0 if cache is None else cache.get_seq_length()
    batch_size, length = inputs_embeds.shape[:2]
    return inputs_embeds.new_ones((batch_size, past_length + length), dtype=torch.long)


def create_packed_masks(
    config: PreTrainedConfig, inputs_embeds: Tensor, document_ids: Tensor, mm_token_type_ids: Tensor
):
    """The masks of rows with several documents, see `document_positions`, none of which attends to another."""
    # transformers finds the documents by these positions. Ids of image blocks are unique in a row, so no block joins documents.
    positions = document_positions(document_ids)
    return create_masks(config, inputs_embeds, None, None, positions, mm_token_type_ids)


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions (B, L) that restart at 0 where another document of a row begins."""
    before = nn.functional.pad(document_ids, (1, 0), value=-1)[:, :-1]
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    return index - torch.where(document_ids != before, index, 0).cummax(dim=1).values


def check_documents(document_ids: Tensor, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None):
    """Raises ValueError for ids of another shape than the inputs (B, L, D), or together with a mask or a cache."""
    if document_ids.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"document_ids {tuple(document_ids.shape)} must be {tuple(inputs_embeds.shape[:2])}, as input_ids."
        )
    if attention_mask is not None or cache is not None:
        raise ValueError("document_ids are for rows without padding and without a cache: leave attention_mask out.")
