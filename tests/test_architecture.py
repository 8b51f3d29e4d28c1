"""Which way the arrows of the package point (design, section 3), read from the imports."""

import ast
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src" / "hydra_hf"
FILES = sorted(SOURCE.rglob("*.py"))
MAY_IMPORT = {
    "modeling": {"modeling"},
    "data": {"data", "modeling"},
    "pipelines": {"pipelines", "modeling"},
    "evaluation": {"evaluation", "pipelines", "data", "modeling"},
    "evaluation/suites": {"training", "evaluation", "pipelines", "data", "modeling"},
    "publishing": {"publishing", "pipelines", "modeling"},
    "training": {"training", "publishing", "evaluation", "pipelines", "data", "modeling"},
    "training/adapters": {"training", "data", "modeling"},
    "training/recipes": {"toy", "training", "data", "modeling"},
    "toy": {"toy", "evaluation", "pipelines", "data", "modeling"},
    "conversion": {"conversion", "pipelines", "modeling"},
    "demo": {"demo", "pipelines", "data", "modeling", ""},
    "serving": {"serving", "pipelines", "modeling"},
}  # the command line and the package itself may import everything
LEAVES = {"files", "hub"}  # which import nothing of the package, and may be imported anywhere but in modeling


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, anywhere in it; "" is the package itself."""
    package = path.relative_to(SOURCE).parts[:-1]
    targets = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            targets += [
                f"{node.module}.{alias.name}" if node.module == "hydra_hf" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom):
            base = ("hydra_hf", *package[: len(package) - node.level + 1], *(node.module or "").split("."))
            targets.append(".".join(part for part in base if part))
    ours = [target.split(".") for target in targets if target.split(".")[0] == "hydra_hf"]
    parts = {target[1] if len(target) > 1 else "" for target in ours}
    return {part if part in LEAVES or (SOURCE / part).is_dir() else "" for part in parts}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    folder = path.parent.relative_to(SOURCE).as_posix()
    if folder in MAY_IMPORT:
        assert imported_parts(path) - (LEAVES if folder != "modeling" else set()) <= MAY_IMPORT[folder]
    if path.stem in LEAVES and path.parent == SOURCE:
        assert not imported_parts(path)


def test_every_folder_has_its_place_among_the_arrows():
    folders = {path.parent.relative_to(SOURCE).as_posix() for path in FILES if path.parent != SOURCE}
    assert folders - {"cli"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", sorted((SOURCE / "modeling").glob("*.py")), ids=name_of)
def test_modeling_imports_itself_relatively_so_that_the_folder_works_on_the_hub(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert node.level == 1 or node.module.split(".")[0] != "hydra_hf"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "hydra_hf" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())) or not path.read_text().strip()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_read_from_a_pickle(path):
    tree = ast.parse(path.read_text())
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "load"]
    assert not [node for node in loads if isinstance(node.value, ast.Name) and node.value.id in ("torch", "pickle")]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    assert "pickle" not in {alias.name for node in imports for alias in node.names}
