"""Benchmark suites of `hydra evaluate --suite NAME`: a module's `run` takes the pipeline, the model's name and its options."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module


SUITES = {  # name -> module of this folder, what it is
    "lmms_eval": ("lmms_eval", "understanding, or drawing with a judge, by the tasks of lmms-eval"),
    "vlmevalkit": ("vlmevalkit", "understanding by the data sets of VLMEvalKit"),
    "geneval": ("geneval", "text to image, 553 prompts of six categories"),
    "dpg_bench": ("text_to_image", "long prompts"),
    "wise": ("text_to_image", "prompts that need knowledge"),
    "t2i_compbench": ("text_to_image", "prompts of attributes and relations"),
    "imgedit": ("edits", "edits of nine kinds"),
    "gedit": ("edits", "edits that users asked for"),
    "vbench": ("vbench", "text to video"),
    "imagenet_256": ("reconstruction", "ImageNet's validation images, rebuilt"),
    "coco_2017": ("reconstruction", "COCO's validation images, rebuilt"),
    "davis": ("reconstruction", "DAVIS, 17 frames of each clip rebuilt"),
    "ucf": ("reconstruction", "UCF101, 17 frames of each clip rebuilt"),
    "images": ("reconstruction", "any images, rebuilt"),
    "clips": ("reconstruction", "any clips, rebuilt"),
    "painting": ("painting", "UniMRG: images, depth maps and boundaries, painted from images, against their targets"),
    "representation": ("representation", "CKNNA of features, by layer with a teacher, and t-SNE maps"),
}


def load_suite(name: str) -> Callable:
    """The function `run(pipeline, model, *, ...)` of a suite, which returns a SuiteResult; its keywords are options."""
    run = import_module(f"{__name__}.{SUITES[name][0]}").run
    return partial(run, suite=name) if "suite" in inspect.signature(run).parameters else run
