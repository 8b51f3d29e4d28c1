"""The card of a repo: metadata by which the Hub finds and shows a model, how to use it, what it was trained on, its scores."""

import json
import math
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .flat import SAMPLES


LIBRARY = "hydra_hf"
PIPELINE_TAGS = {"hydra": "any-to-any", "hydra_tok": "image-feature-extraction"}
TASKS = {
    "t2i": "text-to-image", "t2v": "text-to-video", "vqa": "visual-question-answering", "edit": "image-to-image",
    "reconstruction": "image-to-image", "depth": "depth-estimation", "segment": "image-segmentation",
}  # fmt: skip  # by the first part of the name of a score
TOY = ("toy", "Toy world, held-out split")
USE_HYDRA = """```python
import torch, hydra_hf
from diffusers import AutoPipelineForText2Image

pipeline = AutoPipelineForText2Image.from_pretrained("{repo_id}")
pipeline("{prompt}", generator=torch.Generator().manual_seed(0)).images[0].save("image.png")
```

Without `hydra_hf`, from the code in this repo:

```python
from transformers import pipeline

pipe = pipeline("any-to-any", "{repo_id}", trust_remote_code=True)
message = {{"role": "user", "content": [{{"type": "text", "text": "{prompt}"}}]}}
pipe([message], generation_mode="image")[0]["generated_image"].save("image.png")
```

On the command line:

    hydra generate "{prompt}" --model {repo_id} --out image.png
    hydra ask image.png "what is in the picture" --model {repo_id}
"""
USE_TOKENIZER = """```python
import hydra_hf
from transformers import AutoImageProcessor, AutoModel

tokenizer = AutoModel.from_pretrained("{repo_id}")
processor = AutoImageProcessor.from_pretrained("{repo_id}")
```

Without `hydra_hf`, add `trust_remote_code=True` to both lines.
"""

USE_ADAPTERS = """```python
import hydra_hf
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

model = AutoModelForMultimodalLM.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(model, "{repo_id}").merge_and_unload()
```
"""


def write_card(
    folder: Path,
    repo_id: str,
    *,
    license: str | None = None,  # noqa: A002, the Hub's own name
    base_model: str | None = None,
    prompts: tuple[str, ...] = (),
    run: Path | None = None,
) -> None:
    """Writes `README.md` of a flat folder. A card that is there keeps its text and the metadata that is not given anew.

    Args:
        prompts: those of the images `samples/0.png`, `samples/1.png`, ...
        run: the folder of the training run, for its recipe and its data.
    """
    kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    record = json.loads((run / "run.json").read_text("utf-8")) if run else None
    scores = read_scores(folder)
    given = {"license": license, "base_model": base_model}
    if prompts:
        given["widget"] = [{"text": text, "output": {"url": f"{SAMPLES}/{i}.png"}} for i, text in enumerate(prompts)]
    if scores:
        given |= {"model_name": repo_id.split("/")[-1], "eval_results": results(scores)}
    defaults = {"library_name": LIBRARY, "pipeline_tag": PIPELINE_TAGS[kind], "datasets": hub_data(record) or None}
    tags = [kind.replace("_", "-"), *(["text-to-image"] if kind == "hydra" else [])]
    _save(folder, defaults, given, tags, new_text(folder, repo_id, kind, record, scores, prompts))


def write_adapter_card(folder: Path, repo_id: str, *, license: str | None, base_model: str | None) -> None:  # noqa: A002
    """Writes `README.md` of a folder of adapters, as `write_card` does."""
    text = f"\n# {repo_id.split('/')[-1]}\n\nAdapters (LoRA) for a HYDRA.\n\n" + USE_ADAPTERS.format(
        repo_id=repo_id, base_model=base_model or "BASE_MODEL"
    )
    _save(folder, {"library_name": "peft"}, {"license": license, "base_model": base_model}, ["hydra", "lora"], text)


def _save(folder: Path, defaults: dict, given: dict, tags: list[str], text: str) -> None:
    """What is given wins over a card that is there, which wins over the defaults; its text stays."""
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else None
    known = card.data.to_dict() if card else {}
    given = {name: value for name, value in given.items() if value is not None}
    if "eval_results" in given:
        known.pop("model-index", None)
    tags = list(dict.fromkeys([*known.pop("tags", []), *tags]))
    data = ModelCardData(**{"license": "other", **defaults, **known, **given, "tags": tags})
    ModelCard(f"---\n{data.to_yaml()}\n---\n{card.text if card else text}").save(path)


