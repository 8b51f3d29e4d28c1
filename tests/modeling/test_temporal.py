"""Folds, attention from frame to frame and positions in time, each against its definition written out."""

from types import SimpleNamespace

import pytest
import torch
from tiny import gaussian
from torch import Tensor, nn

from hydra_hf.modeling.layers import ViTAttention, apply_rotary, init_layer
from hydra_hf.modeling.temporal import (
    FrameAttention,
    FrameCache,
    FrameLayout,
    TemporalFold,
    TemporalUnfold,
    attention_arguments,
    channels_to_frames,
    fold_factors,
    folded_length,
    group_frames,
    rotary_positions_3d,
    split_clip,
    unfolded_length,
    ungroup_frames,
)


FRAME = 3  # tokens
SEEN = {
    "tubelet": """1 . . . .
                  1 1 . . .
                  . 1 1 . .
                  . . 1 1 .
                  . . . 1 1""",
    "causal": """1 . . . .
                 1 1 . . .
                 1 1 1 . .
                 1 1 1 1 .
                 1 1 1 1 1""",
}


def frame_mask(mode: str, num_frames: int) -> Tensor:
    """Which frame sees which, (T, T) bool."""
    rows = [[sign == "1" for sign in line.split()] for line in SEEN[mode].splitlines()]
    return torch.tensor(rows)[:num_frames, :num_frames]


def token_mask(mode: str, num_frames: int) -> Tensor:
    return frame_mask(mode, num_frames).repeat_interleave(FRAME, 0).repeat_interleave(FRAME, 1)


# Folds


@pytest.mark.parametrize(
    ("frames", "factor", "start", "groups"),
    [
        ([1, 2, 3, 4, 5], 2, 0, [[0, 1], [2, 3], [4, 5]]),
        ([1, 2, 3, 4, 5], 4, 0, [[0, 0, 0, 1], [2, 3, 4, 5]]),
        ([1], 2, 0, [[0, 1]]),
        ([6, 7, 8, 9], 2, 5, [[6, 7], [8, 9]]),
        ([1, 2, 3], 1, 0, [[1], [2], [3]]),
    ],
)
def test_the_anchor_alone_is_padded_with_zeros_in_front(frames, factor, start, groups):
    tensor = torch.tensor([frames])
    grouped = group_frames(tensor, factor, start)
    assert grouped.tolist() == [groups]
    assert torch.equal(ungroup_frames(grouped, start), tensor)


def test_17_frames_are_9_then_5_and_17_again():
    layout = FrameLayout(((17, 2, 3), (1, 2, 2)))
    assert layout.folded(2).grids == ((9, 2, 3), (1, 2, 2))
    assert layout.folded(2).folded(2).grids == layout.folded(4).grids == ((5, 2, 3), (1, 2, 2))
    assert layout.folded(4).unfolded(2).unfolded(2) == layout


def test_the_layouts_of_chunks_add_up_to_that_of_the_clip():
    chunks = [FrameLayout(((5, 1, 1),)), FrameLayout(((8, 1, 1),), start=5), FrameLayout(((4, 1, 1),), start=13)]
    folded = [chunk.folded(2) for chunk in chunks]
    assert [(layout.grids[0][0], layout.start) for layout in folded] == [(3, 0), (4, 3), (2, 7)]
    assert [(layout.grids[0][0], layout.start) for layout in (x.folded(2) for x in folded)] == [(2, 0), (2, 2), (1, 4)]
    assert [layout.unfolded(2) for layout in folded] == chunks


@pytest.mark.parametrize("factor", [2, 4])
def test_lengths_are_undone(factor):
    assert [folded_length(n, factor) for n in (0, 1, 1 + factor, 1 + 3 * factor)] == [0, 1, 2, 4]
    assert [unfolded_length(n, factor) for n in (0, 1, 2, 4)] == [0, 1, 1 + factor, 1 + 3 * factor]


