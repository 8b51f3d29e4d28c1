"""What several users get from the engine is what each gets alone, in fewer forwards; one user's end is no other's."""

import pytest
import torch
from PIL import Image
from serving_runs import Listener, largest_difference, run_together

from hydra_hf import HydraPipeline
from hydra_hf.pipelines.dialogue import reply
from hydra_hf.pipelines.editing import encode_sources
from hydra_hf.serving.engine import Engine, EngineStoppedError, QueueFullError
from hydra_hf.serving.jobs import ChatRequest, Drawing, ImageRequest


def chat(pipeline: HydraPipeline, content, max_new_tokens: int = 24, seed: int = 0, **options) -> ChatRequest:
    messages = [{"role": "user", "content": content}]
    inputs = pipeline.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return ChatRequest(inputs, max_new_tokens, Drawing(None, None, 4, 2.0, seed), **options)


def image(
    prompt: str, seed: int = 0, steps: int = 4, scale: float = 2.0, size=(None, None), **options
) -> ImageRequest:
    return ImageRequest(prompt, Drawing(*size, steps, scale, seed), **options)


def drawn(pipeline: HydraPipeline, request: ImageRequest, **options) -> Image.Image:
    drawing = request.drawing
    return pipeline(
        request.prompt, request.negative_prompt, drawing.height, drawing.width, drawing.num_inference_steps,
        drawing.guidance_scale, generator=torch.Generator().manual_seed(drawing.seed), **options,
    ).images[0]  # fmt: skip


@pytest.fixture(scope="module")
def picture(pipeline) -> Image.Image:
    return drawn(pipeline, image("a red circle", steps=8))


def test_answers_of_several_users_are_those_of_each_alone_in_fewer_forwards(pipeline, picture):
    contents = [
        "what is a cat?",
        [{"type": "image", "image": picture}, {"type": "text", "text": "what is in the picture?"}],
        [{"type": "image", "image": picture}, {"type": "text", "text": "what color is the circle?"}],
    ]
    together, engine = run_together(pipeline, [chat(pipeline, content) for content in contents])
    expected = [
        reply(pipeline.model, pipeline.processor, [{"role": "user", "content": each}]) for each in contents[1:]
    ]
    for (text, images, _), parts in zip(together[1:], expected):
        assert text == "".join(part["text"] for part in parts)
        assert not images
    alone = [run_together(pipeline, [chat(pipeline, content)])[0][0] for content in contents]
    assert together == alone
    assert engine.num_forwards["Prompt"] == 1
    assert engine.num_forwards["Token"] == max(end.completion_tokens for *_, end in alone) - 1
    assert engine.num_rows["Token"] == sum(end.completion_tokens - 1 for *_, end in alone)


def test_images_of_several_users_are_those_of_the_pipeline_in_fewer_steps(pipeline):
    requests = [
        image("a red circle", seed=1, steps=5),
        image("two blue squares and a green star left of them", seed=2, scale=5.0),
        image("a cat", seed=3, scale=1.0, steps=3),
        image("a dog", seed=4, size=(64, 96), negative_prompt="a cat"),
    ]
    together, engine = run_together(pipeline, requests)
    for request, (_, (picture,), end) in zip(requests, together):
        assert largest_difference(picture, drawn(pipeline, request)) <= 1
        assert end.reason == "stop"
    assert engine.num_rows["Step"] == 5 + 4 + 3 + 4
    assert engine.num_forwards["Step"] == 5 + 3  # those with guidance, and the one without


def test_an_image_that_comes_later_joins_those_in_work(pipeline):
    requests = [image("a red circle", seed=1, steps=4), image("a cat", seed=2, steps=4)]
    engine, listeners = Engine(pipeline), [Listener(request) for request in requests]
    engine.waiting.append(listeners[0].job)
    for _ in range(2):
        engine.turn()
    engine.waiting.append(listeners[1].job)
    while engine.active:
        engine.turn()
    assert engine.num_forwards["Step"] == 2 + 4
    for request, listener in zip(requests, listeners):
        _, (picture,), _ = listener.collected()
        assert largest_difference(picture, drawn(pipeline, request)) <= 1


def test_answers_leave_and_join_the_batch_as_they_end_and_come(pipeline, picture):
    questions = ["what is in the picture?", "how many circles are there?", "what colour is the circle?"]
    requests = [
        chat(pipeline, [{"type": "image", "image": picture}, {"type": "text", "text": text}], max_new_tokens=length)
        for text, length in zip(questions * 2, (24, 2, 24, 24, 3, 24))
    ]
    together, engine = run_together(pipeline, requests, max_batch_size=2)
    assert together == [run_together(pipeline, [request])[0][0] for request in requests]
    assert engine.num_rows["Token"] > engine.num_forwards["Token"]


