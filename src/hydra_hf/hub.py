"""Names on the Hub."""

from huggingface_hub.utils import HFValidationError, validate_repo_id


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def check_repo_id(name: str) -> None:
    """ValueError for a name that is no folder and cannot be a repo's either."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor a repo id, expected 'owner/name'.") from error
