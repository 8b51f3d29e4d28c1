"""Visual question answering on held-out scenes of the toy world."""

from collections import Counter, defaultdict

import torch
from PIL import Image

from hydra_hf.data.toy_language import ToyLanguage
from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor


@torch.no_grad()
def answer(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    images: list[Image.Image],
    questions: list[str],
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to one question about each image. ValueError for lists of different lengths or an empty question."""
    if len(images) != len(questions) or not questions:
        raise ValueError(
            f"Got {len(images)} images and {len(questions)} questions, expected as many, and at least one."
        )
    if empty := [index for index, question in enumerate(questions) if not question.strip()]:
        raise ValueError(f"The questions {empty} are empty.")
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions)
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def evaluate_understanding(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    language: ToyLanguage,
    num_questions: int,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Exact answers: `vqa/<type>`, and `vqa/mean` over all questions.

    `vqa_majority/<type>` and `vqa/majority` are what always giving the type's commonest answer would get. Only one
    question is asked about an image: no earlier turn gives anything away.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes, questions = language.sample_questions(num_questions, generator, split="test")
    images = processor.image_processor.postprocess(language.world.render(scenes), output_type="pil")
    answers: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for start in range(0, num_questions, batch_size):
        batch = questions[start : start + batch_size]
        given = answer(model, processor, images[start : start + batch_size], [question.question for question in batch])
        for question, text in zip(batch, given):
            answers[question.type].append((text, question.answer))
    names, right, majority = sorted(answers), {}, {}
    for name in names:
        right[name] = sum(given == expected for given, expected in answers[name])
        majority[name] = Counter(expected for _, expected in answers[name]).most_common(1)[0][1]
    return {
        **{f"vqa/{name}": right[name] / len(answers[name]) for name in names},
        **{f"vqa_majority/{name}": majority[name] / len(answers[name]) for name in names},
        "vqa/mean": sum(right.values()) / num_questions,
        "vqa/majority": sum(majority.values()) / num_questions,
    }
