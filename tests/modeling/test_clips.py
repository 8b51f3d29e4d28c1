"""HYDRA-XTok: images and clips in one ViT, whatever is folded and whoever sees whom. HYDRA-X, section 2."""

from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import PATCH, clip_config, clip_model, clips, flow_decoder_config, gaussian, pictures, randomized, tok_model
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hydra_hf import HydraTokConfig, HydraTokForPreTraining, HydraTokModel, PixelViTDecoderConfig
from hydra_hf.modeling.compat import enable_checkpointing
from hydra_hf.modeling.grid import num_tokens, pack_images, run_by_grid, unpatchify
from hydra_hf.modeling.layers import ViTAttention
from hydra_hf.modeling.temporal import FrameAttention, FrameCache


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = {
    "two folds": {"folds": (0, 1)},
    "one fold of 4": {"folds": (0, 0)},
    "folds between layers": {"folds": (1, 1)},
    "causal": {"temporal_attention": "causal"},
    "class tokens": {"use_cls_token": True},
    "learned positions alone": {"rotary_axes": []},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> HydraTokModel:
    return clip_model(**KINDS[request.param])


@pytest.fixture(scope="module")
def tubelet() -> HydraTokModel:
    return clip_model()


# What a frame sees


@torch.no_grad()
def test_a_clip_of_17_frames_has_5_latent_frames(model):
    clip = clips(2, 17, 8, 12)
    output = model(clip)
    assert output.latents.shape == (2, 6, 5, 2, 3)
    assert output.last_hidden_state.shape == (2, 5 * 2 * 3, 24)
    assert torch.equal(model.encode(clip).latent, output.latents)
    assert model.decode(output.latents).sample.shape == clip.shape
    torch.testing.assert_close(model.get_semantic_states(output.latents), output.last_hidden_state, **CLOSE)


@torch.no_grad()
def test_an_image_is_the_anchor_of_any_clip_that_starts_with_it(model):
    clip = clips(2, 9, 8, 12)
    latents, image = model.encode(clip).latent_dist, model.encode(clip[:, :, 0]).latent_dist
    torch.testing.assert_close(image.mean, latents.mean[:, :, 0], **CLOSE)
    torch.testing.assert_close(image.std, latents.std[:, :, 0], **CLOSE)
    torch.testing.assert_close(model(clip).last_hidden_state[:, :6], model(clip[:, :, 0]).last_hidden_state, **CLOSE)
    decoded = model.decode(latents.mean).sample[:, :, 0]
    torch.testing.assert_close(decoded, model.decode(image.mean).sample, **CLOSE)
    of_one_frame = model.encode(clip[:, :, :1]).latent
    assert of_one_frame.shape == (2, 6, 1, 2, 3)
    assert torch.equal(of_one_frame[:, :, 0], image.mean)
    assert model.decode(of_one_frame).sample.shape == (2, 3, 1, 8, 12)


def assert_reached(changed: list[int], first: int, last: int):
    """All frames from `first`, as far as the layers carry: at least to the next one."""
    assert changed == list(range(first, first + len(changed)))
    assert min(first + 1, last) in changed


def changed_frames(function, clip: Tensor, frame: int) -> list[int]:
    """Which frames of what `function` gives another frame of the clip changes."""
    other = clip.clone()
    other[:, :, frame] = other[:, :, frame].flip(-1)
    changes = (function(other) - function(clip)).abs().amax(dim=(0, 1, 3, 4))
    return (changes > 1e-5).nonzero().flatten().tolist()


@torch.no_grad()
def test_a_frame_reaches_its_own_latent_frame_and_later_ones_and_none_before(model):
    def encode(clip):
        return model.encode(clip).latent

    def semantic(clip):
        return model(clip).last_hidden_state.transpose(1, 2).unflatten(2, (4, 2, 2))

    clip = clips(1, 13)
    for frame, first in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (12, 3)):
        assert_reached(changed_frames(encode, clip, frame), first, last=3)
        assert_reached(changed_frames(semantic, clip, frame), first, last=3)


@torch.no_grad()
def test_a_latent_frame_reaches_its_own_pixels_and_later_ones_and_none_before(model):
    latents = gaussian(1, 6, 4, 2, 2)
    for frame, first in ((0, 0), (1, 1), (2, 5), (3, 9)):
        assert_reached(changed_frames(lambda x: model.decode(x).sample, latents, frame), first, last=12)


