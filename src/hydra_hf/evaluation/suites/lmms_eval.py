"""Understanding, and drawing with a judge, through lmms-eval: pip install hydra_hf[lmms_eval]."""

from pathlib import Path

from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from ..report import SuiteResult, package_versions
from .drawing import weights_digest


SCORES = {  # our name -> task of lmms-eval, its metrics, which are added, and how many of its units make 1 of ours
    "mme": ("mme", ("mme_perception_score", "mme_cognition_score"), 1),
    "ai2d": ("ai2d", ("exact_match",), 1),
    "ocrbench": ("ocrbench", ("ocrbench_accuracy",), 1),
    "mmbench_en_dev": ("mmbench_en_dev", ("gpt_eval_score",), 100),
    "realworldqa": ("realworldqa", ("exact_match",), 1),
    "seedbench_image": ("seedbench", ("seed_image",), 1),
    "mmmu_val": ("mmmu_val", ("mmmu_acc",), 1),
    "mmstar": ("mmstar", ("average",), 1),
    "chartqa": ("chartqa", ("relaxed_overall",), 1),
    "docvqa_val": ("docvqa_val", ("anls",), 1),
    "infovqa_val": ("infovqa_val", ("anls",), 1),
    "mmvp": ("mmvp", ("mmvp_accuracy",), 1),
    "hallusionbench": ("hallusion_bench_image", ("aAcc",), 100),
    "videomme": ("videomme", ("videomme_perception_score",), 100),
    "longvideobench_val": ("longvideobench_val_v", ("lvb_acc",), 1),
    "lvbench": ("lvbench", ("lvbench_score",), 1),
    **{
        f"wise/{name}": ("WISE", (f"WISE_{name}_score",), 1)
        for name in ("culture", "time", "space", "biology", "physics", "chemistry")
    },
    "wise/overall": ("WISE", ("WISE_overall_wiscore",), 1),
    "imgedit/overall": ("imgedit", ("imgedit_avg_score",), 1),
    "gedit/semantics": ("gedit_bench", ("gedit_bench_en_fullset_semantics",), 1),
    "gedit/quality": ("gedit_bench", ("gedit_bench_en_fullset_quality",), 1),
    "gedit/overall": ("gedit_bench", ("gedit_bench_en_fullset_overall",), 1),
}
DRAWN = ("WISE", "imgedit", "gedit_bench")  # tasks whose answer is an image
MVBENCH, NUM_MVBENCH = "mvbench_", 20


def manifest():
    """What lmms-eval's entry point asks for: the classes of the model `hydra`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = f"{__package__}.lmms_eval_model"
    return ModelManifest(
        model_id="hydra",
        simple_class_path=f"{classes}.HydraSimple",  # also for generate_visual_cot, with --force_simple
        chat_class_path=f"{classes}.HydraChat",
    )


def run(
    pipeline: HydraPipeline, model: str, *, tasks: str, folder: Path, limit: int | None = None, batch_size: int = 1,
    seed: int = 0, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    include_path: Path | None = None, mode: str | None = None,
) -> SuiteResult:  # fmt: skip
    """
    Runs tasks of lmms-eval. Answers are kept in `folder`, so that a killed run is resumed by running it again.

    Args:
        tasks: their names, with commas.
        include_path: a folder with tasks of one's own.
        mode: "generation" for tasks whose answer is an image; by default it is known for WISE, ImgEdit and GEdit.
    """
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lmms-eval is needed: pip install hydra_hf[lmms_eval].") from error
    from .lmms_eval_model import HydraChat, HydraSimple

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager("WARNING", include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"lmms-eval has no tasks {', '.join(unknown)}.")
    drawn = {name in DRAWN for name in names}
    if mode is None and len(drawn) > 1:
        raise ValueError(f"Got {tasks=}, expected only tasks that are answered in text, or only {', '.join(DRAWN)}.")
    mode = mode or ("generation" if True in drawn else "understanding")
    kind = HydraSimple if any("visual_cot" in name for name in names) else HydraChat
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "mode": mode,
    }
    weights = weights_digest(pipeline.model)
    hydra = kind(pipeline=pipeline, batch_size=batch_size, output_dir=str(folder / weights), **options)
    found = simple_evaluate(
        hydra, tasks=list(names), limit=limit, batch_size=batch_size, task_manager=manager, log_samples=False, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip  # lmms-eval's own cache is written only at the end, so the answers are kept by the model
    measured = {task: _numbers(values) for task, values in found["results"].items()}
    scores = named_scores(measured)
    known = {task for task, _, _ in SCORES.values()}
    scores |= {
        f"{task}/{name}": value
        for task, values in measured.items()
        if task not in known
        for name, value in values.items()
    }
    notes = [] if limit is None else [f"The first {limit} rows of each task."]
    counts = {f"rows of {task}": int(sizes["effective"]) for task, sizes in found.get("n-samples", {}).items()}
    protocol = {"harness": "lmms-eval", "tasks": names, "weights": weights, "answers": "greedy", "mode": mode}
    return SuiteResult(
        "lmms_eval", model, scores, protocol, {"seed": seed}, counts, limit is None and include_path is None, notes,
        package_versions("lmms_eval", "datasets"),
    )  # fmt: skip


def _numbers(values: dict) -> dict[str, float]:
    """The metrics of a task, `NAME,FILTER` -> value, by NAME; standard errors are left out."""
    numbers = {name.partition(",")[0]: value for name, value in values.items() if isinstance(value, int | float)}
    return {
        name: float(value) for name, value in numbers.items() if not name.endswith(("_stderr", "_clt", "_clustered"))
    }


def named_scores(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """Our scores from the metrics of each task. Raises KeyError if a task lacks its metric."""
    scores = {
        name: sum(measured[task][metric] for metric in metrics) / scale
        for name, (task, metrics, scale) in SCORES.items()
        if task in measured
    }
    mvbench = [values["mvbench_accuracy"] for task, values in measured.items() if task.startswith(MVBENCH)]
    if len(mvbench) == NUM_MVBENCH:
        scores["mvbench"] = sum(mvbench) / NUM_MVBENCH / 100
    return scores
