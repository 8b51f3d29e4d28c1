"""Names of models: folders, or repos on the Hub."""

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
