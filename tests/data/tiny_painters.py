"""Random models of the real classes that make targets, small, saved as their checkpoints are on the Hub."""

from pathlib import Path

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)


def save_depth_model(folder: Path, shortest: int = 56, **kwargs) -> Path:
    """A Depth-Anything with a Dinov2 of four layers; images go in with a short side of at least `shortest`."""
    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=shortest, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, patch_size=14, neck_hidden_sizes=[8, 16, 24, 24],
        fusion_hidden_size=16, head_in_channels=16, head_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5], **kwargs,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DepthAnythingForDepthEstimation(config).eval()
        for parameter in model.head.parameters():  # or the last ReLU may give nothing but zeros
            torch.nn.init.uniform_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    DPTImageProcessor(
        size={"height": shortest, "width": shortest}, keep_aspect_ratio=True, ensure_multiple_of=14, do_rescale=True,
        do_normalize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_segment_model(folder: Path, side: int = 64) -> Path:
    """A SAM of two layers that sees images of `side` pixels, and is sure of some masks."""
    vision = SamVisionConfig(
        hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=16,
        window_size=4, global_attn_indexes=[1], mlp_dim=64, num_pos_feats=8,
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=side, patch_size=16, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16,
        mlp_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        iou_head_depth=2,
        iou_head_hidden_dim=16,
    )
    config = SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompts.to_dict(), mask_decoder_config=decoder.to_dict()
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SamModel(config).eval()
        decoder = model.mask_decoder
        torch.nn.init.ones_(decoder.iou_prediction_head.proj_out.bias)  # predicted IoU near 1
        for layer in decoder.output_hypernetworks_mlps:
            torch.nn.init.normal_(layer.proj_out.weight, std=3e4)  # masks with sharp edges are stable
            torch.nn.init.normal_(layer.proj_out.bias, std=3e4)
    model.save_pretrained(folder)
    SamImageProcessor(
        size={"longest_edge": side}, pad_size={"height": side, "width": side}, mask_size={"longest_edge": side // 4}
    ).save_pretrained(folder)
    return folder
