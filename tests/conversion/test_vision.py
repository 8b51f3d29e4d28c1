import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from small_sources import (
    ANY_GRID,
    OWN_GRID,
    PATCH,
    internvl_vision,
    original_tensors,
    siglip2_vision,
    siglip_vision,
)
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hydra_hf import HydraTokConfig, HydraTokModel, PixelFlowDecoderConfig, PixelViTDecoderConfig
from hydra_hf.cli import main
from hydra_hf.conversion.convert import convert
from hydra_hf.conversion.vision import convert_vision, vision_config, vision_layout


SQUARE, WIDE = (32, 32), (16, 40)
SO400M = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
          "patch_size": 16}  # fmt: skip
INTERNVIT_300M = {
    "model_type": "intern_vit_6b",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}
TIMM_300M = {"architecture": "vit_intern300m_patch14_448", "num_classes": 0, "global_pool": "token"}


def pixels(height: int, width: int):
    return 2 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) - 1


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "size"),
    [*[(source, size) for source in ANY_GRID for size in (SQUARE, WIDE)], *[(source, SQUARE) for source in OWN_GRID]],
    ids=lambda value: value.__name__ if callable(value) else f"{value[0]}x{value[1]}",
)
@torch.no_grad()
def test_the_two_halves_are_the_published_vit_layer_by_layer(source, size, tmp_path):
    reference = source(tmp_path / "vit")
    model = HydraTokModel.from_pretrained(convert(str(tmp_path / "vit"), tmp_path / "out")).eval()
    normalized = model.normalize_pixels(pixels(*size))
    expected = reference(normalized)
    layers = [*model.gen_vit.layers, *model.sem_vit.layers]
    after = [model.sem_vit.post_layernorm] if model.config.use_post_layernorm else []
    states = model.gen_vit.embeddings(normalized)  # the class token stays, to walk the whole ViT
    close(states, expected[0])
    for module, expected_states in zip([*layers, *after], expected[1:], strict=True):
        states = module(states)
        close(states, expected_states)
    num_cls = int(model.config.use_cls_token)
    close(model.gen_vit(normalized), expected[model.config.num_gen_layers][:, num_cls:])
    assert (model.config.num_gen_layers, model.config.num_sem_layers) == (2, 3)


@torch.no_grad()
def test_bilinear_and_bicubic_positions_differ_off_the_grid(tmp_path):
    config = HydraTokConfig.siglip2_so400m(
        hidden_size=8, num_gen_layers=1, num_sem_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=32, patch_size=PATCH, decoder_config=None,
    )  # fmt: skip
    bilinear = HydraTokModel(config).gen_vit.embeddings
    assert bilinear.position_interpolation == "bilinear"
    shrunk = bilinear.interpolate_positions((1, 2, 2))
    bilinear.position_interpolation = "bicubic"
    assert not torch.allclose(shrunk, bilinear.interpolate_positions((1, 2, 2)), atol=1e-3)


def test_an_unknown_interpolation_of_positions_is_an_error():
    with pytest.raises(StrictDataclassError, match="'nearest' must be 'bicubic' or 'bilinear'"):
        HydraTokConfig(position_interpolation="nearest")


# Full size, without allocating


def assert_covers(state: dict, source: dict):
    """Every name has a rule, and with the new parts they fill HYDRA-TOK exactly."""
    config, layout = vision_config(source), vision_layout(source)
    with torch.device("meta"):
        targets = HydraTokModel(config).state_dict()
    filled = {}
    for name, value in state.items():
        translated = convert_vision(name, value, layout, config)
        assert translated is not None, name
        filled |= {target: tensor.shape for target, tensor in translated.items()}
    new = ("bottleneck.", "sem_vit.position_proj.", "pixel_decoder.")
    expected = {name: value.shape for name, value in targets.items() if not name.startswith(new) and value.numel()}
    assert filled == expected


def test_the_table_of_the_original_layout_covers_internvit_300m():
    with torch.device("meta"):
        model = timm.create_model("vit_intern300m_patch14_448.ogvl_2pt5")
    state = original_tensors(model)
    assert "encoder.layers.23.ls2" in state
    assert_covers(state, INTERNVIT_300M)
    assert_covers(
        {f"vision_model.{name}": value for name, value in state.items()},
        {"model_type": "internvl_chat", "vision_config": INTERNVIT_300M},
    )


def test_the_table_of_transformers_layout_covers_internvit_300m():
    config = InternVLVisionConfig(attention_bias=True)
    with torch.device("meta"):
        model = InternVLVisionModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 304_012_288
    assert_covers(model.state_dict(), config.to_dict())
    assert_covers(
        {f"model.vision_tower.{name}": value for name, value in model.state_dict().items()},
        {"model_type": "internvl", "vision_config": {"attention_bias": True}},
    )


def test_the_table_of_timms_layout_covers_internvit_300m():
    with torch.device("meta"):
        model = timm.create_model("vit_intern300m_patch14_448.ogvl_2pt5")
    assert_covers(model.state_dict(), TIMM_300M)


@pytest.mark.parametrize("has_head", [True, False])
def test_the_table_of_siglip_covers_so400m_of_fixed_size(has_head):
    config = SiglipVisionConfig(**SO400M, image_size=384, vision_use_head=has_head)
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    assert_covers(model.state_dict(), config.to_dict())
    assert_covers(
        {f"vision_model.{name}": value for name, value in model.state_dict().items()},
        {"model_type": "siglip", "vision_config": {**SO400M, "image_size": 384}},
    )


def test_the_table_of_siglip_covers_so400m_naflex():
    config = Siglip2VisionConfig(**SO400M)
    with torch.device("meta"):
        model = Siglip2VisionModel(config)
    assert_covers(model.state_dict(), {"model_type": "siglip2", "vision_config": SO400M})


