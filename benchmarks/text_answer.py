"""64 answer tokens about one image, with a key-value cache and without."""

import torch
from common import DTYPES, medians, parser, report
from models import hydra_config, random_model, size_name, tiny_config


BAR = 10
NUM_TOKENS = 64


@torch.no_grad()
def measure_all(arguments) -> list[dict]:
    config = tiny_config() if arguments.tiny else hydra_config("0.5B", arguments.layers)
    model = random_model(config, DTYPES[arguments.dtype], arguments.device)
    size = config.vision_config.image_size
    num_image_tokens = config.num_time_tokens + (size // config.vision_config.patch_size) ** 2
    image = [config.vision_start_token_id, *[config.image_token_id] * num_image_tokens, config.vision_end_token_id]
    input_ids = torch.tensor([[1, *image, *range(6, 26)]], device=arguments.device)
    pixel_values = 2 * torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) - 1
    pixel_values = pixel_values.to(arguments.device)

    def answer(use_cache: bool) -> torch.Tensor:
        return model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixel_values,
            max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False, use_cache=use_cache,
        )  # fmt: skip

    names = {"without cache": False, "with cache": True}
    answers = {}

    def ask(name: str) -> None:
        answers[name] = answer(names[name])

    seconds = medians({name: lambda name=name: ask(name) for name in names}, arguments.runs)
    same = (answers["with cache"] == answers["without cache"]).all().item()
    ratio = seconds["without cache"] / seconds["with cache"]
    return [{"tokens": NUM_TOKENS, **seconds, "ratio": ratio, "bar": BAR, "same answer": same}]


def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=6).parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    report(f"Seconds of an answer, {size_name('0.5B', arguments)}", measure_all(arguments), arguments)


if __name__ == "__main__":
    main()
