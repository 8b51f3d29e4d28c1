"""The code of a repo, for `trust_remote_code=True` where this package is not installed: the files of `modeling` and `pipelines`
next to the weights, and the `auto_map` that names their classes."""

import json
import re
from pathlib import Path

from hydra_hf.files import write_text


PACKAGE = Path(__file__).parents[1]
ENTRY = "hydra_remote"  # all classes come from one module: transformers copies a folder's code once for each that it is asked for
CLASSES = {
    "configuration_hydra": ("HydraConfig", "HydraTokConfig"),
    "image_processing_hydra": ("HydraImageProcessor",),
    "modeling_hydra": ("HydraForConditionalGeneration", "HydraModel"),
    "modeling_hydra_tok": ("HydraTokModel",),
    "pipeline_hydra": ("HydraPipeline",),
    "pipeline_hydra_reconstruction": ("HydraReconstructionPipeline",),
    "processing_hydra": ("HydraProcessor",),
    "video_processing_hydra": ("HydraVideoProcessor",),
}
AUTO_MAPS = {
    "hydra": {
        "AutoConfig": "HydraConfig",
        "AutoModel": "HydraModel",
        "AutoModelForImageTextToText": "HydraForConditionalGeneration",
        "AutoModelForMultimodalLM": "HydraForConditionalGeneration",
    },
    "hydra_tok": {"AutoConfig": "HydraTokConfig", "AutoModel": "HydraTokModel"},
}
PROCESSORS = {"image_processor": "HydraImageProcessor", "video_processor": "HydraVideoProcessor"}


def add_remote_code(folder: Path) -> None:
    """Puts the code into a flat folder of a model and its processor, and names it in their configs.

    Raises ValueError for a folder without a config of HYDRA or HYDRA-TOK.
    """
    config = _read(folder / "config.json")
    if config.get("model_type") not in AUTO_MAPS:
        raise ValueError(
            f"{folder} has a config.json of model_type={config.get('model_type')!r}, expected one of {[*AUTO_MAPS]}."
        )
    _write(folder / "config.json", {**config, "auto_map": _references(AUTO_MAPS[config["model_type"]])})
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).exists():
            _write(folder / name, _with_processors(_read(folder / name)))
    for name, text in remote_files().items():
        write_text(folder / name, text)


def remove_remote_code(folder: Path) -> None:
    """Takes the code's names out of the configs of a flat folder."""
    for path in folder.glob("*.json"):
        config = _read(path)
        parts = [config, *(config[name] for name in PROCESSORS if isinstance(config.get(name), dict))]
        if [part.pop("auto_map") for part in parts if "auto_map" in part]:
            _write(path, config)


def remote_files() -> dict[str, str]:
    """Name -> text of every file of the code, which import each other as neighbours."""
    paths = [*(PACKAGE / "modeling").glob("*.py"), *(PACKAGE / "pipelines").glob("*.py"), PACKAGE / "hub.py"]
    files = {path.name: flatten_imports(path.read_text("utf-8")) for path in sorted(paths) if path.stem != "__init__"}
    imports = [f"from .{module} import {', '.join(names)}" for module, names in sorted(CLASSES.items())]
    names = [name for names in CLASSES.values() for name in names]
    exports = f"__all__ = {json.dumps(sorted(names), indent=4)}"
    entry = '"""HYDRA and HYDRA-TOK for `trust_remote_code=True`: the classes that the configs here name."""'
    return {**files, f"{ENTRY}.py": "\n".join([entry, "", *imports, "", "", exports, ""])}


def flatten_imports(text: str) -> str:
    """`from ..modeling.flow import x` becomes `from .flow import x`."""
    return re.sub(r"^(\s*from )\.\.(?:modeling\.|pipelines\.)?(\w+ import)", r"\1.\2", text, flags=re.MULTILINE)


def _references(classes: dict[str, str]) -> dict[str, str]:
    return {auto: f"{ENTRY}.{name}" for auto, name in classes.items()}


def _with_processors(config: dict) -> dict:
    """The config of a processor with an `auto_map` for itself and for each of its parts."""
    parts = {
        name: {**config[name], "auto_map": _references({_auto(kind): kind})}
        for name, kind in PROCESSORS.items()
        if isinstance(config.get(name), dict)
    }
    kinds = [
        config[key] for key in ("processor_class", "image_processor_type", "video_processor_type") if key in config
    ]
    return {**config, **parts, "auto_map": _references({_auto(kind): kind for kind in kinds})}


def _auto(kind: str) -> str:
    return kind.replace("Hydra", "Auto")


def _read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def _write(path: Path, config: dict) -> None:
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
