import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import vgg16
from transformers import (
    InternVLVisionConfig,
    InternVLVisionModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from hydra_hf.modeling import HydraTokConfig, HydraTokModel
from hydra_hf.training.losses import distill_loss, patch_states
from hydra_hf.training.teachers import load_perceptual, load_teacher


SIZE, PATCH, WIDTH = 32, 8, 24
NUM_TOKENS = (SIZE // PATCH) ** 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) - 1


def internvit() -> InternVLVisionModel:
    return InternVLVisionModel(InternVLVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=[SIZE, SIZE],
        patch_size=[PATCH, PATCH], attention_bias=True,
    )).eval()  # fmt: skip


def test_a_vision_model_of_transformers_gives_the_outputs_of_its_blocks(tmp_path):
    model = internvit()
    model.save_pretrained(tmp_path)
    outputs = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(pixel_values=pictures())
    states = load_teacher(str(tmp_path))(pictures(), (2, 4))
    torch.testing.assert_close(states, [outputs[1], outputs[3]])
    assert states[0].shape == (2, 1 + NUM_TOKENS, WIDTH)


def test_a_teacher_without_a_class_token_gives_the_outputs_of_its_blocks(tmp_path):
    config = SiglipVisionConfig(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                                image_size=SIZE, patch_size=PATCH)  # fmt: skip
    SiglipVisionModel(config).save_pretrained(tmp_path)
    (state,) = load_teacher(str(tmp_path))(pictures(), (3,))
    assert state.shape == (2, NUM_TOKENS, WIDTH)


@pytest.mark.parametrize("with_text", [False, True])
def test_a_naflex_teacher_reads_patches_as_its_processor_cuts_them(tmp_path, with_text):
    """At a grid of another shape than its table."""
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
              "patch_size": PATCH, "num_patches": 9}  # fmt: skip
    model = Siglip2VisionModel(Siglip2VisionConfig(**vision)).eval()
    if with_text:
        text = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 9,
        }
        pair = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)).eval()
        pair.vision_model.load_state_dict(model.state_dict())
        pair.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    outputs = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    image = pictures()[:, :, : SIZE // 2]  # (2, 3, 16, 32): 2 x 4 patches
    patches = torch.stack([convert_image_to_patches(one, PATCH) for one in image])
    model(patches, pixel_attention_mask=torch.ones(2, 8), spatial_shapes=torch.tensor([[2, 4]] * 2))
    states = load_teacher(str(tmp_path))(image, (1, 3))
    torch.testing.assert_close(states, [outputs[0], outputs[2]])


def test_a_naflex_teacher_refuses_a_size_that_its_patch_does_not_divide(tmp_path):
    Siglip2VisionModel(Siglip2VisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                                           patch_size=PATCH, num_patches=4)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="height=30 and width=32 must be multiples of the teacher's patch size 8"):
        load_teacher(str(tmp_path))(pictures()[:, :, :30], (1,))


def test_a_timm_teacher_gives_the_patches_of_its_blocks(tmp_path):
    architecture = "test_vit"
    model = timm.create_model(architecture, dynamic_img_size=True).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(pictures())
    teacher = load_teacher(f"timm:{architecture}", str(tmp_path / "vit.safetensors"))
    states = teacher(pictures(), (1, 3))
    torch.testing.assert_close(states, [outputs[0][:, 1:], outputs[2][:, 1:]])


def test_a_tokenizer_teaches_as_the_vit_that_it_was_cut_from(tmp_path):
    """The blocks of InternViT, given to a tokenizer as `hydra convert` does; only the bottleneck is new."""
    source = internvit()
    config = HydraTokConfig(hidden_size=WIDTH, num_gen_layers=3, num_sem_layers=1, num_attention_heads=2,
                            intermediate_size=32, image_size=SIZE, patch_size=PATCH, latent_channels=4)  # fmt: skip
    model = HydraTokModel(config)
    embeddings = model.gen_vit.embeddings
    embeddings.projection.load_state_dict(source.embeddings.patch_embeddings.projection.state_dict())
    embeddings.cls_token.data.copy_(source.embeddings.cls_token)
    embeddings.position_embeddings.data.copy_(source.embeddings.position_embeddings)
    renamed = {"projection_layer": "out_proj", "lambda_1": "scale_1.weight", "lambda_2": "scale_2.weight"}
    for theirs, ours in zip(source.encoder.layer, [*model.gen_vit.layers, *model.sem_vit.layers]):
        weights = theirs.state_dict()
        for old, new in renamed.items():
            weights = {name.replace(old, new): value for name, value in weights.items()}
        ours.load_state_dict(weights)
    model.save_pretrained(tmp_path / "tokenizer")
    source.save_pretrained(tmp_path / "vit")
    layers = (1, 3, 4)
    states = [load_teacher(str(tmp_path / name))(pictures(), layers) for name in ("tokenizer", "vit")]
    torch.testing.assert_close(*states)