@torch.no_grad()
def test_a_fold_starts_as_the_last_frame_of_each_group():
    fold, layout = TemporalFold(4, 2), FrameLayout(((5, 1, FRAME), (1, 1, 2)))
    fold.projection.init_identity()
    states = gaussian(2, 5 * FRAME + 2, 4)
    clip, image = states.split([5 * FRAME, 2], dim=1)
    expected = torch.cat([clip.unflatten(1, (5, FRAME))[:, ::2].flatten(1, 2), image], dim=1)
    assert torch.equal(fold(states, layout), expected)


@torch.no_grad()
def test_a_fold_reads_all_frames_of_a_group_and_an_unfold_gives_each_its_own():
    fold, unfold, layout = TemporalFold(4, 2), TemporalUnfold(4, 2), FrameLayout(((3, 1, 1),))
    states = gaussian(1, 3, 4)
    weight, bias = fold.projection.weight, fold.projection.bias
    folded = fold(states, layout)
    torch.testing.assert_close(folded[:, 0], states[:, 0] @ weight[:, 4:].T + bias)
    torch.testing.assert_close(folded[:, 1], torch.cat([states[:, 1], states[:, 2]], dim=1) @ weight.T + bias)
    weight, bias = unfold.projection.weight, unfold.projection.bias
    unfolded = unfold(folded, layout.folded(2))
    torch.testing.assert_close(unfolded[:, 0], folded[:, 0] @ weight[4:].T + bias[4:])
    torch.testing.assert_close(unfolded[:, 1], folded[:, 1] @ weight[:4].T + bias[:4])
    torch.testing.assert_close(unfolded[:, 2], folded[:, 1] @ weight[4:].T + bias[4:])


@torch.no_grad()
def test_an_unfold_starts_as_copies_of_the_frame():
    unfold = TemporalUnfold(4, 4)
    unfold.projection.init_identity()
    states = gaussian(2, 2 * FRAME, 4)
    unfolded = unfold(states, FrameLayout(((2, 1, FRAME),))).unflatten(1, (5, FRAME))
    assert torch.equal(unfolded[:, 0], states[:, :FRAME])
    for frame in range(1, 5):
        assert torch.equal(unfolded[:, frame], states[:, FRAME:])


def test_a_row_of_images_needs_no_unfold_of_1():
    states = gaussian(1, 6, 4)
    assert channels_to_frames(states, FrameLayout(((1, 2, 3),)), 1) is states


def test_a_layer_named_twice_has_one_fold_of_4():
    assert fold_factors([0, 7]) == {0: 2, 7: 2}
    assert fold_factors([3, 3]) == {3: 4}


# Attention


def attention(mode: str = "tubelet", implementation: str = "sdpa", rotary_axes: tuple[int, ...] = ()) -> ViTAttention:
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_size=16, num_attention_heads=2, attention_dropout=0.0, layer_norm_eps=1e-6, temporal_attention=mode,
        rotary_axes=rotary_axes, _attn_implementation=implementation,
    )  # fmt: skip
    module = ViTAttention(config)
    with torch.no_grad():
        module.apply(lambda part: init_layer(part, 0.5))
    return module.double().eval()


