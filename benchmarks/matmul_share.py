"""The share of the machine's matrix-product rate that a denoising step with guidance reaches.

The rate is measured in the same process: image tokens of both branches by the MLP. That is a larger product than any in a
step, which runs the branches one by one, and so reaches a higher rate.
On Linux, THP_MEM_ALLOC_ENABLE=1 lets torch allocate in huge pages, which more than halves the activations' time.
"""

import torch
from common import DTYPES, medians, parser, report
from models import gaussian_latents, guided_prompt, hydra_config, random_model, size_name, tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hydra_hf.modeling.image_generation import classifier_free


BAR = 0.7


def measure(dtype_name: str, arguments) -> dict:
    dtype, device = DTYPES[dtype_name], arguments.device
    config = tiny_config() if arguments.tiny else hydra_config("0.5B", arguments.layers)
    model = random_model(config, dtype, device)
    latents, sigma = gaussian_latents(config, device), torch.tensor([0.7], device=device)
    prefixes = [model.prefill(**prompt) for prompt in guided_prompt(config, arguments.prompt, device)]
    with FlopCounterMode(display=False) as counter:
        model.denoise_step(latents, sigma, classifier_free(*prefixes, 4.5))
    text = config.text_config
    num_tokens = 2 * (config.num_time_tokens + latents[0, 0].numel())
    hidden_states = torch.randn(num_tokens, text.hidden_size, dtype=dtype, device=device)
    weight = torch.randn(text.intermediate_size, text.hidden_size, dtype=dtype, device=device)
    product_flops = 2 * num_tokens * text.hidden_size * text.intermediate_size
    repeats = max(1, counter.get_total_flops() // (10 * product_flops))  # a tenth of a step: one is too short to time

    def products() -> None:
        for _ in range(repeats):
            nn.functional.linear(hidden_states, weight)

    seconds = medians(
        {"product": products, "step": lambda: model.denoise_step(latents, sigma, classifier_free(*prefixes, 4.5))},
        arguments.runs,
    )
    rate = counter.get_total_flops() / seconds["step"] / 1e9
    product_rate = repeats * product_flops / seconds["product"] / 1e9
    return {
        "dtype": dtype_name, "step GFLOP": counter.get_total_flops() / 1e9, "step s": seconds["step"],
        "step GFLOP/s": rate, "product GFLOP/s": product_rate, "share": rate / product_rate, "bar": BAR,
    }  # fmt: skip


@torch.no_grad()
def measure_all(arguments) -> list[dict]:
    names = list(DTYPES) if arguments.dtype == "both" else [arguments.dtype]
    return [measure(name, arguments) for name in names]


def main(arguments: list[str] | None = None) -> None:
    arguments_parser = parser(__doc__, layers=24, runs=5, dtype="both")
    arguments_parser.add_argument("--prompt", type=int, default=77, help="prompt tokens")
    arguments = arguments_parser.parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    rows = measure_all(arguments)
    report(f"Rate of a denoising step, {size_name('0.5B', arguments)}", rows, arguments)


if __name__ == "__main__":
    main()
