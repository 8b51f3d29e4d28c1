"""Tables of the papers with the papers' own numbers, and our scores in a row below them.

A column names the score of a SuiteResult that belongs there, and how many of its units the paper prints for 1.
HYDRA is arXiv 2603.15228, HYDRA-X arXiv 2606.13289. Of other models, only the closest is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .report import NUMBER_FORMAT, TOY_WORLD, SuiteResult, markdown_table


@dataclass(frozen=True)
class Column:
    """A column: its head in the paper, the name of the score, units of the paper for a score of 1, decimals."""

    header: str
    score: str
    scale: float = 100
    decimals: int = 1


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper; each row is a name and a value for each column, None where the paper has none."""

    source: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float | None, ...]]

    def __post_init__(self):
        assert all(len(values) == len(self.columns) for values in self.rows.values()), self.source


GENEVAL = {"Single Obj.": "single_object", "Two Obj.": "two_object", "Counting": "counting", "Colors": "colors",
           "Position": "position", "Color Attri.": "color_attr", "Overall": "overall"}  # fmt: skip
WISE = ("culture", "time", "space", "biology", "physics", "chemistry", "overall")
UNIMRG_COLUMNS = tuple(
    Column(header, score, decimals=2)
    for header, score in {
        "MMBench": "mmbench_en_dev", "MMVP": "mmvp", "Hallusion": "hallusionbench", "RWQA": "realworldqa", "VSR": "vsr",
        "GenEval": "geneval/overall", "DPG": "dpg_bench/overall",
    }.items()
)  # fmt: skip

