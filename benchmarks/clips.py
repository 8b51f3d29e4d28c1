"""Clips: who attends to whom and where frames are folded, time by number of frames, memory in chunks, FLOPs of drawing one.

True widths, random weights, fewer layers. On a CPU, seconds are the CPU time of this process.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch
from common import DTYPES, medians, parser, report
from memory import peak_megabytes, used_megabytes
from models import SPECIAL_TOKENS, guided_prompt, hydra_config, random_model, tiny_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hydra_hf import HydraConfig, HydraForConditionalGeneration, HydraTokConfig, HydraTokModel, PixelViTDecoderConfig


ENCODE_BAR, LINEAR_BAR, MEMORY_BAR, DRAW_BAR = 0.55, 1.1, 1.2, 1.1
TINY = {"hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 96}
SHORT, LONGER, LONG, CHUNK = 17, (33, 65, 129), 257, 8  # frames; the first chunk has the anchor, too


def clip_config(arguments, num_folds: int = 2) -> HydraTokConfig:
    """HYDRA-XTok with `arguments.layers` in each half; its second fold and unfold are in the middle, or with the first."""
    layers, sizes, axes = arguments.layers, {}, [24, 24, 24]
    if arguments.tiny:
        sizes, axes = TINY, [8, 8, 8]
    folds, unfolds = [0, (layers + 1) // 2], [layers, 2 * layers]
    if num_folds == 1:
        folds, unfolds = [0, 0], [2 * layers, 2 * layers]
    decoder_config = PixelViTDecoderConfig(
        **sizes, num_hidden_layers=2 * layers, patch_size=16, rotary_axes=axes, temporal_unfold_layers=unfolds
    )
    return HydraTokConfig.siglip2_so400m_video(
        **sizes, num_gen_layers=layers, num_sem_layers=layers, rotary_axes=axes, temporal_fold_layers=folds,
        decoder_config=decoder_config,
    )  # fmt: skip


def clip_model(arguments, num_folds: int = 2, device: str | None = None) -> HydraTokModel:
    torch.manual_seed(0)
    with torch.device(device or arguments.device):
        return HydraTokModel._from_config(clip_config(arguments, num_folds), dtype=DTYPES[arguments.dtype]).eval()


def load_what_fits(model: HydraTokModel, weights: dict[str, Tensor]) -> HydraTokModel:
    """The same weights in all that another number of folds leaves as it is."""
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    return model


def clock_of(arguments) -> Callable[[], float]:
    return time.process_time if arguments.device == "cpu" else time.perf_counter


def random_clip(arguments, num_frames: int, size: int) -> Tensor:
    return 2 * torch.rand(1, 3, num_frames, size, size, device=arguments.device, dtype=DTYPES[arguments.dtype]) - 1


def count_flops(function: Callable, *arguments) -> int:
    """Of all matrix products, those of attention too: torch does not count its kernel for CPUs, nor heads that share keys."""

    def attention_flops(query, key, *_, **__) -> int:
        batch, heads, num_queries, head_dim = query
        return 4 * batch * heads * num_queries * key[2] * head_dim

    kernels = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    mapping = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): attention_flops for kernel in kernels}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function(*arguments)
    return counter.get_total_flops()


def row(measure: str, measured: float, baseline: float, bar: float | str = "", flops_ratio: float | str = "") -> dict:
    return {"measure": measure, "measured": measured, "baseline": baseline, "ratio": measured / baseline, "bar": bar,
            "ratio of FLOPs": flops_ratio}  # fmt: skip


def encoding_time(arguments) -> list[dict]:
    """Encoding 17 frames, 5 latent ones of 1024 tokens, against full attention. FLOPs are counted on torch's meta device."""
    size = 64 if arguments.tiny else 512
    once = clip_model(arguments, num_folds=1)
    models = {1: once, 2: load_what_fits(clip_model(arguments), once.state_dict())}
    without_data = {num_folds: clip_model(arguments, num_folds, "meta").gen_vit for num_folds in models}
    clip, shape = random_clip(arguments, SHORT, size), torch.empty(1, 3, SHORT, size, size, device="meta")

    def encode(attention: str, num_folds: int) -> None:
        models[num_folds].config.temporal_attention = attention
        models[num_folds].encode(clip)

    def flops_of(attention: str, num_folds: int) -> int:
        without_data[num_folds].config.temporal_attention = attention
        return count_flops(without_data[num_folds], shape)

    pairs = [
        (("causal", 1), ("full", 1)), (("tubelet", 1), ("full", 1)), (("tubelet", 2), ("full", 1)),
        (("tubelet", 2), ("full", 2)),
    ]  # fmt: skip
    runs = sorted({run for pair in pairs for run in pair})
    seconds = medians({run: lambda run=run: encode(*run) for run in runs}, arguments.runs, clock_of(arguments))
    rows = []
    for run, baseline in pairs:
        name = "encode s, {} with {} fold(s) against {} with {}".format(*run, *baseline)
        bar = ENCODE_BAR if (run, baseline) == pairs[2] else ""
        rows.append(row(name, seconds[run], seconds[baseline], bar, flops_of(*run) / flops_of(*baseline)))
    return rows


