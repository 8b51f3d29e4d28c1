"""Where visual tokens are: grids, positions, patches, and images of several sizes packed one after the other.

A grid is (t, h, w) in tokens; an image has t = 1. Before the tokenizer's folds t counts the frames of a clip, after them its latent
frames. Packed, the tokens of all images are one tensor (total_tokens, ...), image by image and row by row, and `image_grid_thw`
(num_images, 3) says which belong together, as in Qwen2-VL. Inside a network, tokens are in rows (B, N, ...): either every row is an
image of one grid, or one row holds images of several grids; `grids` lists the grid, or the grids of the row.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested


Grid = tuple[int, int, int]

NUM_POSITION_FEATURES = 128


# Grids


def num_tokens(grid: Grid) -> int:
    """t h w."""
    return math.prod(grid)


def is_one_grid(grids: Sequence[Grid]) -> bool:
    """Whether all grids are the same; without a set, since the symbolic sizes of a compiled graph cannot be hashed."""
    return all(grid == grids[0] for grid in grids)


def image_grid(height: int, width: int, patch_size: int) -> Grid:
    """The grid of an image of `height` x `width` pixels. Raises ValueError unless the sides are whole patches."""
    if height % patch_size or width % patch_size or min(height, width) < 1:
        raise ValueError(f"{height=} and {width=} must be positive multiples of the patch size {patch_size}.")
    return (1, height // patch_size, width // patch_size)


def folded_length(num_frames: int, ratio: int) -> int:
    """The number of latent frames of the first `num_frames` of a clip, where `ratio` frames after the first are one."""
    return 1 + (num_frames - 1) // ratio


def check_num_frames(num_frames: int, ratio: int, start: int = 0) -> None:
    """Raises ValueError for frames, after `start` earlier ones, that are not an anchor and then groups of `ratio`."""
    first = int(start == 0)
    if num_frames < 1 or (num_frames - first) % ratio:
        groups = max(num_frames - first, 0) // ratio
        nearest = [first + ratio * number for number in (groups, groups + 1) if first + number > 0]
        expected = f"1 + {ratio}n: an anchor frame, then groups of {ratio}" if first else f"{ratio}n in a later chunk"
        raise ValueError(f"{num_frames=} must be {expected}; the nearest are {' and '.join(map(str, nearest))}.")


def clip_grid(num_frames: int, height: int, width: int, patch_size: int, ratio: int, start: int = 0) -> Grid:
    """The grid of the latents of a clip, where `ratio` frames after the first are one, and earlier chunks had `start` frames.

    Raises ValueError for a size that is not one of whole patches, and frames that are not one and then groups of `ratio`.
    """
    check_num_frames(num_frames, ratio, start)
    _, h, w = image_grid(height, width, patch_size)
    return (folded_length(start + num_frames, ratio) - folded_length(start, ratio), h, w)


def latent_grids(grids: Sequence[Grid], ratio: int) -> list[Grid]:
    """The grids of the latents of images and clips. Raises ValueError for clips of a wrong length, and for any if `ratio` is 1."""
    for num_frames, *_ in grids:
        if num_frames > 1 and ratio == 1:
            raise ValueError(
                f"Got a clip of {num_frames} frames, but without temporal folds the model reads images alone."
            )
        check_num_frames(num_frames, ratio)
    return [(folded_length(num_frames, ratio), height, width) for num_frames, height, width in grids]


def image_grids(image_grid_thw: Tensor) -> list[Grid]:
    """The grids of `image_grid_thw` (num_images, 3). Raises ValueError for another shape, or an empty grid."""
    if image_grid_thw.ndim != 2 or image_grid_thw.shape[1] != 3 or not len(image_grid_thw):
        raise ValueError(
            f"image_grid_thw {tuple(image_grid_thw.shape)} must be (num_images, 3), of at least one image."
        )
    grids = [tuple(grid) for grid in image_grid_thw.tolist()]
    if wrong := [grid for grid in grids if min(grid) < 1]:
        raise ValueError(
            f"image_grid_thw has {wrong[0]}, expected (t, h, w) of at least one patch; images have t = 1."
        )
    return grids


def aspect_buckets(max_tokens: int, max_aspect_ratio: float = 2.0) -> list[tuple[int, int]]:
    """Grids (h, w) of at most `max_tokens`, with no room for one more row or column, from tall to wide.

    Batches of one bucket have one size, and all buckets cost about the same. Raises ValueError for less than one token.
    """
    if max_tokens < 1 or max_aspect_ratio < 1:
        raise ValueError(f"{max_tokens=} and {max_aspect_ratio=} must be at least 1.")
    sizes = [(max_tokens // width, width) for width in range(1, max_tokens + 1)]
    sizes = [(h, w) for h, w in sizes if max(h, w) <= max_aspect_ratio * min(h, w)]
    return [(h, w) for h, w in sizes if max_tokens // h == w] or [(1, 1)]


# Patches and latents


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) or (B, 3, T, H, W) -> (B, N, 3 p p), frame by frame; inside a patch, channel before row before column."""
    frames = pixel_values[:, :, None] if pixel_values.ndim == 4 else pixel_values
    patches = frames.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))  # (B, 3, T, h, p, w, p)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(patches: Tensor, patch_size: int, grid: Grid) -> Tensor:
    """(B, N, 3 p p) -> (B, 3, H, W), or (B, 3, T, H, W) of several frames."""
    patches = patches.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, grid)  # (B, T, h, w, 3, p, p)
    frames = patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)
    return frames if grid[0] > 1 else frames[:, :, 0]


