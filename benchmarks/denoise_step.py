"""A denoising step with guidance from a prefilled prompt, against the whole sequence at every step.

The baseline is what Show-o2 does: prompt, padding and image tokens of both branches run through Sem-ViT, language model,
language head and vision head.
"""

import torch
from common import DTYPES, medians, parser, report
from models import (
    gaussian_latents,
    guided_prompt,
    hydra_config,
    padded_together,
    random_model,
    size_name,
    tiny_config,
    whole_sequence_step,
)

from hydra_hf.modeling.image_generation import classifier_free


BARS = {77: 1.2, 256: 1.3, 1100: 2.2}
SCALE = 4.5


def measure(model, length: int, arguments) -> dict:
    """Times both steps after a prompt of `length` tokens."""
    device = arguments.device
    prompts, latents = guided_prompt(model.config, length, device), gaussian_latents(model.config, device)
    sigma = torch.tensor([0.7], device=device)
    padded, prefixes = padded_together(*prompts), [model.prefill(**prompt) for prompt in prompts]
    steps = {
        "whole sequence": lambda: whole_sequence_step(model, padded, latents, sigma, SCALE),
        "prefilled": lambda: model.denoise_step(latents, sigma, classifier_free(*prefixes, SCALE)),
    }
    difference = (steps["whole sequence"]() - steps["prefilled"]()).abs().max().item()
    assert arguments.dtype != "fp32" or difference < 1e-4, f"the two steps differ by {difference}"
    seconds = medians(steps, arguments.runs)
    ratio = seconds["whole sequence"] / seconds["prefilled"]
    return {"prompt tokens": length, **seconds, "ratio": ratio, "bar": BARS[length], "max difference": difference}


@torch.no_grad()
def measure_all(arguments) -> list[dict]:
    config = tiny_config() if arguments.tiny else hydra_config("1.5B", arguments.layers)
    model = random_model(config, DTYPES[arguments.dtype], arguments.device)
    return [measure(model, length, arguments) for length in BARS]


def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=7).parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    rows = measure_all(arguments)
    report(f"Seconds of a denoising step, {size_name('1.5B', arguments)}", rows, arguments)


if __name__ == "__main__":
    main()
