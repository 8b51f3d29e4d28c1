"""Encoding and decoding one image with HYDRA-TOK, against an autoencoder as large as FLUX's, both with random weights."""

import torch
from common import DTYPES, medians, parser, report
from diffusers import AutoencoderKL
from models import tiny_tok_config

from hydra_hf import HydraTokConfig, HydraTokModel


def flux_sized_autoencoder(tiny: bool) -> AutoencoderKL:
    channels = (8, 16, 16, 16) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels, layers_per_block=2, latent_channels=16, norm_num_groups=4 if tiny else 32,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def tok_config(arguments) -> HydraTokConfig:
    layers = {"num_gen_layers": arguments.layers, "num_sem_layers": arguments.layers}
    return tiny_tok_config() if arguments.tiny else HydraTokConfig.internvit_300m("S", **layers)


@torch.no_grad()
def measure_all(arguments) -> list[dict]:
    torch.manual_seed(0)
    dtype, config = DTYPES[arguments.dtype], tok_config(arguments)
    models = {
        "AutoencoderKL": flux_sized_autoencoder(arguments.tiny).eval().to(arguments.device, dtype),
        "HYDRA-TOK": HydraTokModel._from_config(config, dtype=dtype).eval().to(arguments.device),
    }
    pixel_values = (2 * torch.rand(1, 3, config.image_size, config.image_size) - 1).to(arguments.device, dtype)
    latents = {name: model.encode(pixel_values).latent_dist.mode().to(dtype) for name, model in models.items()}
    rows = []
    for task in ("encode", "decode"):
        inputs = dict.fromkeys(models, pixel_values) if task == "encode" else latents
        calls = {name: lambda m=m, x=inputs[name], task=task: getattr(m, task)(x) for name, m in models.items()}
        seconds = medians(calls, arguments.runs)
        rows.append({"task": task, **seconds, "ratio": seconds["AutoencoderKL"] / seconds["HYDRA-TOK"]})
    parameters = {name: model.num_parameters() for name, model in models.items()}
    rows.append({"task": "parameters", **parameters, "ratio": parameters["AutoencoderKL"] / parameters["HYDRA-TOK"]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=12, runs=5).parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    report(f"Seconds of an image of {tok_config(arguments).image_size} px", measure_all(arguments), arguments)


if __name__ == "__main__":
    main()