def latents_to_tokens(latents: Tensor) -> Tensor:
    """(B, C, h, w) or (B, C, T', h, w) -> (B, N, C)."""
    return latents.flatten(2).transpose(1, 2)


def tokens_to_latents(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) -> (B, C, h, w), or (B, C, T', h, w) of several frames."""
    return tokens.transpose(1, 2).unflatten(2, grid if grid[0] > 1 else grid[1:])


def latents_shape(channels: int, grid: Grid) -> tuple[int, ...]:
    """(C, h, w), or (C, T', h, w) of several frames."""
    return (channels, *(grid if grid[0] > 1 else grid[1:]))


# Packed images


def pack_images(images: Sequence[Tensor], patch_size: int) -> tuple[Tensor, Tensor]:
    """`pixel_values` (total_patches, 3 p p) and `image_grid_thw` (num_images, 3) of images (3, H, W) of any sizes.

    A clip (3, T, H, W) has its frames one after the other, and its grid is in frames.
    """
    clips = [image[:, None] if image.ndim == 3 else image for image in images]
    grids = [(clip.shape[1], *image_grid(*clip.shape[-2:], patch_size)[1:]) for clip in clips]
    packed = images[0].new_empty(sum(map(num_tokens, grids)), images[0].shape[0] * patch_size**2)
    for patches, clip, grid in zip(split_images(packed, grids), clips, grids):  # each written once
        places = patches.view(*grid, -1, patch_size, patch_size)
        places.copy_(clip.unflatten(3, (grid[2], -1)).unflatten(2, (grid[1], -1)).permute(1, 2, 4, 0, 3, 5))
    return packed, torch.tensor(grids)


def pack_dense(pixel_values: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """`pack_images` of a batch (num_images, 3, H, W), or of clips (num_clips, 3, T, H, W). Raises ValueError for another rank."""
    if pixel_values.ndim not in (4, 5):
        raise ValueError(f"Pixels {tuple(pixel_values.shape)} without grids must be (B, 3, H, W) or (B, 3, T, H, W).")
    packed, grids = pack_images(list(pixel_values), patch_size)
    return packed, grids.to(pixel_values.device)


def pack_levels(images: Sequence[Tensor], patch_size: int) -> Tensor:
    """As `pack_images`, with the channel last inside a patch, (total_patches, p p 3): as images are decoded, so that runs of bytes
    are copied."""
    clips = [image[:, None] if image.ndim == 3 else image for image in images]
    grids = [(clip.shape[1], *image_grid(*clip.shape[-2:], patch_size)[1:]) for clip in clips]
    packed = images[0].new_empty(sum(map(num_tokens, grids)), patch_size**2 * images[0].shape[0])
    for patches, clip, (t, h, w) in zip(split_images(packed, grids), clips, grids):
        rows = clip.permute(1, 2, 3, 0).reshape(t, h, patch_size, w, -1)
        patches.view(t, h, w, patch_size, -1).copy_(rows.transpose(2, 3))
    return packed


def unpack_images(pixel_values: Tensor, image_grid_thw: Tensor, patch_size: int) -> list[Tensor]:
    """The images (3, H, W), and clips (3, T, H, W), of packed patches."""
    grids = image_grids(image_grid_thw)
    return [
        unpatchify(patches[None], patch_size, grid)[0]
        for patches, grid in zip(split_images(pixel_values, grids), grids)
    ]


def pack_latents(latents: Tensor, image_grid_thw: Tensor | None) -> tuple[Tensor, list[Grid]]:
    """Tokens (total_tokens, C) and grids of latents, either dense (num_images, C, [T',] h, w) or already packed.

    Raises ValueError for another shape.
    """
    if image_grid_thw is not None:
        grids = image_grids(image_grid_thw)
        check_packed("latents", latents, grids)
        return latents, grids
    if latents.ndim not in (4, 5):
        raise ValueError(
            f"latents {tuple(latents.shape)} must be (num_images, C, h, w) or, of clips, (num_clips, C, T, h, w), or packed"
            " with image_grid_thw."
        )
    grid = (1, *latents.shape[2:]) if latents.ndim == 4 else tuple(latents.shape[2:])
    return latents_to_tokens(latents).flatten(0, 1), [grid] * len(latents)


def check_packed(name: str, packed: Tensor, grids: Sequence[Grid]) -> None:
    """Raises ValueError if there are not as many tokens as the grids say."""
    total = sum(map(num_tokens, grids))
    if packed.ndim != 2 or len(packed) != total:
        raise ValueError(
            f"{name} {tuple(packed.shape)} must be packed, ({total}, ...) for image_grid_thw {list(grids)}."
        )


def split_images(packed: Tensor, grids: Sequence[Grid], num_leading: int = 0) -> tuple[Tensor, ...]:
    """The tokens (N, ...) of each image, together with `num_leading` others in front of them."""
    return packed.split([num_leading + num_tokens(grid) for grid in grids])


def select_images(packed: Tensor, grids: Sequence[Grid], images: Tensor) -> Tensor:
    """The tokens of some images, by their numbers (n,), packed again."""
    if is_one_grid(grids):
        return packed.unflatten(0, (len(grids), -1))[images].flatten(0, 1)
    parts = split_images(packed, grids)
    return torch.cat([parts[index] for index in images.tolist()])


def per_token(values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Values of images (num_images, ...) repeated for each of their tokens (total_tokens, ...)."""
    if is_one_grid(grids):
        return values.repeat_interleave(num_tokens(grids[0]), dim=0)
    counts = [num_tokens(grid) for grid in grids]
    return values.repeat_interleave(torch.tensor(counts, device=values.device), dim=0, output_size=sum(counts))


def run_by_grid(
    function: Callable[..., Tensor], grids: Sequence[Grid], packed: Sequence[Tensor], per_image: Sequence[Tensor] = (),
    config: PreTrainedConfig | None = None,
) -> Tensor:  # fmt: skip
    """What `function(*rows, grids=...)` returns for images of any sizes, packed again in their order.

    Images of one grid are rows of one call. If `config` uses flash attention, all images are one row of one call.

    Args:
        packed: tensors (total_tokens, ...), which `function` gets as rows (B, N, ...).
        per_image: tensors (num_images, ...), of which each call gets those of its images.
    """
    if is_one_grid(grids):
        rows = [tensor.unflatten(0, (len(grids), -1)) for tensor in packed]
        return function(*rows, *per_image, grids=grids[:1]).flatten(0, 1)
    if config is not None and is_flash_attention_requested(config):
        return function(*[tensor[None] for tensor in packed], *per_image, grids=grids)[0]
    images = [split_images(tensor, grids) for tensor in packed]
    outputs: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        members = [index for index, other in enumerate(grids) if other == grid]
        rows = [torch.stack([parts[index] for index in members]) for parts in images]
        outputs |= zip(members, function(*rows, *[tensor[members] for tensor in per_image], grids=[grid]))
    return torch.cat([outputs[index] for index in range(len(grids))])


def noise_tokens(
    grids: Sequence[Grid], channels: int, generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """Gaussian noise (total_tokens, C) for latents; for images of one size it is drawn at once, (num_images, C, h, w).

    Args:
        generator: one for all, or one for each image; None is torch's global generator.
    """
    from diffusers.utils.torch_utils import randn_tensor

    if is_one_grid(grids):
        noise = randn_tensor((len(grids), *latents_shape(channels, grids[0])), generator=generator, device=device)
        return latents_to_tokens(noise).flatten(0, 1)
    generators = generator if isinstance(generator, list) else [generator] * len(grids)
    shapes = [(1, *latents_shape(channels, grid)) for grid in grids]
    noise = [randn_tensor(shape, generator=one, device=device) for shape, one in zip(shapes, generators)]
    return torch.cat([latents_to_tokens(image)[0] for image in noise])


# Rows


def varlen_arguments(lengths: Sequence[int], device: torch.device) -> dict:
    """Arguments that tell flash attention where the images of a row begin; {} for one image per row."""
    if len(lengths) == 1:
        return {}
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return {
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


def in_rows(values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Values of images (num_images, D) that broadcast over rows: (B, 1, D), or (1, N, D) for a row of several images."""
    return values[:, None] if len(grids) == 1 else per_token(values, grids)[None]


def prepend(hidden_states: Tensor, leading: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Rows (B, N, D) with one more token, from `leading` (num_images, D), in front of each image."""
    if len(grids) == 1:
        return torch.cat([leading[:, None], hidden_states], dim=1)
    pairs = zip(leading[:, None], split_images(hidden_states[0], grids))
    return torch.cat([part for pair in pairs for part in pair])[None]


# Positions


def grid_positions(grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of each token of a row of grids, (N,) each."""
    positions = [torch.meshgrid(*[torch.arange(n, device=device) for n in grid], indexing="ij") for grid in grids]
    return tuple(torch.cat([axes[axis].flatten() for axes in positions]) for axis in range(3))


def sinusoidal_positions_2d(grids: Sequence[Grid], hidden_size: int, like: Tensor, max_period: int = 10_000) -> Tensor:
    """Fixed sine and cosine positions (N, D): half the channels for the row, half for the column."""
    quarter = hidden_size // 4
    frequencies = max_period ** -(torch.arange(quarter, dtype=torch.float32, device=like.device) / quarter)
    angles = [position[:, None] * frequencies for position in grid_positions(grids, like.device)[1:]]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=-1).to(like.dtype)


def position_features(grids: Sequence[Grid], like: Tensor) -> Tensor:
    """Sines and cosines (N, 128) of the position of each token: in tokens from the top left, and as a share of its image.

    The share is measured in sixteenths, so that both kinds have wavelengths from a few tokens up.
    """
    count = NUM_POSITION_FEATURES // 8
    frequencies = 1000 ** -(torch.arange(count, dtype=torch.float32, device=like.device) / count)
    features = []
    for axis, position in zip((1, 2), grid_positions(grids, like.device)[1:]):
        size = per_token(torch.tensor([grid[axis] for grid in grids], device=like.device), grids)
        for coordinate in (position, 16 * (position + 0.5) / size):
            angles = coordinate[:, None] * frequencies
            features += [angles.sin(), angles.cos()]
    return torch.cat(features, dim=-1).to(like.dtype)


def rotary_positions_2d(grids: Sequence[Grid], head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, head_dim) that rotate half of each head by the row and half by the column.

    The frame of a clip rotates both, with the frequencies in reverse order, so that images are as without it (our choice).
    """
    quarter = head_dim // 4
    frequencies = 10_000 ** -(torch.arange(quarter, dtype=torch.float32, device=like.device) / quarter)
    frame, *places = [position[:, None] for position in grid_positions(grids, like.device)]
    angles = [place * frequencies + frame * frequencies.flip(0) for place in places]
    angles = torch.cat([*angles, *angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


# Images in a sequence with text


def get_image_block_ids(mm_token_type_ids: Tensor, past_length: int = 0) -> Tensor:
    """k in image k and -1 in text, (B, past + L): attention is bidirectional in a block and causal elsewhere.

    The masks index by absolute position, so the positions in the cache are -1.
    """
    is_image = nn.functional.pad(mm_token_type_ids > 0, (past_length, 0), value=False)
    return torch.where(is_image, image_starts(is_image).int().cumsum(1) - 1, -1)


def check_token_types(mm_token_type_ids: Tensor, inputs_embeds: Tensor) -> None:
    """Raises ValueError for token types with another number of rows than the inputs (B, L, D), or with fewer positions."""
    batch_size, length = inputs_embeds.shape[:2]
    if mm_token_type_ids.ndim != 2 or len(mm_token_type_ids) != batch_size or mm_token_type_ids.shape[1] < length:
        raise ValueError(
            f"mm_token_type_ids {tuple(mm_token_type_ids.shape)} must be {(batch_size, length)}, as input_ids."
        )


def run_lengths(is_image: Tensor) -> list[int]:
    """The length of each run of image tokens in a batch (B, L), row by row."""
    steps = nn.functional.pad(is_image, (1, 1), value=False).int().flatten().diff()
    return ((steps == -1).nonzero() - (steps == 1).nonzero()).flatten().tolist()


def image_starts(is_image: Tensor) -> Tensor:
    """Where images begin, (B, L) bool, in rows whose image tokens are marked, (B, L) bool."""
    return is_image & ~nn.functional.pad(is_image, (1, 0), value=False)[:, :-1]


def count_images(mm_token_type_ids: Tensor, document_ids: Tensor | None = None) -> list[int]:
    """How many images each sample of a batch (B, L) has: a sample is a row, or one of the documents of a single row."""
    starts = image_starts(mm_token_type_ids > 0)
    if document_ids is None:
        return starts.sum(dim=1).tolist()
    return torch.bincount(document_ids[starts], minlength=int(document_ids.max()) + 1).tolist()


def place_images(inputs_embeds: Tensor, image_mask: Tensor, image_embeds: Sequence[Tensor]) -> Tensor:
    """Embeddings (B, L, D) with each image (N, D) at its placeholders (B, L).

    Raises ValueError if runs and images do not match.
    """
    needed = [len(image) for image in image_embeds]
    if not torch.compiler.is_compiling() and (runs := run_lengths(image_mask)) != needed:
        raise ValueError(
            f"input_ids have runs of {runs} image placeholders, but the images need runs of {needed}, time tokens"
            " included, with another token between two of them."
        )
    image_embeds = torch.cat(tuple(image_embeds)).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(image_mask[..., None].expand_as(inputs_embeds), image_embeds)


def drop_leading(packed: Tensor, lengths: Sequence[int], num_leading: int) -> Tensor:
    """Packed images of `lengths` tokens each, without the first `num_leading` of each."""
    if len(set(lengths)) == 1:
        return packed.unflatten(0, (len(lengths), -1))[:, num_leading:].flatten(0, 1)
    return torch.cat([image[num_leading:] for image in packed.split(lengths)])
