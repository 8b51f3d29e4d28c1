"""The documentation is true: its commands, its tables, its pictures and its notebooks are those of the repository.

`make docs` builds the site, where a link or a page that is not there is an error.
"""

import io
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import hydra_hf
from doc_commands import check_command, code_blocks, hydra_commands, run_hydra


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in [DOCS / "index.md", *sorted(DOCS.glob("pages/*.md"))]}
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
ENDS = ("generate", "ask", "edit", "reconstruct", "train", "evaluate", "convert")  # commands that end by themselves


def module_at(path: Path):
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    sys.path.insert(0, str(DOCS))  # as mkdocs does
    yield module_at(DOCS / "hooks.py")
    sys.path.remove(str(DOCS))


# Pages


def blocks(language: str) -> list:
    return [
        pytest.param(block, id=f"{name}-{index}")
        for name, page in PAGES.items()
        for index, block in enumerate(code_blocks(page, language))
    ]


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_are_what_the_parser_takes(name):
    for command in hydra_commands(PAGES[name]):
        check_command(command)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_of_a_page_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {"__name__": "__docs__"})
    assert bool(capsys.readouterr().out.strip()) == ("print(" in block)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash"))
def test_command_block_of_a_page_runs(block, tmp_path):
    lines = [line for line in block.splitlines() if line.startswith(tuple(f"hydra {verb}" for verb in ENDS))]
    assert lines
    if "cat.png" in block and "--out cat.png" not in block:
        run_hydra('hydra generate "a cat" --out cat.png', tmp_path)
    for line in lines:
        run_hydra(line, tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_includes_what_is_there(name, hooks):
    uri = "index.md" if name == "index" else f"pages/{name}.md"
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    made = hooks.on_page_markdown(PAGES[name], page=page)
    assert "<!-- include" not in made
    assert "<!-- table" not in made
    assert len(made) > 100
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", made):
        assert ((DOCS / uri).parent / picture).is_file(), picture


def test_a_heading_that_is_not_there_is_an_error(hooks):
    with pytest.raises(ValueError, match="0 headings 'Painting on walls'"):
        hooks.included("README.md", "Painting on walls")


def test_a_part_ends_at_the_next_heading_and_not_at_a_comment_in_code(hooks):
    text = "# A\none\n```sh\n# not a heading\n```\n### B\ntwo\n## C\n"
    assert hooks.parts(text)[1:] == [("A", "one\n```sh\n# not a heading\n```\n"), ("B", "two\n"), ("C", "")]


def test_no_paragraph_of_the_readme_is_written_again_on_a_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraphs = [part for part in re.split(r"\n\s*\n", readme) if len(part) > 200 and not part.startswith("|")]
    assert len(paragraphs) > 30
    assert not [name for name, page in PAGES.items() for part in paragraphs if part in page]


def test_every_public_class_is_on_the_page_of_the_api():
    listed = re.findall(r"^::: ([\w.]+)", PAGES["api"], flags=re.MULTILINE)
    configurations = {name for name in hydra_hf.__all__ if name.endswith("Config")}
    public = {name for name in hydra_hf.__all__ if name[0].isupper() and name != "TINY"}
    assert public - configurations <= {path.rpartition(".")[2] for path in listed}
    assert {getattr(hydra_hf, name).__module__ for name in configurations} <= set(listed)


# Tables made from the code


def cells(table: str) -> list[list[str]]:
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in table.splitlines()[2:]]


