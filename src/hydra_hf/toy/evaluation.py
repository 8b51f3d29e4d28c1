"""How well a model knows the toy world: images of prompts, answers to questions, reconstructions, all held out.

Text to image has six categories after GenEval, judged by a checker without learned weights.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hydra_hf.data.prompts import PROMPTS
from hydra_hf.evaluation import maps
from hydra_hf.evaluation.metrics import psnr
from hydra_hf.evaluation.reconstruction import photo_crops, reconstruct
from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor, HydraTokModel
from hydra_hf.pipelines.answering import answer
from hydra_hf.pipelines.painting import paint
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .checker import ToyChecker
from .language import CATEGORIES, PAINTED, Prompt, Question, ToyLanguage
from .phrasing import KINDS
from .world import CANVASES, Scenes, ToyWorld


progress = partial(tqdm, disable=None, leave=False)  # the bar of a loop, on a terminal


def evaluate_generation(
    pipeline: HydraPipeline, language: ToyLanguage, prompts_per_category: int, seed: int = 0, **kwargs
) -> dict[str, float]:
    """Share of held-out prompts with a right image: `t2i/<category>` and `t2i/mean`, the mean of the six.

    `kwargs` go to the pipeline.
    """
    scores = {}
    for index, category in enumerate(progress(CATEGORIES, "text to image")):
        options = {"categories": (category,)}
        right = _drawn_right(pipeline, language, prompts_per_category, seed + index, options, **kwargs)
        scores[f"t2i/{category}"] = right
    return {**scores, "t2i/mean": sum(scores.values()) / len(scores)}


def evaluate_phrasing(
    pipeline: HydraPipeline, language: ToyLanguage, prompts_per_kind: int, seed: int = 0, **kwargs
) -> dict[str, float]:
    """`t2i_phrasing/<kind>`, the same for wordings that training never shows; `plain` is for comparison.

    `t2i_phrasing/unknown_word` is how often a prompt with an unknown word gives an image of known things.
    """
    scores = {}
    for index, kind in enumerate(progress(KINDS, "phrasing")):
        options = {"phrasings": (kind,)}
        right = _drawn_right(pipeline, language, prompts_per_kind, seed + index, options, **kwargs)
        scores[f"t2i_phrasing/{kind}"] = right
    checker, generator = ToyChecker(language.world), torch.Generator().manual_seed(seed)
    options = {"categories": ("single_object", "colors"), "unknown_share": 1.0}
    prompts, _ = language.sample_prompts(prompts_per_kind, generator, **options)
    found = [checker.detect(image) for image in _draw(pipeline, prompts, generator, **kwargs)]
    return {**scores, "t2i_phrasing/unknown_word": sum(map(bool, found)) / len(found)}


def evaluate_sizes(
    pipeline: HydraPipeline, language: ToyLanguage, prompts_per_size: int, seed: int = 0, **kwargs
) -> dict[str, float]:
    """`t2i_size/<height>x<width>`, the same on every canvas of the toy world."""
    scores = {}
    for canvas in progress(sorted(CANVASES), "sizes"):
        size = dict(zip(("height", "width"), canvas))
        right = _drawn_right(pipeline, language, prompts_per_size, seed, {"canvas": canvas}, **size, **kwargs)
        scores["t2i_size/{}x{}".format(*canvas)] = right
    return scores


def _drawn_right(
    pipeline: HydraPipeline, language: ToyLanguage, num_prompts: int, seed: int, options: dict, **kwargs
) -> float:
    """Share of held-out prompts of these `options` that the checker accepts."""
    checker, generator = ToyChecker(language.world), torch.Generator().manual_seed(seed)
    prompts, _ = language.sample_prompts(num_prompts, generator, split="test", **options)
    images = _draw(pipeline, prompts, generator, **kwargs)
    return sum(checker.check(image, prompt) for image, prompt in zip(images, prompts)) / num_prompts


def _draw(
    pipeline: HydraPipeline, prompts: list[Prompt], generator: torch.Generator, batch_size: int = 64, **kwargs
) -> Iterator[Tensor]:
    """An image (3, H, W) in [-1, 1] of each prompt."""
    for start in range(0, len(prompts), batch_size):
        texts = [prompt.text for prompt in prompts[start : start + batch_size]]
        yield from pipeline(texts, generator=generator, output_type="pt", **kwargs).images.cpu() * 2 - 1


def evaluate_understanding(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    language: ToyLanguage,
    num_questions: int,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Share of exact answers: `vqa/<type>`, and `vqa/mean` over all questions.

    `vqa_majority/<type>` and `vqa/majority` are what the commonest answer of each type would get. Only one question is
    asked about an image, so that no earlier turn gives anything away.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes, questions = language.sample_questions(num_questions, generator, split="test")
    images = processor.image_processor.postprocess(language.world.render(scenes), output_type="pil")
    return score_answers(model, processor, images, questions, "vqa", batch_size)


def score_answers(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    visuals: Iterable,
    questions: list[Question],
    name: str,
    batch_size: int = 64,
) -> dict[str, float]:
    """Share of exact answers to one question about each image or clip, see `answer`: `<name>/<type>`, `<name>/mean` over all
    questions, and what the commonest answers would get: `<name>_majority/<type>`, `<name>/majority`."""
    counts, right, visuals = Counter(question.type for question in questions), Counter(), iter(visuals)
    for start in progress(range(0, len(questions), batch_size), "questions"):
        batch = questions[start : start + batch_size]
        given = answer(model, processor, list(islice(visuals, batch_size)), [question.question for question in batch])
        for question, text in zip(batch, given):
            right[question.type] += text == question.answer
    majority = majority_shares(questions)
    return {
        **{f"{name}/{kind}": right[kind] / counts[kind] for kind in majority},
        **{f"{name}_majority/{kind}": share for kind, share in majority.items()},
        f"{name}/mean": right.total() / len(questions),
        f"{name}/majority": sum(share * counts[kind] for kind, share in majority.items()) / len(questions),
    }


def majority_shares(questions: list[Question]) -> dict[str, float]:
    """What always giving the commonest answer of a type would get, by type."""
    answers = defaultdict(list)
    for question in questions:
        answers[question.type].append(question.answer)
    return {name: max(map(given.count, given)) / len(given) for name, given in sorted(answers.items())}


def evaluate_reconstruction(
    model: HydraTokModel, language: ToyLanguage, num_scenes: int, seed: int = 0
) -> dict[str, float]:
    """Mean PSNR in dB: `reconstruction/psnr` on held-out scenes, `reconstruction/psnr_photos` on scikit-image's photographs."""
    generator = torch.Generator().manual_seed(seed)
    scenes = language.world.sample_scenes(num_scenes, generator, split="test")
    pixel_values = language.world.render(scenes)
    crops = photo_crops(pixel_values.shape[-1])
    return {
        "reconstruction/psnr": psnr(pixel_values, reconstruct(model, pixel_values, seed)).mean().item(),
        "reconstruction/psnr_photos": psnr(crops, reconstruct(model, crops, seed)).mean().item(),
    }