@torch.no_grad()
def test_full_attention_reads_the_whole_clip():
    model = clip_model(temporal_attention="full")
    assert changed_frames(lambda clip: model.encode(clip).latent, clips(1, 9), 8) == [0, 1, 2]
    assert changed_frames(lambda x: model.decode(x).sample, gaussian(1, 6, 3, 2, 2), 2) == list(range(9))


def attention_by_mask(self, attend, module, query, key, value):
    """The definition of tubelet and causal attention, with a mask as large as the clip squared."""
    frame = torch.arange(self.num_frames).repeat_interleave(query.shape[2] // self.num_frames)
    distance = frame[:, None] - frame
    mask = (distance >= 0) & (distance <= (1 if self.mode == "tubelet" else self.num_frames))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=module.scaling)
    return output.transpose(1, 2), None


def test_the_whole_model_and_its_gradients_are_those_of_masks(model, monkeypatch):
    results = []
    for attention in (FrameAttention.__call__, attention_by_mask):
        monkeypatch.setattr(FrameAttention, "__call__", attention)
        model.zero_grad()
        output = model(clips(2, 9, 8, 12))
        decoded = model.decode(output.latents).sample
        (decoded.square().mean() + output.last_hidden_state.square().mean()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"latents": output.latents, "states": output.last_hidden_state, "pixels": decoded, **gradients})
    assert results[0]["gen_vit.layers.0.attention.k_proj.weight"].abs().max() > 1e-4
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_rotary_positions_tell_the_frames_apart():
    still = pictures(1)[:, :, None].expand(-1, -1, 9, -1, -1)
    latents = clip_model(rotary_axes=[8, 0, 0]).encode(still).latent
    assert (latents[:, :, 1] - latents[:, :, 2]).abs().max() > 1e-3


def test_a_recorded_clip_has_all_layers_and_their_maps():
    torch.manual_seed(0)
    config = clip_config()
    config._attn_implementation = "eager"
    output = HydraTokModel(config).eval()(clips(1, 9), output_hidden_states=True, output_attentions=True)
    assert [state.shape[1] for state in output.hidden_states] == [20, 20, 12, 12, 12]  # 5 frames, then 3
    assert [tuple(map_.shape) for map_ in output.attentions] == [(1, 3, 20, 20), *[(1, 3, 12, 12)] * 3]


# Images and clips together


