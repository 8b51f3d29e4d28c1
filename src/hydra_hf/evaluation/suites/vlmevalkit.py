"""Understanding through VLMEvalKit, as UniMRG measures it: pip install hydra_hf[vlmevalkit]."""

import os
from pathlib import Path

from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..report import SuiteResult, package_versions
from .drawing import weights_digest


PACKAGE = "ms-vlmeval"  # VLMEvalKit itself is not on PyPI
SCORES = {  # our name -> data set of VLMEvalKit, column of its result, how many of its units make 1 of ours
    "mme": ("MME", ("perception", "reasoning"), 1),
    "ai2d": ("AI2D_TEST", ("Overall",), 1),
    "ocrbench": ("OCRBench", ("Final Score Norm",), 100),
    "mmbench_en_dev": ("MMBench_DEV_EN", ("Overall",), 1),
    "realworldqa": ("RealWorldQA", ("Overall",), 1),
    "seedbench_image": ("SEEDBench_IMG", ("Overall",), 1),
    "mmmu_val": ("MMMU_DEV_VAL", ("Overall",), 1),
    "mmstar": ("MMStar", ("Overall",), 1),
    "mmvp": ("MMVP", ("Average",), 1),
    "hallusionbench": ("HallusionBench", ("aAcc",), 100),
    "vsr": ("VSR-zeroshot", ("acc",), 100),
    "chartqa": ("ChartQA_TEST", ("Overall",), 100),
    "docvqa_val": ("DocVQA_VAL", ("val",), 100),
    "infovqa_val": ("InfoVQA_VAL", ("val",), 100),
}
ROWS = {"MMMU_DEV_VAL": "validation"}  # of a result with a row for each split; the others' first row is the whole


def run(
    pipeline: HydraPipeline, model: str, *, tasks: str, folder: Path, limit: int | None = None, seed: int = 0,
    judge: str = "exact_matching", max_new_tokens: int = 64,
) -> SuiteResult:  # fmt: skip
    """
    Runs data sets of VLMEvalKit, which keeps its answers in `folder` and resumes from them.

    Args:
        tasks: their names, with commas; a TSV of one's own in the folder $LMUData is found by its name.
        judge: a model that reads free answers; VLMEvalKit's own default is gpt-4o-mini for several data sets.
    """
    try:
        import vlmeval  # noqa: F401
    except ImportError as error:
        raise ImportError("VLMEvalKit is needed: pip install hydra_hf[vlmevalkit].") from error
    os.environ |= {"PRED_FORMAT": "xlsx", "EVAL_FORMAT": "csv"}  # the pickles of its default cannot be scored
    from vlmeval.dataset import build_dataset
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import get_pred_file_path

    from .vlmevalkit_model import HydraVLM

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    weights = weights_digest(pipeline.model)
    work = folder / weights / ("all" if limit is None else f"first_{limit}")
    work.mkdir(parents=True, exist_ok=True)
    hydra, measured, counts = HydraVLM(pipeline, max_new_tokens), {}, {}
    for name in names:
        dataset = build_dataset(name)
        if dataset is None:
            raise ValueError(f"VLMEvalKit has no data set {name}.")
        infer_data_job(hydra, str(work), "hydra", dataset, limit=limit)
        counts[f"rows of {name}"] = len(dataset.data)
        measured[name] = _row(dataset.evaluate(get_pred_file_path(str(work), "hydra", name), model=judge), name)
    known = {dataset: (ours, columns, scale) for ours, (dataset, columns, scale) in SCORES.items()}
    scores = {}
    for name, values in measured.items():
        if name in known:
            ours, columns, scale = known[name]
            scores[ours] = sum(values[column] for column in columns) / scale
        else:
            scores |= {f"{name}/{column}": value for column, value in values.items()}
    notes = [] if limit is None else [f"The first {limit} rows of each data set."]
    is_comparable = limit is None and set(names) <= set(known)
    protocol = {"harness": "VLMEvalKit", "tasks": names, "judge": judge, "weights": weights, "answers": "greedy"}
    protocol["max_new_tokens"] = max_new_tokens
    versions = package_versions(PACKAGE, "pandas")
    return SuiteResult("vlmevalkit", model, scores, protocol, {"seed": seed}, counts, is_comparable, notes, versions)


def _row(result, name: str) -> dict[str, float]:
    """The numbers of a result, a dict or a table of pandas, whose first row, or that of ROWS, is the whole."""
    if not isinstance(result, dict):
        rows = result.to_dict("records")
        wanted = [row for row in rows if row.get("split") == ROWS[name]] if name in ROWS else rows
        result = wanted[0]
    numbers = {}
    for column, value in result.items():
        try:
            numbers[str(column)] = float(value)  # numbers of numpy, and of tables that are read as text
        except (TypeError, ValueError):
            continue
    return numbers