TABLES = (
    PaperTable(
        "HYDRA, table 1: reconstruction, 256 px",
        (
            Column("ImageNet PSNR", "imagenet_256/psnr", 1, 2), Column("ImageNet SSIM", "imagenet_256/ssim", 1, 2),
            Column("ImageNet rFID", "imagenet_256/rfid", 1, 2), Column("COCO PSNR", "coco_2017/psnr", 1, 2),
            Column("COCO SSIM", "coco_2017/ssim", 1, 2), Column("COCO rFID", "coco_2017/rfid", 1, 2),
        ),
        {
            "FLUX-VAE": (32.74, .92, .18, 32.32, .93, 1.35),
            "HYDRA-TOK, trained on ImageNet": (37.09, .97, .12, 35.63, .98, 1.05),
            "HYDRA-TOK": (36.39, .96, .08, 35.94, .96, .81),
        },
    ),
    PaperTable(
        "HYDRA, table 2: image understanding",
        (
            Column("MME-S", "mme", 1), Column("AI2D", "ai2d"), Column("OCRBench", "ocrbench"),
            Column("MMB", "mmbench_en_dev"), Column("RWQA", "realworldqa"), Column("SEED", "seedbench_image"),
            Column("MMMU", "mmmu_val"), Column("MMStar", "mmstar"),
        ),
        {
            "Show-o2 1.5B": (1742.3, 69.0, 24.5, 67.4, 56.5, 65.6, 37.1, 43.4),
            "HYDRA 1.5B": (1877.9, 79.4, 50.8, 76.8, 60.7, 74.5, 39.1, 57.0),
            "Show-o2 7B": (1920.5, 78.6, 32.4, 79.3, 64.7, 69.8, 48.9, 56.6),
            "HYDRA 7B": (2068.6, 85.1, 57.7, 82.4, 64.7, 75.5, 49.4, 62.3),
        },
    ),
    PaperTable(
        "HYDRA, table 3: text to image",
        (
            Column("GenEval Two Obj.", "geneval/two_object", 1, 2), Column("Pos.", "geneval/position", 1, 2),
            Column("Over.", "geneval/overall", 1, 2), Column("DPG-Bench Glob.", "dpg_bench/global", decimals=2),
            Column("Rel.", "dpg_bench/relation", decimals=2), Column("Over.", "dpg_bench/overall", decimals=2),
            Column("WISE Cult.", "wise/culture", 1, 2), Column("Space", "wise/space", 1, 2),
            Column("Over.", "wise/overall", 1, 2),
        ),
        {
            "Show-o2 1.5B": (.86, .46, .73, 87.53, 90.30, 85.02, .33, .53, .39),
            "HYDRA 1.5B": (.95, .76, .86, 89.65, 91.59, 85.51, .49, .64, .49),
            "Show-o2 7B": (.87, .52, .76, 89.00, 91.81, 86.14, .40, .58, .44),
            "HYDRA 7B": (.97, .81, .86, 90.22, 91.83, 86.40, .52, .68, .53),
        },
    ),
    PaperTable(
        "HYDRA-X, table 1: attention and folds, ImageNet 256 px and DAVIS 17 x 256 x 256, 150k steps",
        (
            Column("ImageNet PSNR", "imagenet_256/psnr", 1, 2), Column("SSIM", "imagenet_256/ssim", 1, 4),
            Column("rFID", "imagenet_256/rfid", 1, 3), Column("DAVIS PSNR", "davis/psnr", 1, 2),
            Column("SSIM", "davis/ssim", 1, 4), Column("rFVD", "davis/rfvd", 1, 2),
        ),
        {
            "full attention": (31.10, .8890, .367, 27.40, .8277, 16.20),
            "causal attention": (31.38, .8901, .352, 27.62, .8283, 14.05),
            "tubelet attention": (31.42, .8907, .347, 27.69, .8287, 13.69),
            "tubelet attention and two 2x folds": (31.73, .8936, .329, 27.97, .8307, 11.19),
        },
    ),
    PaperTable(
        "HYDRA-X, table 9: reconstruction of images and clips, 256 px",
        (
            Column("ImageNet PSNR", "imagenet_256/psnr", 1, 2), Column("SSIM", "imagenet_256/ssim", 1, 3),
            Column("rFID", "imagenet_256/rfid", 1, 3), Column("DAVIS PSNR", "davis/psnr", 1, 2),
            Column("SSIM", "davis/ssim", 1, 3), Column("rFVD", "davis/rfvd", 1, 2), Column("UCF PSNR", "ucf/psnr", 1, 2),
            Column("SSIM", "ucf/ssim", 1, 3), Column("rFVD", "ucf/rfvd", 1, 2),
        ),
        {
            "Wan2.2": (31.25, .878, .749, 27.64, .820, 14.78, 36.11, .961, 4.15),
            "AToken-So/C": (29.72, .848, .209, 26.60, .784, 29.19, 34.66, .953, 7.77),
            "HYDRA-XTok, images, trained on ImageNet": (32.96, .905, .154, None, None, None, None, None, None),
            "HYDRA-XTok": (32.04, .898, .465, 28.19, .835, 11.61, 36.88, .967, 3.11),
        },
    ),
    PaperTable(
        "HYDRA-X, table 2: distillation, 1.5B",
        (
            Column("MVBench", "mvbench"), Column("VideoMME", "videomme"), Column("AI2D", "ai2d"), Column("MME", "mme", 1, 0),
            Column("GenEval", "geneval/overall"), Column("ImgEdit", "imgedit/overall", 1, 2),
        ),
        {
            "none": (29.8, 27.4, 45.1, 989, 67.5, 2.35),
            "image teacher": (42.1, 42.5, 61.2, 1339, 70.6, 2.72),
            "and decompressor with the image teacher": (44.7, 44.3, 62.7, 1522, 70.7, 3.07),
            "and decompressor with the video teacher": (45.4, 45.0, 62.5, 1501, 72.0, 3.20),
            "the last, Sem-ViT bidirectional": (43.1, 43.7, 62.0, 1434, 70.1, 2.70),
        },
    ),
    PaperTable(
        "HYDRA-X, table 3: source-target interaction, 1.5B",
        (
            Column("ImgEdit", "imgedit/overall", 1, 2), Column("Recon-PSNR", "imgedit/source_psnr", 1, 2),
            Column("GenEval", "geneval/overall", decimals=2), Column("MVBench", "mvbench"), Column("VideoMME", "videomme"),
            Column("AI2D", "ai2d"), Column("MME", "mme", 1),
        ),
        {
            "independent": (2.80, 20.74, 70.51, 45.3, 45.0, 62.2, 1478.5),
            "STI": (3.20, 27.65, 71.97, 45.4, 45.0, 62.5, 1501.0),
        },
    ),
    PaperTable(
        "HYDRA-X, table 4: image understanding",
        (
            Column("AI2D", "ai2d"), Column("MME", "mme", 1), Column("MMMU", "mmmu_val"), Column("OCRBench", "ocrbench"),
            Column("MMB", "mmbench_en_dev"), Column("RWQA", "realworldqa"), Column("ChartQA", "chartqa"),
            Column("DocVQA", "docvqa_val"), Column("InfoVQA", "infovqa_val"),
        ),
        {
            "Show-o2 7B": (78.6, 1620.5, 48.9, 32.4, 79.3, 64.7, 52.3, 77.3, 45.8),
            "HYDRA 7B": (85.1, 2068.6, 49.4, 57.7, 82.4, 64.7, None, None, None),
            "HYDRA-X 7B": (86.5, 2350.0, 51.5, 84.5, 84.0, 68.7, 86.5, 81.7, 59.1),
        },
    ),
    PaperTable(
        "HYDRA-X, table 5: video understanding",
        (
            Column("MVBench", "mvbench"), Column("Video-MME", "videomme"), Column("LongVideoBench", "longvideobench_val"),
            Column("LVBench", "lvbench"),
        ),
        {
            "Show-o2 1.5B": (49.8, 48.0, 49.2, None),
            "Show-o2 7B": (55.8, 57.4, 55.5, None),
            "HYDRA-X 7B": (59.1, 60.0, 59.5, 30.0),
        },
    ),
    PaperTable(
        "HYDRA-X, table 6: generation of images and clips",
        (
            Column("GenEval Two Obj.", "geneval/two_object", 1, 2), Column("Pos.", "geneval/position", 1, 2),
            Column("Over.", "geneval/overall", 1, 2), Column("WISE Cult.", "wise/culture", 1, 2),
            Column("Space", "wise/space", 1, 2), Column("Over.", "wise/overall", 1, 2),
            Column("VBench QS", "vbench/quality", decimals=2), Column("SS", "vbench/semantic", decimals=2),
            Column("Total", "vbench/total", decimals=2),
        ),
        {
            "Show-o2 1.5B": (.86, .46, .73, .33, .53, .39, 82.10, 78.31, 81.34),
            "HYDRA-X 7B": (.95, .84, .88, .53, .72, .56, 83.97, 81.57, 83.49),
        },
    ),
    PaperTable(
        "HYDRA-X, table 7: image editing",
        (
            Column("ImgEdit Ext.", "imgedit/extract", 1, 2), Column("Rm.", "imgedit/remove", 1, 2),
            Column("Over.", "imgedit/overall", 1, 2), Column("GEdit G-SC", "gedit/semantics", 1, 2),
            Column("G-PQ", "gedit/quality", 1, 2), Column("G-Over.", "gedit/overall", 1, 2),
        ),
        {
            "OmniGen2": (1.77, 3.20, 3.44, 7.16, 6.77, 6.41),
            "HYDRA-X 7B": (4.04, 4.38, 4.34, 7.80, 7.24, 7.17),
        },
    ),
    PaperTable(
        "HYDRA-X, table 10: GenEval by category; HYDRA and Show-o2 with rewritten prompts",
        tuple(Column(header, f"geneval/{score}", 1, 2) for header, score in GENEVAL.items()),
        {
            "Show-o2 7B": (1.00, .87, .58, .92, .52, .62, .76),
            "HYDRA 7B": (1.00, .97, .68, .91, .81, .80, .86),
            "HYDRA-X 7B": (.99, .95, .83, .90, .84, .75, .88),
        },
    ),
    PaperTable(
        "HYDRA-X, table 11: WISE by category",
        tuple(Column(name.capitalize(), f"wise/{name}", 1, 2) for name in WISE),
        {
            "Show-o2 7B": (.40, .45, .58, .39, .53, .34, .44),
            "HYDRA 7B": (.52, .53, .68, .47, .58, .38, .53),
            "HYDRA-X 7B": (.53, .57, .72, .53, .64, .40, .56),
        },
    ),
    PaperTable(
        "UniMRG, table 1: post-training",
        UNIMRG_COLUMNS,
        {
            "Harmon-1.5B": (50.43, 60.00, 46.69, 46.67, 60.88, 71.37, 80.52),
            "Harmon-1.5B + SFT": (50.43, 60.00, 47.95, 50.20, 60.88, 0.30, 2.85),
            "Harmon-1.5B + RecA": (49.50, 61.00, 47.11, 49.54, 59.00, 83.86, 86.61),
            "Harmon-1.5B + UniMRG": (52.23, 62.67, 49.32, 51.90, 61.21, 85.26, 85.27),
            "OpenUni-3.6B": (81.19, 71.67, 60.88, 65.23, 66.69, 50.97, 79.41),
            "OpenUni-3.6B + SFT": (79.81, 73.33, 64.25, 63.14, 72.18, 38.07, 70.24),
            "OpenUni-3.6B + RecA": (81.19, 71.67, 60.88, 65.23, 66.69, 58.01, 81.54),
            "OpenUni-3.6B + UniMRG": (81.44, 74.67, 64.56, 66.01, 73.90, 55.82, 81.78),
            "Show-o-1.3B": (47.85, 50.00, 46.06, 38.17, 54.26, 67.32, 81.94),
            "Show-o-1.3B + SFT": (48.02, 50.67, 45.85, 37.65, 51.55, 67.09, 81.98),
            "Show-o-1.3B + RecA": (47.42, 47.33, 46.69, 36.21, 52.70, 71.52, 84.44),
            "Show-o-1.3B + UniMRG": (48.11, 51.33, 47.00, 39.87, 54.42, 71.40, 84.55),
        },
    ),
    PaperTable(
        "UniMRG, table 3: ablation on Harmon-1.5B",
        UNIMRG_COLUMNS,
        {
            "Harmon-1.5B": (50.43, 60.00, 46.69, 46.67, 60.88, 71.37, 80.52),
            "+ visual understanding": (50.43, 60.00, 47.95, 50.20, 60.88, 0.30, 2.85),
            "+ pixel generation": (49.50, 61.00, 47.11, 49.54, 59.00, 83.86, 86.61),
            "+ depth generation": (50.60, 62.00, 48.26, 50.46, 60.39, 85.15, 84.96),
            "+ segmentation generation": (52.23, 62.67, 49.32, 51.90, 61.21, 85.26, 85.27),
        },
    ),
    PaperTable(
        "UniMRG, table 4: GenEval by category",
        tuple(Column(header, f"geneval/{score}", decimals=2) for header, score in GENEVAL.items()),
        {
            "Harmon-1.5B": (99.38, 86.11, 66.98, 83.87, 45.00, 46.92, 71.37),
            "Harmon-1.5B + SFT": (1.77, 0.00, 0.00, 0.00, 0.00, 0.00, 0.30),
            "Harmon-1.5B + RecA": (100.00, 97.98, 69.58, 92.82, 74.17, 68.58, 83.86),
            "Harmon-1.5B + UniMRG": (99.90, 97.39, 72.71, 89.63, 80.42, 71.50, 85.26),
            "OpenUni-3.6B": (91.46, 55.56, 46.67, 62.15, 21.92, 28.08, 50.97),
            "OpenUni-3.6B + UniMRG": (92.08, 63.05, 49.79, 63.56, 27.42, 39.00, 55.82),
        },
    ),
    PaperTable(
        "HYDRA, figure 7 and appendix C.3: CKNNA of generation and understanding features",
        (Column("CKNNA, k = 10", "cknna", 1, 2),),
        {"Show-o2": (.03,), "HYDRA, start of training": (.10,), "HYDRA": (.13,)},
    ),
)  # fmt: skip


