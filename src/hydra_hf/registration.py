"""HYDRA in the lists by which the libraries' own front doors find a model: AutoPipeline of diffusers, serving of transformers."""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType

from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


AUTO_PIPELINES = "diffusers.pipelines.auto_pipeline"


class AfterImport(MetaPathFinder):
    """Adds HYDRA to diffusers' AutoPipelines as soon as these are imported, since importing them takes seconds."""

    def find_spec(self, fullname: str, path, target=None):
        if fullname != AUTO_PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            add_pipelines(module)

        spec.loader.exec_module = execute_and_add
        return spec


def add_pipelines(auto_pipeline: ModuleType) -> None:
    from .pipelines.pipeline_hydra import HydraPipeline

    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["hydra"] = HydraPipeline
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["hydra"] = HydraPipeline


def register() -> None:
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["hydra"] = "HydraForConditionalGeneration"
    if AUTO_PIPELINES in sys.modules:
        add_pipelines(sys.modules[AUTO_PIPELINES])
    else:
        sys.meta_path.insert(0, AfterImport())
