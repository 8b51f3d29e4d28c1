"""Runs the notebooks of docs/notebooks/ and keeps what they print and draw in them.

python examples/run_notebooks.py [NAME ...]
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat  # pip install ".[test]"
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook, run anew in an empty folder, without warnings and progress bars."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown = [output for output in cell.outputs if output.output_type in ("stream", "execute_result")]
            cell.outputs = [output for output in shown if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # the same picture as its PNG
    notebook.metadata.language_info = {"name": "python"}  # not the version that ran it
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))])
    for name in parser.parse_args().names:
        nbformat.write(execute(NOTEBOOKS / f"{name}.ipynb"), NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