def report(results: Iterable[SuiteResult]) -> str:
    """Markdown: every table of the papers for which there is a score, our rows in bold; then other scores, tables of the toy world
    alone, and all protocols.

    Raises ValueError if two results have the same score of the same model with the same seeds, or of the toy world with the
    same settings.
    """
    results = list(results)
    toy = [result for result in results if result.protocol.get("data") == TOY_WORLD]
    rows = _rows_by_model([result for result in results if result not in toy])
    parts, used = [], set()
    for table in TABLES:
        names = {column.score for column in table.columns}
        own = {model: cells for model, cells in rows.items() if names & set(cells)}
        if own:
            used |= names
            parts.append(f"### {table.source}\n\n{_render(table, own)}")
    if others := {model: {k: v for k, v in cells.items() if k not in used} for model, cells in rows.items()}:
        parts += [_render_others(model, cells) for model, cells in others.items() if cells]
    parts += [_render_toy(suite, [result for result in toy if result.suite == suite]) for suite in _suites_of(toy)]
    return "\n\n".join([*parts, _render_protocols(results)]) + "\n"


def _rows_by_model(results: list[SuiteResult]) -> dict[str, dict[str, tuple[float, str]]]:
    """Model -> score -> (value, "" or the mark of a score that is not comparable); the seeds are named where they differ."""
    seeds = {(result.model, tuple(sorted(result.seeds.items()))) for result in results}
    several = {model for model, _ in seeds if sum(name == model for name, _ in seeds) > 1}
    rows = {}
    for result in results:
        given = ", ".join(f"{name} {seed}" for name, seed in sorted(result.seeds.items())) or "no seed"
        cells = rows.setdefault(f"{result.model} ({given})" if result.model in several else result.model, {})
        for name, value in result.scores.items():
            if name in cells:
                raise ValueError(f"Two results have {name} of {result.model}, {given}: expected one.")
            cells[name] = (value, "" if result.is_comparable else "*")
    return rows