def test_edits_share_steps_and_are_those_of_the_pipeline(clip_pipeline):
    pictures = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue")]
    requests = [
        image(
            prompt, seed, image_guidance_scale=1.5, sources=encode_sources(clip_pipeline.processor, [[source]], 1)
        )
        for seed, (prompt, source) in enumerate(zip(("a cat", "draw a dog left of a green star"), pictures))
    ]  # fmt: skip
    together, engine = run_together(clip_pipeline, requests)
    for request, source, (_, (edited,), _) in zip(requests, pictures, together):
        assert largest_difference(edited, drawn(clip_pipeline, request, image=source, image_guidance_scale=1.5)) <= 1
    assert engine.num_forwards["Step"] == 4
    assert engine.num_rows["Step"] == 2 * 4


def test_images_inside_an_answer_are_those_of_the_model(tiny_pipeline):
    """The weights are random; a bias makes an image follow each first token of text."""
    start_id = tiny_pipeline.model.config.vision_start_token_id
    biased = {"sequence_bias": [[[start_id], 1000.0]], "begin_suppress_tokens": [start_id]}
    contents, options = ["a cat", "a red circle and a dog"], {"max_new_tokens": 9, "max_images": 2}
    requests = [chat(tiny_pipeline, content, text_options=biased, **options) for content in contents]
    together, engine = run_together(tiny_pipeline, requests)
    for content, (answer, images, end) in zip(contents, together):
        parts = reply(
            tiny_pipeline.model, tiny_pipeline.processor, [{"role": "user", "content": content}], num_inference_steps=4,
            guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **biased, **options,
        )  # fmt: skip
        assert answer == "".join(part["text"] for part in parts if part["type"] == "text")
        expected = [part["image"] for part in parts if part["type"] == "image"]
        assert len(expected) == 2
        assert all(largest_difference(*pair) <= 1 for pair in zip(images, expected, strict=True))
        assert end.image_tokens == 17 * 2
    assert engine.num_rows["Step"] == 2 * engine.num_forwards["Step"]


def test_sampled_text_depends_on_its_seed_alone(pipeline):
    options = {"text_options": {"do_sample": True, "temperature": 1.5, "top_k": 0}}
    requests = [chat(pipeline, "what is in the picture?", seed=seed, **options) for seed in range(4)]
    together, _ = run_together(pipeline, requests)
    assert together == [run_together(pipeline, [request])[0][0] for request in requests]
    assert len({text for text, *_ in together}) > 1


def test_a_cancelled_job_is_not_run_and_the_others_are(pipeline):
    listeners = [Listener(image(prompt, steps=6)) for prompt in ("a cat", "a dog")]
    engine = Engine(pipeline)
    engine.waiting.extend(listener.job for listener in listeners)
    for _ in range(2):
        engine.turn()
    listeners[0].job.cancel()
    while engine.active:
        engine.turn()
    assert engine.num_rows["Step"] == 2 + 6
    assert listeners[0].events.empty()
    assert listeners[1].collected()[1]
    assert engine.num_ended == {"cancelled": 1, "done": 1}


def test_a_request_that_fails_leaves_the_others_alone(pipeline):
    wrong = Listener(image("a cat " * 400))
    right = Listener(image("a cat"))
    engine = Engine(pipeline)
    engine.waiting.extend([wrong.job, right.job])
    while engine.waiting or engine.active:
        engine.turn()
    with pytest.raises(ValueError, match="tokens"):
        wrong.collected()
    assert right.collected()[1]


def test_a_full_queue_takes_nothing_and_a_stopped_engine_ends_its_jobs(pipeline):
    engine = Engine(pipeline, max_batch_size=1, max_queue=2)
    with pytest.raises(EngineStoppedError):
        engine.submit([Listener(image("a cat")).job])
    listeners = [Listener(image("a cat", steps=100)) for _ in range(2)]
    engine.start()
    engine.submit([listener.job for listener in listeners])
    with pytest.raises(QueueFullError, match="at most 2"):
        engine.submit([Listener(image("a cat")).job for _ in range(3)])
    engine.stop()
    for listener in listeners:
        with pytest.raises(EngineStoppedError):
            listener.collected()
    assert not engine.is_running
