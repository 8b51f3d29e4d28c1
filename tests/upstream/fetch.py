"""Fetches the test suites of the installed transformers and diffusers into `.sources`, which git ignores.

    python tests/upstream/fetch.py [--git NAME=REPOSITORY[@REF]]

Wheels hold no tests. The source archives on the package index hold the files at the top of `tests/`; the folders below come
from the library's git repository, at the tag of the same version. What cannot be had is named, and the tests that need it skip.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from PIL import Image


SOURCES = Path(__file__).parent / ".sources"
NEEDED = {  # by the mixins; and of diffusers, the file that they import, of the same commit whatever `--git` says
    "transformers": ["tests/exporters", "tests/generation"],
    "diffusers": ["tests/models", "tests/pipelines", "tests/testing_utils.py"],
}
PICTURE = """def url_to_local_path(url, **kwargs):
    return __file__.replace(".py", ".png") if url.endswith((".png", ".jpg", ".jpeg")) else url
"""
STUBS = {
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin:\n    is_missing = True\n",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    is_missing = True\n",
    "utils/fetch_hub_objects_for_ci.py": PICTURE,  # one picture instead of those on the network
}  # what the suites import, where it could not be had


def unpack_archive(name: str, package: Path) -> None:
    """The Python files of `tests/` in the source archive of the installed version."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", folder]
        subprocess.run([*command, f"{name}=={version(name)}"], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("*/tests")
        copy_python_files(tests, package)


def unpack_repository(name: str, package: Path, repository: str, ref: str) -> None:
    """What the archive lacks, from a git repository; one line says where that cannot be had."""
    names = " and ".join(NEEDED[name])
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-c", "advice.detachedHead=false", "-C", folder]
        commands = [
            [*git, "init", "-q"],
            [*git, "remote", "add", "origin", repository],
            [*git, "fetch", "-q", "--depth=1", "--filter=blob:none", "origin", ref],
            [*git, "checkout", "-q", "FETCH_HEAD", "--", *NEEDED[name]],
        ]
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().splitlines()[0]
            print(f"{name} {version(name)}: no {names}, their tests skip ({repository} at {ref}: {reason})")
            return
        copy_python_files(Path(folder, "tests"), package)
    print(f"{name} {version(name)}: {names} from {repository} at {ref}")


def copy_python_files(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=lambda folder, names: [
        name for name in names if not name.endswith(".py") and not Path(folder, name).is_dir()
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--git", action="append", default=[], metavar="NAME=REPOSITORY[@REF]",
        help="another git repository of a library than its public one, or another ref than the installed version's tag",
    )  # fmt: skip
    repositories = {name: f"https://github.com/huggingface/{name}" for name in NEEDED}
    repositories |= dict(source.split("=", 1) for source in parser.parse_args().git)
    shutil.rmtree(SOURCES, ignore_errors=True)
    for name, source in repositories.items():
        package = SOURCES / f"{name}_tests"
        unpack_archive(name, package)
        repository, _, ref = source.partition("@")
        unpack_repository(name, package, repository, ref or f"v{version(name)}")
    for path, stub in STUBS.items():
        file = SOURCES / path
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(stub, encoding="utf-8")
    Image.linear_gradient("L").convert("RGB").save(SOURCES / "utils" / "fetch_hub_objects_for_ci.png")


if __name__ == "__main__":
    main()