# Configs


@pytest.mark.parametrize("source", [INTERNVIT_300M, TIMM_300M, InternVLVisionConfig(attention_bias=True).to_dict()])
@pytest.mark.parametrize("decoder", ["S", "M", "L"])
def test_internvit_300m_gives_the_preset(source, decoder):
    assert vision_config(source, decoder).to_dict() == HydraTokConfig.internvit_300m(decoder).to_dict()
    assert vision_config(source).to_dict() == HydraTokConfig.internvit_300m("S").to_dict()


def test_siglip2_so400m_naflex_gives_the_preset():
    config = vision_config({"model_type": "siglip2", "vision_config": SO400M})
    assert config.to_dict() == HydraTokConfig.siglip2_so400m().to_dict()
    assert (config.num_gen_layers, config.num_sem_layers) == (13, 14)


def test_the_siglip2_preset_has_the_parameters_of_so400m():
    with torch.device("meta"):
        model = HydraTokModel(HydraTokConfig.siglip2_so400m(decoder_config=None))
    halves = [p for name, p in model.named_parameters() if "_vit." in name and "position_proj" not in name]
    assert sum(parameter.numel() for parameter in halves) == 412_649_712
    assert model.pixel_decoder is None


def test_siglip_of_fixed_size_bends_its_table_bicubically():
    config = vision_config({"model_type": "siglip", "vision_config": {**SO400M, "image_size": 384}})
    assert (config.position_interpolation, config.image_size) == ("bicubic", 384)


def test_a_flow_decoder_fits_on_siglip_and_a_vit_decoder_is_its_default():
    source = {"model_type": "siglip2", "vision_config": SO400M}
    assert isinstance(vision_config(source).decoder_config, PixelViTDecoderConfig)
    flow = vision_config(source, "M").decoder_config
    assert isinstance(flow, PixelFlowDecoderConfig)
    assert (flow.hidden_size, flow.num_global_layers, flow.num_flow_layers) == (1152, 12, 16)


def test_the_cut_is_free():
    config = vision_config(INTERNVIT_300M, num_gen_layers=18)
    assert (config.num_gen_layers, config.num_sem_layers) == (18, 6)


@pytest.mark.parametrize("num_gen_layers", [0, 24, -1])
def test_a_half_without_layers_is_an_error(num_gen_layers):
    with pytest.raises(ValueError, match=f"num_gen_layers={num_gen_layers}.*24 layers"):
        vision_config(INTERNVIT_300M, num_gen_layers=num_gen_layers)


def test_an_unknown_decoder_is_an_error():
    with pytest.raises(ValueError, match="'XL'.*S.*M.*L"):
        vision_config(INTERNVIT_300M, "XL")


@pytest.mark.parametrize("source", [{"model_type": "clip_vision_model"}, {"architecture": "vit_base_patch16_224"}, {}])
def test_another_vit_is_an_error_that_names_the_known_ones(source):
    with pytest.raises(ValueError, match="expected one of.*intern_vit_6b.*siglip2"):
        vision_config(source)


def test_a_config_without_sizes_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"no \['num_hidden_layers', 'image_size'\]"):
        vision_config(
            {name: INTERNVIT_300M[name] for name in INTERNVIT_300M if name not in ("num_hidden_layers", "image_size")}
        )


def test_patches_that_are_not_square_are_an_error():
    with pytest.raises(ValueError, match=r"patch_size=\[14, 16\] must be square"):
        vision_config({**INTERNVIT_300M, "patch_size": [14, 16]})


# Images and clips


@pytest.mark.parametrize("source", [siglip2_vision, siglip_vision, internvl_vision])
@torch.no_grad()
def test_an_image_starts_as_in_the_published_vit_though_clips_are_folded(source, tmp_path):
    """With positions in time alone; 3D positions turn what each layer compares by row and column."""
    reference = source(tmp_path / "vit")
    folder = convert(str(tmp_path / "vit"), tmp_path / "out", video=True)
    for size in (SQUARE, WIDE):
        for rotary_axes in ([], [6, 0, 0]):
            model = HydraTokModel.from_pretrained(folder, rotary_axes=rotary_axes).eval()
            normalized = model.normalize_pixels(pixels(*size))
            expected = reference(normalized)[2][:, int(model.config.use_cls_token) :]
            close(model.gen_vit(normalized), expected)
            clip = torch.stack([normalized, *torch.rand(4, *normalized.shape)], dim=2)
            close(model.gen_vit(clip)[:, : expected.shape[1]], expected)
    turned = HydraTokModel.from_pretrained(folder).eval()
    assert (turned.config.temporal_fold_layers, turned.config.rotary_axes) == ([0, 1], [4, 4, 4])
    assert turned.gen_vit.embeddings.projection.in_channels == 6
    assert not torch.allclose(turned.gen_vit(normalized), expected, atol=1e-3)


def test_siglip2_so400m_naflex_gives_the_preset_for_clips():
    config = vision_config({"model_type": "siglip2", "vision_config": SO400M}, video=True)
    assert config.to_dict() == HydraTokConfig.siglip2_so400m_video().to_dict()


def test_a_flow_decoder_for_clips_is_an_error():
    with pytest.raises(ValueError, match="decoder='S' is a flow decoder, which has no frames"):
        vision_config({"model_type": "siglip2", "vision_config": SO400M}, "S", video=True)


def test_the_card_of_a_tokenizer_for_clips_names_its_folds(tmp_path):
    siglip2_vision(tmp_path / "vit")
    main(["convert", "--vision", str(tmp_path / "vit"), "--video", "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| folds, bottleneck, position_proj, pixel_decoder |" in card
    assert "--video --" in card
    assert "--video True" not in card
