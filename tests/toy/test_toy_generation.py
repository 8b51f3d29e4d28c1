import pytest
import torch

from hydra_hf.toy.checker import ToyChecker
from hydra_hf.toy.evaluation import evaluate_generation, evaluate_phrasing, evaluate_sizes
from hydra_hf.toy.language import CATEGORIES
from hydra_hf.toy.phrasing import KINDS
from hydra_hf.toy.world import CANVASES
from toy_models import toy_language, toy_pipeline


KEYS = ["t2i/single_object", "t2i/two_objects", "t2i/counting", "t2i/colors", "t2i/position", "t2i/color_attribution",
        "t2i/mean"]  # fmt: skip


def test_scores_have_their_keys_and_a_random_model_draws_nothing_right():
    scores = evaluate_generation(toy_pipeline(), toy_language(), 2, num_inference_steps=1)
    assert list(scores) == KEYS
    assert set(scores.values()) == {0.0}


def test_every_kind_of_phrasing_and_every_size_has_a_score():
    phrasings = evaluate_phrasing(toy_pipeline(), toy_language(), 1, num_inference_steps=1)
    assert list(phrasings) == [f"t2i_phrasing/{kind}" for kind in (*KINDS, "unknown_word")]
    sizes = evaluate_sizes(toy_pipeline(), toy_language(), 1, num_inference_steps=1)
    assert set(sizes) == {f"t2i_size/{height}x{width}" for height, width in CANVASES}
    assert set(sizes.values()) == {0.0}


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_checker_passes_true_pictures_of_held_out_prompts(category):
    language = toy_language()
    generator = torch.Generator().manual_seed(0)
    prompts, scenes = language.sample_prompts(8, generator, split="test", categories=(category,))
    checker = ToyChecker(language.world)
    verdicts = [checker.check(image, prompt) for image, prompt in zip(language.world.render(scenes), prompts)]
    assert verdicts == [True] * 8
    blank = torch.zeros(3, 64, 64)
    assert not any(checker.check(blank, prompt) for prompt in prompts)


def test_options_reach_the_pipeline():
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        evaluate_generation(toy_pipeline(), toy_language(), 1, num_inference_steps=0)
