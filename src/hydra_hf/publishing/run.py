"""A training run on the Hub while it trains, in the folder `training` of a repo; and from there onto another machine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    CommitScheduler,
    HfApi,
    snapshot_download,
)
from huggingface_hub.utils import filter_repo_objects

from hydra_hf.hub import check_repo_id

from .push import push, uploading


logger = logging.getLogger(__name__)

FOLDER = "training"
NOT_UPLOADED = ["*.tmp/*", "*.old/*", "*.lock", ".*", "*/.*"]
MINUTES = 5


class RunUploader(CommitScheduler):
    """Mirrors a run's folder every few minutes: new and changed files are uploaded, and those that are gone are deleted."""

    def __init__(self, repo_id: str, output_dir: Path, every: float = MINUTES):
        files = HfApi().list_repo_files(repo_id)
        names = [name.removeprefix(f"{FOLDER}/") for name in files if name.startswith(f"{FOLDER}/")]
        self.uploaded: dict[str, tuple[int, int] | None] = dict.fromkeys(names)  # name -> size and time
        super().__init__(repo_id=repo_id, folder_path=output_dir, every=every, path_in_repo=FOLDER)

    def push_to_hub(self) -> CommitInfo | None:
        with self.lock:
            paths = {p.relative_to(self.folder_path).as_posix(): p for p in self.folder_path.rglob("*") if p.is_file()}
            stats = {n: paths[n].stat() for n in filter_repo_objects(paths, ignore_patterns=NOT_UPLOADED)}
            found = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
            changed = [name for name, state in found.items() if self.uploaded.get(name) != state]
            changes = [CommitOperationAdd(f"{FOLDER}/{name}", paths[name]) for name in changed]
            changes += [CommitOperationDelete(f"{FOLDER}/{name}") for name in self.uploaded if name not in found]
            if not changes:
                return None
            commit = self.api.create_commit(self.repo_id, changes, commit_message="Training")
            self.uploaded = found
            return commit


@contextmanager
def mirrored(repo_id: str, output_dir: Path) -> Iterator[None]:
    """Inside, the run in `output_dir` is uploaded every few minutes; at the end once more, with the finished model at the root.

    A run that is on the Hub and not in `output_dir` is downloaded first. Raises OSError if the Hub refuses.
    """
    check_repo_id(repo_id)
    with uploading(repo_id):
        HfApi().create_repo(repo_id, exist_ok=True)
        if not (output_dir / "run.json").exists():
            download_run(repo_id, output_dir)
        uploader = RunUploader(repo_id, output_dir)
    try:
        yield
    finally:
        try:
            with uploading(repo_id):
                uploader.trigger().result()
            if (output_dir / "final").is_dir():
                push(output_dir / "final", repo_id)
        except OSError as error:  # the run itself is whole
            logger.error("The end of the run could not be uploaded to %s: %s", repo_id, error)
        finally:
            uploader.stop()


def download_run(repo_id: str, output_dir: Path) -> None:
    """Puts the run of a repo into `output_dir`, if the repo has one."""
    with TemporaryDirectory(dir=output_dir, prefix=".") as temporary:
        snapshot_download(repo_id, allow_patterns=[f"{FOLDER}/*"], local_dir=temporary)
        for path in (Path(temporary) / FOLDER).glob("*"):
            path.rename(output_dir / path.name)