SPATIAL = ("horizontal", "vertical", "nearer")  # types of questions


def evaluate_unimrg(
    pipeline: HydraPipeline,
    language: ToyLanguage,
    prompts_per_category: int,
    num_questions: int,
    num_scenes: int,
    seed: int = 0,
) -> dict[str, float]:
    """The scores of UniMRG: text to image, questions with `vqa/spatial`, the mean of three types, and painted maps."""
    model, processor = pipeline.model, pipeline.processor
    scores = evaluate_understanding(model, processor, language, num_questions, seed)
    if spatial := [scores[name] for name in (f"vqa/{kind}" for kind in SPATIAL) if name in scores]:
        scores["vqa/spatial"] = sum(spatial) / len(spatial)
    return {
        **evaluate_generation(pipeline, language, prompts_per_category, seed),
        **scores,
        **evaluate_painting(model, processor, language.world, num_scenes, seed),
    }


def evaluate_painting(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    world: ToyWorld,
    num_scenes: int,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Scores of what a model paints of held-out scenes, see `score_maps`, next to those of maps without information:
    `black`, the `mean` map, `another` scene's map.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = world.sample_scenes(num_scenes, generator, split="test", scattered=0.5)
    painted = paint_scenes(model, processor, world, scenes, generator, batch_size)
    truth = {task: getattr(world, painter)(scenes) for task, painter in PAINTED.items()}
    trivial = {
        "black": {task: torch.full_like(pixels, -1.0) for task, pixels in truth.items()},
        "mean": {task: pixels.mean(dim=0, keepdim=True).expand_as(pixels) for task, pixels in truth.items()},
        "another": {task: pixels.roll(1, dims=0) for task, pixels in truth.items()},
    }
    scores = {f"paint/{name}": value for name, value in score_maps(painted, truth, world, scenes).items()}
    for kind, pictures in trivial.items():
        scores |= {f"paint_{kind}/{name}": value for name, value in score_maps(pictures, truth, world, scenes).items()}
    return scores


def paint_scenes(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    world: ToyWorld,
    scenes: Scenes,
    generator: torch.Generator,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """What a model paints of scenes for each task of `PAINTED`, (B, 3, H, W) in [-1, 1]; the task's `PROMPTS` take turns."""
    images = processor.image_processor.postprocess(world.render(scenes), output_type="pil")
    painted = {}
    for task in PAINTED:
        prompts = [PROMPTS[task][index % len(PROMPTS[task])] for index in range(len(scenes))]
        parts = [
            torch.stack(
                paint(model, processor, images[i : i + batch_size], prompts[i : i + batch_size], generator=generator)
            )
            for i in progress(range(0, len(scenes), batch_size), task)
        ]
        painted[task] = torch.cat(parts).cpu().clamp(-1, 1)
    return painted


def score_maps(
    painted: dict[str, Tensor], truth: dict[str, Tensor], world: ToyWorld, scenes: Scenes
) -> dict[str, float]:
    """Mean scores over scenes of images (B, 3, H, W) of each task of `PAINTED` against the truth; `order` is over pairs of
    objects."""
    objects, right, pairs = world.object_masks(scenes), 0, 0
    for index, masks in enumerate(objects):
        present = masks.flatten(1).any(dim=1)
        found = maps.order_accuracy(painted["depth"][index], masks[present], scenes.distances[index][present])
        right, pairs = right + found[0], pairs + found[1]
    means = maps.map_scores(painted, truth)
    return {**{name: value.mean().item() for name, value in means.items()}, "order": right / max(pairs, 1)}
