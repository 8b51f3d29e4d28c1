"""Every route, driven by OpenAI's own client: what it gives, its limits, and errors in OpenAI's format."""

import base64
import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from serving_runs import NAME, largest_difference

from hydra_hf.pipelines.dialogue import reply


openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
JSON = {"content-type": "application/json"}
STEPS = {"num_inference_steps": 2}


def ask(client, content, **options):
    options = {"extra_body": STEPS, "seed": 0, "model": NAME} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)


def data_url(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2])))


def with_image(picture: Image.Image, text: str) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": text}]


def wait_until(condition, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def picture(pipeline) -> Image.Image:
    return pipeline("two apples", num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images[0]


def test_models_health_and_metrics(client, served):
    address, _ = served
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{address}/metrics").text
    assert 'hydra_requests_total{route="/health",status="200"}' in metrics
    assert "hydra_waiting 0.0" in metrics


def test_a_question_about_an_image_is_answered_as_by_the_model(client, pipeline, picture):
    content = with_image(picture, "how many apples are there?")
    answer = ask(client, content)
    message = [{"role": "user", "content": [{"type": "image", "image": picture}, content[1]]}]
    assert answer.choices[0].message.content == reply(pipeline.model, pipeline.processor, message)[0]["text"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 17
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer_is_the_whole_answer_in_parts(client, picture):
    content = with_image(picture, "what is in the picture?")
    whole = ask(client, content, modalities=["text"], n=2)
    chunks = list(ask(client, content, stream=True, stream_options={"include_usage": True}, n=2, modalities=["text"]))
    for index in range(2):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == (whole.choices[index].message.content or "")
        assert parts[-1].finish_reason == whole.choices[index].finish_reason
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_the_model_draws_in_a_chat_and_reads_what_it_drew(client, pipeline):
    answer = ask(client, "two apples", extra_body={**STEPS, "max_images": 1}).choices[0].message
    parts = reply(
        pipeline.model, pipeline.processor, [{"role": "user", "content": "two apples"}], max_images=1, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0), **STEPS,
    )  # fmt: skip
    assert largest_difference(opened(answer.images[0]["image_url"]["url"]), parts[0]["image"]) <= 1
    messages = [{"role": "user", "content": "two apples"}, answer, {"role": "user", "content": "how many are there?"}]
    later = client.chat.completions.create(model=NAME, messages=messages, modalities=["text"], seed=0)
    dialogue = [messages[0], {"role": "assistant", "content": parts}, messages[2]]
    assert later.choices[0].message.content == reply(pipeline.model, pipeline.processor, dialogue)[0]["text"]
    only_text = ask(client, "two apples", modalities=["text"], max_tokens=4).choices[0]
    assert not hasattr(only_text.message, "images")


def test_a_drawn_image_is_streamed_whole(client):
    chunks = list(ask(client, "two apples", extra_body={**STEPS, "max_images": 1}, stream=True))
    images = [image for chunk in chunks for image in getattr(chunk.choices[0].delta, "images", [])]
    assert opened(images[0]["image_url"]["url"]).size == (64, 64)


def test_images_are_those_of_the_pipeline(client, pipeline):
    drawn = client.images.generate(
        model=NAME, prompt="a red circle", n=2, size="96x64", extra_body={**STEPS, "seed": 7, "guidance_scale": 3.0}
    )
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = [
        pipeline("a red circle", height=64, width=96, guidance_scale=3.0, generator=generator, **STEPS).images[0]
        for generator in generators
    ]
    assert [image.size for image in expected] == [(96, 64)] * 2
    for image, other in zip(drawn.data, expected, strict=True):
        assert largest_difference(opened(image.b64_json), other) <= 1
    assert (drawn.size, drawn.output_format) == ("96x64", "png")
    assert drawn.usage.output_tokens == 2 * 24
    as_url = client.images.generate(
        model=NAME, prompt="a cat", response_format="url", output_format="jpeg", extra_body=STEPS
    )
    assert as_url.data[0].url.startswith("data:image/jpeg;base64,")
    assert opened(as_url.data[0].url).format == "JPEG"


def test_an_edit_is_that_of_the_pipeline(client, pipeline, picture):
    options = {"extra_body": {**STEPS, "seed": 3, "image_guidance_scale": 1.2}}
    edited = client.images.edit(model=NAME, image=("a.png", png(picture)), prompt="remove the apples", **options)
    expected = pipeline(
        "remove the apples",
        image=picture,
        image_guidance_scale=1.2,
        generator=torch.Generator().manual_seed(3),
        **STEPS,
    ).images[0]
    assert largest_difference(opened(edited.data[0].b64_json), expected) <= 1
    several = [("a.png", png(picture)), ("b.png", png(picture))]
    assert client.images.edit(model=NAME, image=several, prompt="a cat", **options).data[0].b64_json


def test_text_ends_at_its_limit_or_before_a_stop_string(client, picture):
    content = with_image(picture, "what is in the picture?")
    whole = ask(client, content, modalities=["text"])
    words = whole.choices[0].message.content.split()
    cut = ask(client, content, modalities=["text"], max_tokens=1)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 1
    stopped = ask(client, content, modalities=["text"], stop=words[-1])
    assert stopped.choices[0].finish_reason == "stop"
    assert words[-1] not in (stopped.choices[0].message.content or "")


def noise_picture(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


WRONG_CHATS = [
    ({"model": "gpt"}, 404, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
    ({"max_tokens": 100_000}, 400, "messages"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"temperature": 3}, 400, "temperature"),
    ({"n": 100}, 400, "n"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"nonsense": 1}, 400, "nonsense"),
    ({"size": "10x10"}, 400, None),
    ({"size": "large"}, 400, "size"),
    ({"num_inference_steps": 101}, 400, "num_inference_steps"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
]


@pytest.mark.parametrize(("change", "status", "param"), WRONG_CHATS)
def test_a_wrong_chat_is_refused_in_the_format_of_openai(served, change, status, param):
    body = {"model": NAME, "messages": [{"role": "user", "content": "a cat"}]} | change
    response = httpx.post(f"{served[0]}/v1/chat/completions", content=json.dumps(body), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["message"]


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "file:///etc/passwd", "data:image/png;base64,???", "data:image/png;base64,aGVsbG8="],
)
def test_an_image_that_is_not_sent_inline_or_not_readable_is_refused(client, url):
    with pytest.raises(openai.BadRequestError, match="image"):
        ask(client, [{"type": "image_url", "image_url": {"url": url}}])


def test_wrong_images_are_refused(client, picture):
    for options in (
        {"size": "1024x1024"},
        {"n": 100},
        {"extra_body": {"num_inference_steps": 1000}},
        {"prompt": "a " * 600},
    ):
        with pytest.raises(openai.BadRequestError, match="expected at most"):
            client.images.generate(**{"model": NAME, "prompt": "a cat", **options})
    with pytest.raises(openai.BadRequestError, match="mask"):
        client.images.edit(model=NAME, image=png(picture), mask=png(picture), prompt="a cat")
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        client.images.edit(model=NAME, image=b"no image", prompt="a cat")
    with pytest.raises(openai.NotFoundError):
        client.images.edit(model="gpt", image=png(picture), prompt="a cat")


def test_unknown_routes_methods_and_bodies_have_errors_of_the_same_format(served):
    address, _ = served
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    response = httpx.post(f"{address}/v1/chat/completions", content=b"{", headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_limits_of_the_queue_the_body_and_the_input(serve, picture):
    address, server = serve(
        api_key="secret", max_queue=2, max_batch_size=1, max_body_bytes=20_000, max_input_pixels=2000
    )
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()
    assert httpx.get(f"{address}/health").status_code == 200
    with pytest.raises(openai.RateLimitError, match="at most 2") as caught:
        client.images.generate(model=NAME, prompt="a cat", n=4, extra_body=STEPS)
    assert caught.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.BadRequestError, match="at most 2000 pixels"):
        ask(client, with_image(picture, "what is in the picture?"))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, with_image(noise_picture(200), "what is in the picture?"))
    assert caught.value.status_code == 413
    assert caught.value.type == "invalid_request_error"
    assert not server.engine.waiting


def test_a_request_whose_client_is_gone_is_cancelled(client, served):
    _, server = served
    cancelled = server.engine.num_ended["cancelled"]
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(model=NAME, prompt="a cat", extra_body={"num_inference_steps": 100}, timeout=0.5)
    assert wait_until(lambda: server.engine.num_ended["cancelled"] == cancelled + 1)
    stream = ask(client, "two apples", stream=True, temperature=2.0, extra_body={"num_inference_steps": 100}, n=2)
    next(iter(stream))
    stream.close()
    assert wait_until(lambda: not server.engine.active and not server.engine.waiting)
    assert server.engine.num_ended["cancelled"] > cancelled + 1


def test_a_forward_that_fails_ends_its_request_with_500_and_the_server_continues(client, served, monkeypatch):
    _, server = served

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.pipeline.model, "denoise_step", out_of_memory)
        with pytest.raises(openai.InternalServerError, match="its log says which") as caught:
            client.images.generate(model=NAME, prompt="a cat", extra_body=STEPS)
    assert caught.value.status_code == 500
    assert client.images.generate(model=NAME, prompt="a cat", extra_body=STEPS).data