def _render(table: PaperTable, own: dict[str, dict[str, tuple[float, str]]]) -> str:
    def show(column: Column, value: float | None, mark: str = "") -> str:
        return "" if value is None else f"{value:.{column.decimals}f}{mark}"

    rows = [[name, *map(show, table.columns, values)] for name, values in table.rows.items()]
    for model, cells in own.items():
        shown = []
        for column in table.columns:
            value, mark = cells.get(column.score, (None, ""))
            shown.append(show(column, None if value is None else value * column.scale, mark))
        rows.append([f"**{model}**", *shown])
    return markdown_table(["model", *(column.header for column in table.columns)], rows)


def _render_others(model: str, cells: dict[str, tuple[float, str]]) -> str:
    rows = [[name, f"{value:.4g}{mark}"] for name, (value, mark) in cells.items()]
    return f"### {model}: scores that no table of the papers has\n\n{markdown_table(['score', 'value'], rows)}"


def _suites_of(results: list[SuiteResult]) -> list[str]:
    return list(dict.fromkeys(result.suite for result in results))


def _render_toy(suite: str, results: list[SuiteResult]) -> str:
    """A row for each score, a column for each result."""
    labels = _labels(results)
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"Two results of the suite {suite} have {twice[0]} and the same settings: expected one.")
    rows = [
        [name, *(f"{result.scores[name]:{NUMBER_FORMAT}}" if name in result.scores else "" for result in results)]
        for name in dict.fromkeys(name for result in results for name in result.scores)
    ]
    return f"### Toy world: suite {suite}\n\n{markdown_table(['score', *labels], rows)}"


def _labels(results: list[SuiteResult]) -> list[str]:
    """The model of each result, with the settings in which results of this model differ."""
    settings = [{**result.protocol, **result.seeds, **result.counts} for result in results]
    labels = []
    for result, own in zip(results, settings):
        same = [given for other, given in zip(results, settings) if other.model == result.model]
        told = [f"{name} {value}" for name, value in own.items() if any(given.get(name) != value for given in same)]
        labels.append(", ".join([result.model, *told]))
    return labels


def _render_protocols(results: list[SuiteResult]) -> str:
    """How each result was measured; the asterisk is explained here."""
    lines = [
        "### How it was measured",
        "",
        "Bold rows are ours. A value with * may not be compared with the papers'.",
        "",
    ]
    for result in results:
        facts = {
            **result.protocol,
            **result.seeds,
            **{f"number of {name}": count for name, count in result.counts.items()},
        }
        told = "; ".join(f"{name} {value}" for name, value in facts.items())
        mark = "" if result.is_comparable else "*"
        lines.append(" ".join([f"- {result.suite}{mark} of {result.model}: {told}.", *result.notes]))
    return "\n".join(lines)
