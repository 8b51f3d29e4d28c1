"""Uploads: a model with its card, its code and sample images; adapters; a folder of data."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from hydra_hf.files import write_text
from hydra_hf.hub import check_repo_id

from .card import write_adapter_card, write_card
from .flat import SAMPLES, flatten
from .remote_code import add_remote_code, remove_remote_code


ADAPTER = "adapter_config.json"


def push(
    source: str | Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    code: bool = True,
    license: str | None = None,  # noqa: A002, the Hub's own name
    base_model: str | None = None,
    prompts: tuple[str, ...] = (),
    seed: int = 0,
    token: str | None = None,
) -> str:
    """
    Uploads a folder as one commit and returns its address, or that of the pull request.

    A pipeline or a model becomes one flat folder with a card and, unless `code` is False, the code for
    `trust_remote_code=True`. Adapters get a card; data and Spaces (`repo_type="dataset"` or "space") are
    uploaded as they are.

    Args:
        private: whether a new repo is; None is the account's default.
        revision: a branch, made from main if it is new.
        base_model: what it was trained from; adapters are loaded on it.
        prompts: images of these are drawn for the card, with `seed`.

    Raises:
        ValueError: for a folder that is none of these, or a name that is no repo id.
        OSError: if the Hub refuses, or the connection is lost.
    """
    source = Path(source)
    check_repo_id(repo_id)
    if not source.is_dir():
        raise ValueError(f"There is no folder {str(source)!r} to push.")
    with TemporaryDirectory() as temporary:
        folder = source
        if repo_type == "model":
            folder = Path(temporary)
            make_repo(
                source, folder, repo_id, code=code, license=license, base_model=base_model, prompts=prompts, seed=seed
            )
        with uploading(repo_id):
            api = HfApi(token=token)
            sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, repo_type=repo_type, revision=None if create_pr else revision,
                create_pr=create_pr, commit_message=message or f"Upload {source.resolve().name}",
                ignore_patterns=["*.tmp/*", "*.lock"],
            )  # fmt: skip
    return commit.pr_url or commit.commit_url


def make_repo(
    source: Path,
    folder: Path,
    repo_id: str,
    *,
    code: bool = True,
    license: str | None = None,  # noqa: A002
    base_model: str | None = None,
    prompts: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Writes what the repo of a model or of adapters is to have into a folder. Raises ValueError if `source` is neither."""
    flatten(source, folder)
    if (folder / ADAPTER).exists():
        if base_model is not None:
            name_base_model(folder / ADAPTER, base_model)
        write_adapter_card(folder, repo_id, license=license, base_model=base_model)
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"{source} has no config.json, model_index.json or {ADAPTER}: it is no model or adapter.")
    if prompts:
        draw_samples(folder, prompts, seed)
    run = next((path for path in (source, *source.parents[:2]) if (path / "run.json").exists()), None)
    write_card(folder, repo_id, license=license, base_model=base_model, prompts=prompts, run=run)
    (add_remote_code if code else remove_remote_code)(folder)


def name_base_model(path: Path, base_model: str) -> None:
    """Writes into the config of adapters which model they are loaded on."""
    config = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": base_model}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def draw_samples(folder: Path, prompts: tuple[str, ...], seed: int) -> None:
    import torch

    from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

    pipeline = HydraPipeline.from_pretrained(folder)
    (folder / SAMPLES).mkdir(exist_ok=True)
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    for number, image in enumerate(pipeline(list(prompts), generator=generators).images):
        image.save(folder / SAMPLES / f"{number}.png")


@contextmanager
def uploading(repo_id: str) -> Iterator[None]:
    """Raises OSError for a connection that is lost; what the Hub answers is one already."""
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"The upload to {repo_id} broke off ({error}): push again, what the Hub has is not sent twice."
        ) from error
