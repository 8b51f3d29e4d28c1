"""Names of models: folders, or repos on the Hub; and where a component is in them."""

import os

from huggingface_hub.utils import HFValidationError, validate_repo_id


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def check_model_name(name: str) -> None:
    """Raises ValueError if the name is neither a folder nor a possible repo id."""
    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise ValueError(f"{name!r} is a file, expected a folder or a Hub id (owner/name).")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"There is no folder {name!r}; a Hub id is owner/name.") from error


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for what cannot be the name of a repo."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a Hub id, expected owner/name: {error}") from error


def subfolder_of(name: str | os.PathLike, component: str) -> str:
    """`component`, or "" for a flat folder or repo, whose components are next to each other."""
    from transformers.utils import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return "" if cached_file(name, "config.json", **quietly) else component