def time_by_length(arguments) -> list[dict]:
    """Encoding of longer clips against that of 17 frames, times the ratio of the lengths."""
    model, size = clip_model(arguments), 64 if arguments.tiny else 128
    clips = {length: random_clip(arguments, length, size) for length in (SHORT, *LONGER)}
    calls = {length: lambda clip=clip: model.encode(clip) for length, clip in clips.items()}
    seconds = medians(calls, arguments.runs, clock_of(arguments))
    expected = {length: seconds[SHORT] * length / SHORT for length in LONGER}
    return [
        row(
            f"encode s, {length} frames against {length}/{SHORT} of {SHORT}",
            seconds[length],
            expected[length],
            LINEAR_BAR,
        )
        for length in LONGER
    ]


def median_peak(function: Callable, arguments) -> float:
    """Megabytes of a call above those in use before it."""
    peaks = []
    for _ in range(arguments.runs + 1):
        before = used_megabytes(arguments.device)
        peaks.append(peak_megabytes(function, arguments.device) - before)
    return statistics.median(peaks[1:])


def drop_each(chunks: Iterable) -> None:
    """Takes each chunk and drops it before the next is made, which a loop would still hold."""
    deque(chunks, maxlen=0)


def memory_in_chunks(arguments) -> list[dict]:
    """Peak memory, above the model, of 257 frames in chunks that come and go, against 17 frames at once."""
    model, size = clip_model(arguments), 64 if arguments.tiny else 128
    sizes = [1 + CHUNK] + [CHUNK] * (LONG // CHUNK - 1)
    latents = model.encode(random_clip(arguments, LONG, size), chunk_frames=CHUNK).latent

    def encode() -> None:
        model.encode(random_clip(arguments, SHORT, size))

    def encode_in_chunks() -> None:
        drop_each(model.encode_chunks(random_clip(arguments, num_frames, size) for num_frames in sizes))

    def decode() -> None:
        model.decode(latents[:, :, : SHORT // 4 + 1])

    def decode_in_chunks() -> None:
        drop_each(model.decode_chunks(latents.split([1 + CHUNK // 4] + [CHUNK // 4] * (LONG // CHUNK - 1), dim=2)))

    rows = []
    for name, in_chunks, at_once in (("encode", encode_in_chunks, encode), ("decode", decode_in_chunks, decode)):
        name = f"{name} MB, {LONG} frames in chunks of {CHUNK} against {SHORT}"
        rows.append(row(name, median_peak(in_chunks, arguments), median_peak(at_once, arguments), MEMORY_BAR))
    return rows


def product_flops(*modules: nn.Module) -> int:
    """FLOPs a token of the linear layers that run on every token; modulation and time run once for all."""
    shapes = [
        linear.weight.numel()
        for module in modules
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and "modulation" not in name and "time_embedding" not in name
    ]
    return 2 * sum(shapes)


def needed_flops(model: HydraForConditionalGeneration, grid: tuple[int, int, int], prompt_lengths: list[int]) -> int:
    """FLOPs of a denoising step's tokens: Sem-ViT once, language model and vision head for each branch of guidance."""
    config, tower, (num_frames, height, width) = model.config, model.model.vision_tower, grid
    frame, num_tokens = height * width, num_frames * height * width
    sem_vit, text, head = config.vision_config, config.text_config, config.vision_head_config
    total = num_tokens * product_flops(
        tower.bottleneck.semantic_up_proj, tower.sem_vit, model.model.multi_modal_projector
    )
    total += 4 * sem_vit.num_sem_layers * sem_vit.hidden_size * (2 * num_frames - 1) * frame**2  # tubelet attention
    for length in prompt_lengths:
        num_keys = length + config.num_time_tokens + num_tokens
        total += num_tokens * product_flops(model.model.language_model, model.vision_head)
        total += 4 * text.num_hidden_layers * text.hidden_size * num_tokens * num_keys
        total += 4 * head.num_hidden_layers * head.hidden_size * num_tokens**2
    return total


def drawing_flops(arguments) -> list[dict]:
    """Drawing 17 frames with guidance, prompts and all, against what the denoised tokens and the decoder need."""
    size, num_steps = 64 if arguments.tiny else 128, 4
    base = tiny_config() if arguments.tiny else hydra_config("0.5B", arguments.layers)
    config = HydraConfig(
        text_config=base.text_config, vision_config=clip_config(arguments), vision_head_config=base.vision_head_config,
        video_token_id=2, **SPECIAL_TOKENS,
    )  # fmt: skip
    model = random_model(config, DTYPES[arguments.dtype], arguments.device)
    prompts, tower = guided_prompt(config, 20, arguments.device), model.model.vision_tower
    grid = model.get_latent_grid(size, size, SHORT)

    def draw() -> None:
        model.generate_images(**prompts[0], height=size, width=size, num_frames=SHORT, num_inference_steps=num_steps)

    latents = torch.zeros(1, config.vision_config.latent_channels, *grid, device=arguments.device)
    lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
    needed = num_steps * needed_flops(model, grid, lengths) + count_flops(tower.decode, latents)
    return [
        row(
            f"GFLOP, drawing {SHORT} frames against what their tokens need",
            count_flops(draw) / 1e9,
            needed / 1e9,
            DRAW_BAR,
        )
    ]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    arguments = parser(__doc__, layers=2).parse_args(arguments)
    torch.set_num_threads(arguments.threads)
    sections = (encoding_time, time_by_length, memory_in_chunks, drawing_flops)
    rows = [row for section in sections for row in section(arguments)]
    name = "tiny model" if arguments.tiny else f"HYDRA-XTok, {arguments.layers}/13 of its layers"
    report(f"Clips, {name}", rows, arguments)


if __name__ == "__main__":
    main()