@torch.no_grad()
def test_images_and_clips_of_several_sizes_in_one_batch_are_each_alone(model):
    inputs = [clips(1, 9, 8, 12)[0], pictures(1, 4, 8)[0], clips(1, 5, 8, 12, seed=1)[0], clips(1, 9, 8, 12, seed=2)[0],
              pictures(1, 4, 8, seed=3)[0], clips(1, 1, 12, 4)[0]]  # fmt: skip
    packed, grids = pack_images(inputs, PATCH)
    grids = [tuple(grid) for grid in grids.tolist()]
    assert grids == [(9, 2, 3), (1, 1, 2), (5, 2, 3), (9, 2, 3), (1, 1, 2), (1, 3, 1)]
    tokens = run_by_grid(model.encode_rows, grids, [packed], config=model.config)
    latent_grids = [(1 + (t - 1) // 4, h, w) for t, h, w in grids]
    decoded = run_by_grid(model.decode_rows, latent_grids, [tokens], config=model.config)
    parts = zip(
        inputs, grids, tokens.split(list(map(num_tokens, latent_grids))), decoded.split(list(map(num_tokens, grids)))
    )
    for pixels, grid, latents, patches in parts:
        alone = model.encode(pixels[None]).latent
        torch.testing.assert_close(latents, alone[0].flatten(1).T, **CLOSE)
        sample = model.decode(alone).sample
        torch.testing.assert_close(unpatchify(patches[None], PATCH, grid).reshape(sample.shape), sample, **CLOSE)


def attention_in_segments(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs
):
    """What flash kernels compute, written out: each sequence of queries on its own sequence of keys."""
    assert attention_mask is None
    if cu_seq_lens_q is None:
        cu_seq_lens_q, cu_seq_lens_k = (torch.tensor([0, states.shape[2]]) for states in (query, key))
    parts = zip(
        query.split(cu_seq_lens_q.diff().tolist(), 2),
        *(x.split(cu_seq_lens_k.diff().tolist(), 2) for x in (key, value)),
    )
    attended = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
    return torch.cat(attended, dim=2).transpose(1, 2), None


@torch.no_grad()
def test_flash_attention_reads_images_and_clips_as_one_row(model, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_segments", attention_in_segments)
    packed, grids = pack_images([clips(1, 9, 8, 12)[0], pictures(1, 4, 8)[0], clips(1, 5, 8, 12, seed=1)[0]], PATCH)
    grids, latent_grids = [tuple(grid) for grid in grids.tolist()], [(3, 2, 3), (1, 1, 2), (2, 2, 3)]

    def paths(run):
        tokens = run(model.encode_rows, grids, packed)
        states = run(lambda rows, grids: model.sem_vit(model.get_bottleneck_states(rows), grids), latent_grids, tokens)
        return tokens, states, run(model.decode_rows, latent_grids, tokens)

    expected = paths(lambda function, grids, tokens: run_by_grid(function, grids, [tokens]))
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_segments")
    monkeypatch.setattr(model.config.decoder_config, "_attn_implementation_internal", "flash_segments")
    rows = paths(lambda function, grids, tokens: function(tokens[None], grids=grids)[0])
    for ours, theirs in zip(rows, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


# Chunks


@pytest.mark.parametrize("chunk_frames", [4, 8, 64])
@torch.no_grad()
def test_chunks_give_what_the_whole_clip_gives(model, chunk_frames):
    clip = clips(2, 21, 8, 12)
    whole, chunked = model.encode(clip).latent_dist, model.encode(clip, chunk_frames=chunk_frames).latent_dist
    torch.testing.assert_close(chunked.mean, whole.mean, **CLOSE)
    torch.testing.assert_close(chunked.logvar, whole.logvar, **CLOSE)
    sample = model.decode(whole.mean).sample
    torch.testing.assert_close(model.decode(whole.mean, chunk_frames=chunk_frames).sample, sample, **CLOSE)
    assert torch.equal(model.decode(whole.mean, False, chunk_frames=64)[0], sample)


@torch.no_grad()
def test_chunks_take_memory_that_does_not_grow_with_the_clip(tubelet):
    """Neither the tokens that a layer sees at once nor what is kept between chunks, for 8 times as many frames."""

    def largest(num_frames: int) -> tuple[int, int]:
        sizes, kept = [], []
        hooks = [
            module.register_forward_hook(lambda module, args, output: sizes.append(args[0].numel()))
            for module in tubelet.modules() if isinstance(module, ViTAttention)
        ]  # fmt: skip
        before = FrameCache.__init__

        def remember(self, *args, **kwargs):
            before(self, *args, **kwargs)
            kept.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FrameCache, "__init__", remember)
            latents = tubelet.encode(clips(1, num_frames), chunk_frames=8).latent
            tubelet.decode(latents, chunk_frames=8)
        for hook in hooks:
            hook.remove()
        states = [state for cache in kept for pair in cache.states.values() for state in pair]
        return max(sizes), sum(state.untyped_storage().nbytes() for state in states)

    assert largest(17) == largest(129)
    assert largest(17)[1] > 0


@torch.no_grad()
def test_a_long_clip_is_read_and_written_chunk_by_chunk(tubelet):
    clip, read = clips(1, 13), []

    def frames():
        for chunk in clip.split([5, 4, 4], dim=2):
            read.append(chunk.shape[2])
            yield chunk

    encoded = tubelet.encode_chunks(frames())
    first = next(encoded).latent
    assert read == [5]
    latents = torch.cat([first, *(output.latent for output in encoded)], dim=2)
    torch.testing.assert_close(latents, tubelet.encode(clip).latent, **CLOSE)
    pixels = list(tubelet.decode_chunks(latents.split(1, dim=2)))
    assert [chunk.shape[2] for chunk in pixels] == [1, 4, 4, 4]
    torch.testing.assert_close(torch.cat(pixels, dim=2), tubelet.decode(latents).sample, **CLOSE)


# Saving, training, types


def test_every_parameter_of_a_tokenizer_for_clips_survives_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    reloaded = HydraTokModel.from_pretrained(tmp_path)
    for name in ("temporal_fold_layers", "temporal_attention", "rotary_axes", "use_bottleneck_layernorm"):
        assert getattr(reloaded.config, name) == getattr(model.config, name)
    for name in ("temporal_unfold_layers", "temporal_attention", "rotary_axes"):
        assert getattr(reloaded.config.decoder_config, name) == getattr(model.config.decoder_config, name)
    with torch.no_grad():
        latents = model.encode(clips(1)).latent
        assert torch.equal(reloaded.encode(clips(1)).latent, latents)
        assert torch.equal(reloaded.decode(latents).sample, model.decode(latents).sample)


def test_without_folds_there_is_no_new_parameter():
    names = {name for name, _ in tok_model(decoder_config=None).named_parameters()}
    with_folds = {name for name, _ in clip_model(use_cls_token=True, decoder_config=None).named_parameters()}
    new = {
        f"{owner}.{kind}" for owner in ("gen_vit.folds.1.projection", "bottleneck.norm") for kind in ("weight", "bias")
    }
    assert with_folds - names == new
    assert names <= with_folds


def test_folds_start_as_the_anchor_and_keep_it_through_saving(tmp_path):
    fresh = HydraTokModel(clip_config())
    fresh.save_pretrained(tmp_path)
    for model in (fresh, HydraTokModel.from_pretrained(tmp_path)):
        weight = model.gen_vit.folds["1"].projection.weight
        assert torch.equal(weight, torch.eye(24, 48).roll(24, dims=1))
        assert torch.equal(model.pixel_decoder.unfolds["1"].projection.weight, torch.eye(24).repeat(2, 1))


def test_gradient_checkpointing_gives_the_same_gradients_of_clips():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = randomized(HydraTokForPreTraining(clip_config())).train()
        if checkpointing:
            enable_checkpointing(model)
        output = model(clips(2, 9, 8, 12), gaussian(2, 3 * 6, 6))
        assert output.clean_pixel_values.shape == (2, 3, 9, 8, 12)
        (output.clean_pixel_values.square().mean() + output.bottleneck_states.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0]["model.gen_vit.folds.1.projection.weight"].abs().sum() > 0
    assert {name.split(".")[1] for name, gradient in gradients[0].items() if gradient is None} == {"sem_vit"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_the_training_forward_of_the_mean_is_decode_of_encode():
    training = randomized(HydraTokForPreTraining(clip_config())).eval()
    for pixel_values in (clips(2, 9, 8, 12), pictures(2, 8, 12), clips(2, 1, 8, 12)):
        latents = training.model.encode(pixel_values).latent
        output = training(pixel_values, torch.zeros(2, latents[0, 0].numel(), 6))
        torch.testing.assert_close(output.clean_pixel_values, training.model.decode(latents).sample, **CLOSE)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_bf16_reads_and_writes_clips_near_fp32(tmp_path, tubelet, how):
    clip, model = clips(2, 9), tubelet
    expected = tubelet.encode(clip).latent
    expected_sample = tubelet.decode(expected).sample
    if how == "weights":
        tubelet.save_pretrained(tmp_path)
        model = HydraTokModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        latents = model.encode(clip).latent
        sample, chunked = model.decode(latents).sample, model.encode(clip, chunk_frames=4).latent
    assert latents.dtype == sample.dtype
    assert 0 < (latents.float() - expected).abs().mean() < 0.1 * expected.std()
    assert 0 < (sample.float() - expected_sample).abs().mean() < 0.1 * expected_sample.std()
    assert (chunked - latents).abs().mean() < 0.02 * latents.std()


# Errors


@pytest.mark.parametrize(
    ("num_frames", "message"),
    [
        (16, r"num_frames=16 must be 1 \+ 4n: an anchor frame, then groups of 4; the nearest are 13 and 17"),
        (2, "num_frames=2 must be .*; the nearest are 1 and 5"),
        (0, "num_frames=0 must be .*; the nearest are 1 and 5"),
    ],
)
def test_frames_that_are_no_anchor_and_whole_groups_are_refused(tubelet, num_frames, message):
    for call in (tubelet, tubelet.encode, partial(tubelet.encode, chunk_frames=4)):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(1, 3, num_frames, 8, 8))


def test_a_later_chunk_of_broken_groups_is_refused(tubelet):
    with pytest.raises(ValueError, match="num_frames=5 must be 4n in a later chunk; the nearest are 4 and 8"):
        list(tubelet.encode_chunks(clips(1, 10).split(5, dim=2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(torch.zeros(1, 3, 8)), r"\(1, 3, 8\).*\(B, 3, H, W\) or \(B, 3, T, H, W\)"),
        (lambda model: model.encode(torch.zeros(1, 5, 3, 8, 8)), r"\(1, 5, 3, 8, 8\).*\(B, 3, T, H, W\)"),
        (lambda model: model.encode(torch.zeros(1, 3, 5, 9, 8)), "height=9.*multiples of the patch size 4"),
        (lambda model: model.encode(pictures(1), chunk_frames=4), r"chunk_frames=4 cuts clips"),
        (lambda model: list(model.encode_chunks([pictures(1)])), r"must be floats \(B, 3, T, H, W\)"),
        (lambda model: model.decode(gaussian(1, 5, 2, 2, 2)), r"must be \(B, 6, h, w\) or \(B, 6, T, h, w\)"),
        (lambda model: model.decode(gaussian(1, 6, 2, 2, 2), chunk_frames=2), "chunk_frames=2 must be"),
        (lambda model: model.decode(gaussian(1, 6, 2, 2, 2), num_inference_steps=2), "one step"),
    ],
)
def test_what_is_no_clip_is_refused(tubelet, call, message):
    with pytest.raises(ValueError, match=message):
        call(tubelet)


def test_a_tokenizer_of_images_refuses_clips():
    model = tok_model()
    with pytest.raises(ValueError, match=r"must be floats \(B, 3, H, W\): without temporal_fold_layers"):
        model.encode(clips(1))
    with pytest.raises(ValueError, match=r"must be \(B, 6, h, w\)\."):
        model.decode(gaussian(1, 6, 2, 2, 2))
    with pytest.raises(ValueError, match=r"temporal_fold_layers=\[\]"):
        model.encode_chunks([clips(1)])


def test_chunks_that_would_not_be_the_whole_are_refused():
    full = clip_model(temporal_attention="full")
    for call in (
        full.encode,
        lambda clip, chunk_frames: full.decode(gaussian(1, 6, 3, 2, 2), chunk_frames=chunk_frames),
    ):
        with pytest.raises(ValueError, match="temporal_attention='full'"):
            call(clips(1), chunk_frames=4)
    with pytest.raises(ValueError, match="training=True"):
        clip_model().train().encode(clips(1), chunk_frames=4)
    with pytest.raises(ValueError, match="no pixel decoder"):
        clip_model(decoder_config=None).decode_chunks([gaussian(1, 6, 1, 2, 2)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporal_fold_layers": [0, 2]}, r"vision_config: \[0, 2\] must be layers from 0 to 1, in ascending order"),
        ({"temporal_fold_layers": [1, 0]}, "in ascending order"),
        (
            {"temporal_fold_layers": [0]},
            r"temporal_fold_layers=\[0\] need .* as many temporal_unfold_layers, got \[1, 3\]",
        ),
        ({"decoder_config": flow_decoder_config()}, r"got \[\] of a hydra_pixel_flow_decoder"),
        ({"temporal_attention": "both"}, "temporal_attention='both' must be one of"),
        (
            {"rotary_axes": [4, 4, 2]},
            r"rotary_axes=\[4, 4, 2\] must be none, or even numbers .* of head_dim=8 at most",
        ),
        ({"rotary_axes": [4, 4]}, "must be none, or even numbers"),
        ({"rotary_axes": [3, 1, 2]}, "must be none, or even numbers"),
        ({"rotary_axes": [2, 2, 2], "hidden_size": 27}, "head_dim=9 is odd"),
    ],
)
def test_a_config_for_clips_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        clip_config(**changes)


def test_a_decoder_that_unfolds_behind_its_last_layer_is_refused():
    with pytest.raises(StrictDataclassError, match=r"decoder_config: \[1, 28\] must be layers from 0 to 27"):
        PixelViTDecoderConfig(temporal_unfold_layers=[1, 28])


# The preset


def test_the_preset_of_hydra_x_has_the_parameters_of_so400m_and_of_its_folds():
    layer, size, patch = 15_239_504, 1152, 3 * 16 * 16
    gen_vit = 2 * patch * size + size + 256 * size + 13 * layer + 2 * size * size + size
    sem_vit = 14 * layer + 2 * size + 128 * size + size
    bottleneck = 2 * size + (size + 1) * 128 + 2 * (64 + 1) * size
    decoder = 27 * layer + 2 * size + (size + 1) * 2 * patch + (size + 1) * 2 * size
    assert (gen_vit, sem_vit, bottleneck, decoder) == (202_834_448, 213_503_968, 299_648, 415_896_432)
    with torch.device("meta"):
        model = HydraTokModel(HydraTokConfig.siglip2_so400m_video())
    parts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    assert parts == {"gen_vit": gen_vit, "bottleneck": bottleneck, "sem_vit": sem_vit, "pixel_decoder": decoder}
    assert sum(parts.values()) == 832_534_496
    assert (model.config.num_gen_layers, model.config.num_sem_layers) == (13, 14)
    assert model.config.temporal_compression_ratio == 4
