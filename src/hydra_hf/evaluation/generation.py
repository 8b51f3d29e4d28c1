"""Text to image on the toy world: six categories after GenEval, judged by a checker without learned weights."""

import torch

from hydra_hf.data.toy_checker import ToyChecker
from hydra_hf.data.toy_language import CATEGORIES, ToyLanguage
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline


def evaluate_generation(
    pipeline: HydraPipeline,
    language: ToyLanguage,
    prompts_per_category: int,
    seed: int = 0,
    batch_size: int = 64,
    **kwargs,
) -> dict[str, float]:
    """Share of held-out prompts drawn right: `t2i/<category>` and `t2i/mean`, the mean of the six.

    `kwargs` go to the pipeline.
    """
    checker, scores = ToyChecker(language.world), {}
    for index, category in enumerate(CATEGORIES):
        generator = torch.Generator().manual_seed(seed + index)
        prompts, _ = language.sample_prompts(prompts_per_category, generator, split="test", categories=(category,))
        verdicts = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            texts = [prompt.text for prompt in batch]
            images = pipeline(texts, generator=generator, output_type="pt", **kwargs).images * 2 - 1
            verdicts += [checker.check(image, prompt) for image, prompt in zip(images, batch)]
        scores[f"t2i/{category}"] = sum(verdicts) / len(verdicts)
    return {**scores, "t2i/mean": sum(scores.values()) / len(scores)}