def new_text(
    folder: Path,
    repo_id: str,
    kind: str,
    record: dict | None,
    scores: dict[str, float],
    prompts: tuple[str, ...],
) -> str:
    title = f"# {repo_id.split('/')[-1]}"
    name = {"hydra": "HYDRA, which sees, answers and draws,", "hydra_tok": "HYDRA-TOK, a visual tokenizer,"}[kind]
    use = {"hydra": USE_HYDRA, "hydra_tok": USE_TOKENIZER}[kind]
    parts = [title, f"A {name} of {num_values(folder):,} parameters.", "## Use"]
    parts.append(use.format(repo_id=repo_id, prompt=prompts[0] if prompts else "a cat").rstrip())
    if record is not None:
        parts += ["## Data", data_table(record), "## Training", training_text(record)]
    if scores:
        rows = [f"| {name} | {value:.4g} |" for name, value in scores.items()]
        parts += ["## Scores", "\n".join(["| | |", "|---|---|", *rows])]
    return "\n" + "\n\n".join(parts) + "\n"


def num_values(folder: Path) -> int:
    """The number of values in the safetensors of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def read_scores(folder: Path) -> dict[str, float]:
    """The headline numbers in `scores.json`, as `hydra evaluate` writes it: means of a task, or its single scores."""
    path = folder / "scores.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    scores = content.get("scores", content)  # of the embedded checkpoint they are the file itself
    scores = {n: v for n, v in scores.items() if n.split("/")[0] in TASKS and isinstance(v, int | float)}
    has_mean = {name.split("/")[0] for name in scores if name.endswith("/mean")}
    return {n: v for n, v in scores.items() if n.endswith("/mean") or n.split("/")[0] not in has_mean}


def results(scores: dict[str, float]) -> list[EvalResult]:
    """The scores as the Hub's `model-index`."""
    kind, name = TOY
    return [
        EvalResult(
            task_type=TASKS[score.split("/")[0]], dataset_type=kind, dataset_name=name, dataset_split="test",
            metric_type=score, metric_name=score, metric_value=value,
        )
        for score, value in scores.items()
    ]  # fmt: skip


def hub_data(record: dict | None) -> list[str]:
    """The data sets of the Hub that a run was trained on."""
    names = [source["path"].removeprefix("hub:") for source in sources_of(record) if source["path"].startswith("hub:")]
    return list(dict.fromkeys(names))


def sources_of(record: dict | None) -> list[dict]:
    stages = record["stages"].values() if record else ()
    return [source for stage in stages if isinstance(stage.get("data"), list) for source in stage["data"]]


def data_table(record: dict) -> str:
    """A row for each source."""
    rows = []
    for name, stage in record["stages"].items():
        data = stage.get("data")
        if isinstance(data, list):
            for source in data:
                path = _portable(source["path"])
                number = source.get("num_records")
                rows.append(f"| {name} | {source['task']} | `{path}` | {'' if number is None else f'{number:,}'} |")
        elif data:
            rows.append(f"| {name} | | {data['type']}, made while training | |")
    return "\n".join(["| stage | task | data | records |", "|---|---|---|---|", *rows])


def training_text(record: dict) -> str:
    versions, recipe = record["versions"], record["recipe"]
    stages = ", ".join(f"{name} ({stage.get('num_steps', 0):,} steps)" for name, stage in record["stages"].items())
    return (
        f"Stages: {stages}; seed {recipe.get('seed')}. With"
        f" {', '.join(f'{name} {number}' for name, number in versions.items())}.\n\n    {command(record)}"
    )


def command(record: dict) -> str:
    """The command with its models and its data; `run.json` has all other fields."""
    recipe = record["recipe"]
    words = ["hydra", "train", str(recipe.get("name"))]
    for name in ("init", "tokenizer", "teacher", "video_teacher", "model"):
        if isinstance(value := recipe.get(name), dict):
            words += [f"--{name}", _portable(value["path"])]
    given = dict.fromkeys(f"{source['task']}={_portable(source['path'])}" for source in sources_of(record))
    return shlex.join([*words, *(word for source in given for word in ("--data", source))])


def _portable(path: str) -> str:
    """A path without the folders of the machine where it was absolute."""
    return Path(path).name if Path(path).is_absolute() else path