def test_a_teacher_is_frozen_and_gives_no_gradient(tmp_path):
    internvit().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(pictures().requires_grad_(), (1,))[0].requires_grad


@pytest.mark.parametrize("layers", [(0, 1), (5,)])
def test_a_layer_that_the_teacher_does_not_have_is_refused(tmp_path, layers):
    internvit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be blocks 1 to 4 of the teacher"):
        load_teacher(str(tmp_path))(pictures(), layers)


def test_weights_beside_a_folder_are_refused():
    with pytest.raises(ValueError, match="'folder' has its own"):
        load_teacher("folder", "x.safetensors")


# L_dist


def states(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_distill_loss_is_the_sum_over_layers_on_patches_alone():
    student, teacher = [states(2, 5, 6, seed=i) for i in (0, 1)], [states(2, 4, 6, seed=i) for i in (2, 3)]
    cosines = [nn_cosine(a[:, 1:], b) for a, b in zip(student, teacher)]
    torch.testing.assert_close(distill_loss(student, teacher, (1, 2, 2)), sum(1 - cosine.mean() for cosine in cosines))


def nn_cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).sum(-1) / first.norm(dim=-1) / second.norm(dim=-1)


def test_the_class_token_does_not_count():
    student = states(2, 5, 6, seed=0)
    teacher = student.clone()
    teacher[:, 0] = 100
    assert distill_loss([student], [teacher], (1, 2, 2)).item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 7\) must have the shape of the student's, \(2, 4, 6\)"):
        distill_loss([states(2, 4, 6, seed=0)], [states(2, 4, 7, seed=0)], (1, 2, 2))


@pytest.mark.parametrize("num_tokens", [3, 16])
def test_a_teacher_of_another_grid_is_refused(num_tokens):
    with pytest.raises(ValueError, match=f"{num_tokens} tokens for 4 patches"):
        patch_states(states(1, num_tokens, 6, seed=0), 4)


# Perceptual distances


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> str:
    """Random weights in the layout of torchvision's file, without the classifier that LPIPS does not read."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    with torch.device("meta"):
        model = vgg16()
    model.features.to_empty(device="cpu")
    for layer in model.features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.normal_(layer.bias, std=0.1)
    save_file({f"features.{name}": value for name, value in model.features.state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def lpips_distance(vgg):
    return load_perceptual("lpips:vgg", vgg)


def test_lpips_reads_torchvisions_weights(lpips_distance, vgg):
    from safetensors.torch import load_file

    found = load_file(vgg)
    trunk = lpips_distance.model.net
    assert torch.equal(trunk.slice1._modules["0"].weight, found["features.0.weight"])
    assert torch.equal(trunk.slice5._modules["28"].bias, found["features.28.bias"])
    assert all(not parameter.requires_grad for parameter in lpips_distance.parameters())


@torch.no_grad()
def test_lpips_is_zero_for_equal_pictures_and_grows_with_noise(lpips_distance):
    first, noise = pictures(), pictures(1)
    distances = [lpips_distance(first + scale * noise, first).item() for scale in (0, 0.1, 0.5)]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_lpips_gives_a_gradient_to_the_estimate_and_does_not_clamp_it(lpips_distance):
    estimate = (2 * torch.ones(2, 3, SIZE, SIZE)).requires_grad_()  # out of range everywhere
    lpips_distance(estimate, pictures()).backward()
    assert estimate.grad.abs().sum() > 0


def test_lpips_without_weights_says_how_to_get_them():
    with pytest.raises(
        ValueError, match=r"vgg16\(weights=\"IMAGENET1K_V1\"\).*--perceptual_weights vgg16.safetensors"
    ):
        load_perceptual("lpips:vgg")


def test_an_unknown_trunk_is_refused():
    with pytest.raises(ValueError, match="'lpips:resnet' must be one of"):
        load_perceptual("lpips:resnet", "x.safetensors")


def test_the_feature_distance_of_a_timm_model_is_zero_only_for_equal_pictures(tmp_path):
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "trunk.safetensors")
    distance = load_perceptual("timm:test_efficientnet", str(tmp_path / "trunk.safetensors"))
    estimate = pictures(1).requires_grad_()
    assert distance(pictures(), pictures()).item() == 0
    value = distance(estimate, pictures())
    value.backward()
    assert value > 0
    assert estimate.grad.abs().sum() > 0