def masked_attention(module: ViTAttention, states: Tensor, mask: Tensor, rotary=None) -> Tensor:
    """What `module` gives with a mask (N, N) of who sees whom."""
    heads = (*states.shape[:2], module.num_heads, module.head_dim)
    query, key, value = (
        proj(states).view(heads).transpose(1, 2) for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    if rotary is not None:
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    weights = (query @ key.transpose(2, 3) * module.scaling).masked_fill(~mask, -torch.inf).softmax(-1)
    return module.out_proj((weights @ value).transpose(1, 2).flatten(2))


def gradients(module: nn.Module, states: Tensor, output: Tensor) -> list[Tensor]:
    loss = (output * gaussian(*output.shape, seed=5)).sum()
    return list(torch.autograd.grad(loss, [states, *module.parameters()]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("mode", SEEN)
def test_attention_and_its_gradient_are_those_of_a_mask(mode, num_frames, implementation):
    module, layout = attention(mode, implementation, (2, 2, 2)), FrameLayout(((num_frames, 1, FRAME),))
    states = gaussian(2, num_frames * FRAME, 16).double().requires_grad_()
    arguments = attention_arguments(module.config, layout, states)
    output, _ = module(states, **arguments)
    expected = masked_attention(module, states, token_mask(mode, num_frames), arguments["rotary"])
    close = 1e-10 if implementation == "sdpa" else 1e-5  # eager attention has its softmax in fp32
    torch.testing.assert_close(output, expected, atol=close, rtol=close)
    for ours, theirs in zip(*(gradients(module, states, x) for x in (output, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=close, rtol=close)


@pytest.mark.slow
@torch.no_grad()  # flex attention has no gradient on a CPU
def test_flex_attention_gives_the_same():
    plain, flex = (attention(implementation=name).float() for name in ("sdpa", "flex_attention"))
    states = gaussian(2, 5 * FRAME, 16)
    arguments = attention_arguments(plain.config, FrameLayout(((5, 1, FRAME),)), states)
    torch.testing.assert_close(flex(states, **arguments)[0], plain(states, **arguments)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", SEEN)
@torch.no_grad()
def test_eager_attention_gives_the_map_of_the_mask(mode):
    module, states = attention(mode, "eager"), gaussian(2, 5 * FRAME, 16).double()
    _, weights = module(states, **attention_arguments(module.config, FrameLayout(((5, 1, FRAME),)), states))
    assert weights.shape == (2, 2, 5 * FRAME, 5 * FRAME)
    assert torch.equal(weights > 0, token_mask(mode, 5).expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5 * FRAME).double(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_tubelet_attention_is_two_calls_that_grow_with_the_frames_and_make_no_mask():
    calls = []

    def attend(query, key, value):
        calls.append((tuple(query.shape[::2]), tuple(key.shape[::2])))
        return query.transpose(1, 2), None

    states = gaussian(2, 4, 9 * FRAME, 8)
    FrameAttention("tubelet", 9)(attend, attention(), states, states, states)
    assert calls == [((2, FRAME), (2, FRAME)), ((2 * 8, FRAME), (2 * 8, 2 * FRAME))]


@pytest.mark.parametrize("sizes", [(1, 4, 4), (5, 4), (2, 1, 6), (9,)])
@pytest.mark.parametrize("mode", SEEN)
@torch.no_grad()
def test_attention_in_chunks_is_that_of_the_whole(mode, sizes):
    module, states = attention(mode, rotary_axes=(4, 2, 2)), gaussian(2, 9 * FRAME, 16).double()
    whole, _ = module(states, **attention_arguments(module.config, FrameLayout(((9, 1, FRAME),)), states))
    cache, outputs = FrameCache(), []
    for chunk in states.split([size * FRAME for size in sizes], dim=1):
        layout = FrameLayout(((chunk.shape[1] // FRAME, 1, FRAME),), start=cache.num_frames)
        outputs.append(module(chunk, **attention_arguments(module.config, layout, chunk, cache))[0])
        cache.num_frames += layout.grids[0][0]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, atol=1e-12, rtol=1e-12)
    kept = FRAME if mode == "tubelet" else 9 * FRAME
    assert [tuple(x.shape) for x in cache.states[module]] == [(2, 2, kept, 8)] * 2


def test_images_and_full_attention_need_no_frames():
    config, image, clip = attention().config, FrameLayout(((1, 2, 3),)), FrameLayout(((5, 2, 3),))
    assert attention_arguments(config, image, gaussian(1)) == {}
    assert attention_arguments(attention("full").config, clip, gaussian(1)) == {}
    assert list(attention_arguments(config, clip, gaussian(1))) == ["frames"]


# Positions


def scores(layout: FrameLayout, axes: list[int]) -> Tensor:
    """Of one query and one key, wherever in the row they are, (N, N)."""
    cos, sin = rotary_positions_3d(layout, axes, 16, like=torch.zeros(1))
    query, key = (gaussian(16, seed=seed).expand(1, 1, len(cos), 16) for seed in (0, 1))
    return (apply_rotary(query, cos, sin) @ apply_rotary(key, cos, sin).transpose(2, 3))[0, 0]


def test_scores_depend_on_relative_frames_rows_and_columns_only():
    by_place = scores(FrameLayout(((3, 4, 5),)), [6, 4, 4]).reshape(3, 4, 5, 3, 4, 5)
    torch.testing.assert_close(by_place[0, 0, 0, 1, 2, 1], by_place[1, 1, 3, 2, 3, 4])
    for other in ((2, 2, 1), (1, 1, 1), (1, 2, 2)):
        assert not torch.isclose(by_place[(0, 0, 0, 1, 2, 1)], by_place[(0, 0, 0, *other)])


def test_positions_in_time_alone_leave_an_image_as_it_is():
    cos, sin = rotary_positions_3d(FrameLayout(((1, 4, 5),), num_leading=1), [16, 0, 0], 16, like=torch.zeros(1))
    assert (cos == 1).all()
    assert not sin.any()


def test_dimensions_that_no_axis_has_do_not_turn():
    cos, sin = rotary_positions_3d(FrameLayout(((3, 2, 2),)), [4, 2, 2], 16, like=torch.zeros(1))
    is_turned = (sin != 0).any(0)
    assert is_turned.tolist() == 2 * [True, True, True, True, False, False, False, False]
    assert (cos[:, ~is_turned] == 1).all()


def test_positions_of_a_row_and_of_chunks_are_those_of_each_alone():
    def of(*grids, **changes):
        return torch.cat(rotary_positions_3d(FrameLayout(grids, **changes), [6, 4, 4], 16, torch.zeros(1)), dim=-1)

    assert torch.equal(of((3, 2, 2), (1, 2, 3)), torch.cat([of((3, 2, 2)), of((1, 2, 3))]))
    assert torch.equal(of((5, 2, 2)), torch.cat([of((3, 2, 2)), of((2, 2, 2), start=3)]))
    with_class_token = of((3, 2, 2), num_leading=1).unflatten(0, (3, 5))
    assert torch.equal(with_class_token[:, 1:].flatten(0, 1), of((3, 2, 2)))
    assert torch.equal(with_class_token[:, 0], with_class_token[:, 1])


# Chunks


@pytest.mark.parametrize(
    ("num_frames", "chunk_frames", "step", "sizes"),
    [(17, 4, 1, [1, 4, 4, 4, 4]), (17, 8, 1, [5, 8, 4]), (17, 32, 1, [17]), (1, 4, 1, [1]), (5, 8, 4, [2, 2, 1])],
)
def test_chunks_have_at_most_so_many_frames_and_whole_groups(num_frames, chunk_frames, step, sizes):
    clip = gaussian(1, 2, num_frames, 1, 1)
    chunks = split_clip(clip, chunk_frames, 4, step)
    assert [chunk.shape[2] for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks, dim=2), clip)


@pytest.mark.parametrize(
    ("shape", "chunk_frames", "message"),
    [
        ((1, 3, 5, 4, 4), 6, "chunk_frames=6 must be a positive multiple of the 4 frames"),
        ((1, 3, 5, 4, 4), 0, "chunk_frames=0 must be a positive multiple"),
        ((1, 3, 4, 4), 4, r"chunk_frames=4 cuts clips \(B, C, T, H, W\), got \(1, 3, 4, 4\)"),
    ],
)
def test_chunks_that_would_cut_a_latent_frame_are_refused(shape, chunk_frames, message):
    with pytest.raises(ValueError, match=message):
        split_clip(gaussian(*shape), chunk_frames, 4)