def test_every_formula_is_in_the_line_that_the_table_names(hooks):
    rows = cells(hooks.TABLES["formulas"]())
    for _, formula, place, *_ in rows:
        path, line = place.strip("`").split(":")
        text = (ROOT / "src" / "hydra_hf" / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert formula.replace("\\", "") in text, place


@pytest.mark.parametrize(
    ("formula", "definition"),
    [
        ("eq. 2", "Bottleneck.forward"), ("eq. 3", "sample_posterior"), ("eq. 4", "Bottleneck.forward"),
        ("L_KL", "kl_loss"), ("L_cos", "cosine_loss"), ("L_dist", "distill_loss"), ("L_perc", "load_perceptual"),
        ("L_gan", "adversarial_loss"), ("L_FM", "flow_matching_loss"), ("x_t = (1 - t) x + t eps", "add_noise"),
        ("L_NTP", "HydraForConditionalGeneration.forward"),
    ],
)  # fmt: skip
def test_the_map_leads_from_a_formula_to_its_function(formula, definition, hooks):
    assert any(row[1] == formula and row[3] == f"`{definition}`" for row in cells(hooks.TABLES["formulas"]()))


@pytest.mark.parametrize(
    ("recipe", "value", "whose"),
    [
        ("hydra", "num_steps=150000", "the paper's"), ("hydra", "drop_prompt=0.1", "ours"),
        ("hydra_tok", "warmup_steps=2000", "ours"), ("hydra_x_tok", "batch_size=256", "ours"),
        ("hydra", "task_weights={'text': 1 / 3, 'understand': 2 / 3}", "ours"), ("unimrg", "RATE = 1e-05", "the paper's"),
    ],
)  # fmt: skip
def test_the_table_says_whose_a_value_is(recipe, value, whose, hooks):
    rows = cells(hooks.TABLES["recipes"]())
    assert [f"`{recipe}`", f"`{value}`", whose] in [[row[0], row[2], row[3]] for row in rows]


def test_every_choice_of_the_code_is_in_a_table(hooks):
    marked = 0
    for path in (ROOT / "src" / "hydra_hf").rglob("*.py"):
        if "recipes" not in path.parts:
            marked += len(re.findall(r"\bour\s+choice\b", path.read_text(encoding="utf-8")))
    assert marked == sum(row[-1].count("our choice") for row in cells(hooks.TABLES["choices"]()))


def test_the_literal_forms_are_fields_with_another_default():
    forms = re.findall(r"`(\w+Config)\((\w+)=(.+?)\)`", PAGES["choices"])
    assert len(forms) == 3
    for config, field, literal in forms:
        default = getattr(getattr(hydra_hf, config)(), field)
        assert str(default) != literal.strip('"')
        made = getattr(hydra_hf, config)(**{field: literal.strip('"') if '"' in literal else literal == "True"})
        assert str(getattr(made, field)) == literal.strip('"')


# Prices


def test_the_prices_are_what_the_dry_runs_printed():
    prices = module_at(ROOT / "examples" / "recipe_prices.py")
    outputs = prices.read(prices.PAGE)
    assert list(outputs) == [command for command in prices.COMMANDS if command in outputs]
    assert len(outputs) >= 4
    assert prices.page(outputs) == prices.PAGE.read_text(encoding="utf-8")
    for command in outputs:
        check_command(command.split()[1:])


@pytest.mark.slow
def test_the_price_of_a_recipe_is_still_the_one_in_the_table():
    prices = module_at(ROOT / "examples" / "recipe_prices.py")
    (command,) = [command for command in prices.COMMANDS if "tiny.tokenizer" in command]
    kept = prices.read(prices.PAGE)[command]
    assert prices.rows(command, prices.price(command)) == prices.rows(command, kept)


# Reference images


def test_a_reference_image_is_what_the_checkpoint_draws():
    reference = module_at(ROOT / "examples" / "reference_images.py")
    row = reference.DRAWN[9]  # the smallest
    pipeline = hydra_hf.HydraPipeline.from_pretrained(hydra_hf.TINY)
    pipeline.set_progress_bar_config(disable=True)
    drawn, kept = reference.draw(pipeline, *row), Image.open(DOCS / "images" / reference.file_name(*row))
    np.testing.assert_allclose(np.asarray(drawn, dtype=float), np.asarray(kept, dtype=float), atol=2)


def test_every_reference_image_is_in_the_table():
    reference = module_at(ROOT / "examples" / "reference_images.py")
    table = (DOCS / "tables" / "reference_images.md").read_text(encoding="utf-8")
    names = [reference.file_name(*row) for row in reference.DRAWN]
    assert re.findall(r"docs/images/(\S+?\.png)", table) == names
    assert {path.name for path in (DOCS / "images").iterdir()} >= set(names)
    for command in re.findall(r"`hydra (.+?)`", table):
        ((parsed),) = hydra_commands(f"```text\nhydra {command}\n```")
        check_command(parsed)


# Notebooks


def printed(notebook) -> str:
    """What the cells print, numbers apart."""
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def pictures(notebook) -> list[np.ndarray]:
    from base64 import b64decode

    found = [output["data"]["image/png"] for cell in notebook.cells for output in cell.get("outputs", [])
             if "image/png" in output.get("data", {})]  # fmt: skip
    return [np.asarray(Image.open(io.BytesIO(b64decode(data))), dtype=float) for data in found]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_small_outputs_without_errors(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert pictures(notebook)
    assert not re.search(r"/(?:tmp|home|root|opt)/", printed(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_what_it_shows(path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # the kernel runs in another folder
    run, kept = module_at(ROOT / "examples" / "run_notebooks.py").execute(path), nbformat.read(path, as_version=4)
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    texts = [printed(notebook) for notebook in (run, kept)]
    assert len({re.sub(number, "#", text) for text in texts}) == 1
    values = [[float(value) for value in re.findall(number, text)] for text in texts]
    np.testing.assert_allclose(*values, rtol=0.1, atol=0.02)
    for picture, expected in zip(pictures(run), pictures(kept), strict=True):
        assert np.abs(picture - expected).mean() < 8  # of 255
