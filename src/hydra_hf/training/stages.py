"""Runs the stages of a recipe in a folder: which are done, where the next one starts, and what the folder was made with.

`OUT/STAGE/final` exists once a stage is done; a killed run is resumed by running it again. Under torchrun or
`accelerate launch` all processes run this and the main one writes; all machines must share the folder.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from accelerate.utils import release_memory

from hydra_hf.files import has_folder, locked
from hydra_hf.publishing.run import mirrored

from .processes import on_main_process, partial_state
from .recipe import Recipe, Stage
from .run_record import begin_stage, check_run


logger = logging.getLogger(__name__)

TrainStage = Callable[[int, Path | None, Path], None]  # its number, `final` of the previous stage, its folder


def run_stages(
    recipe: Recipe,
    output_dir: Path,
    train_stage: TrainStage,
    *,
    finish: Callable[[Path, Path], None] | None = None,
    only: str | None = None,
    on_stage: Callable[[str], None] = logger.info,
) -> Path:
    """Runs every stage that is not done yet, or `only` one; returns `OUT/final`, or `final` of the last stage that was run.

    A stage starts from the last finished one before it. Once all are done, `finish` writes `OUT/final` from the last.
    Raises ValueError for a stage that the recipe does not have, a folder of another recipe, or one that is in use.
    """
    check_stage(recipe, only)
    with opened(recipe, output_dir, only):
        done = None
        for index, stage in enumerate(recipe.stages):
            folder = output_dir / stage.name
            if not is_done(folder) and only in (None, stage.name):
                on_main_process(partial(start_stage, recipe, stage, output_dir, on_stage))
                train_stage(index, done, folder)
                release_memory()
            if is_done(folder):
                done = folder / "final"
            if stage.name == only:
                break
        if finish is None or not all(is_done(output_dir / stage.name) for stage in recipe.stages):
            return done
        last, final = output_dir / recipe.stages[-1].name / "final", output_dir / "final"
        if partial_state().is_main_process and not is_current(final, last):
            finish(last, final)
        partial_state().wait_for_everyone()
        return final if only is None else done


def check_stage(recipe: Recipe, only: str | None) -> None:
    """Raises ValueError for a name that is not one of the recipe's stages; None means all of them."""
    if only is not None and only not in (names := [stage.name for stage in recipe.stages]):
        raise ValueError(f"{recipe.name} has no stage {only!r}; its stages are {names}.")


@contextmanager
def opened(recipe: Recipe, output_dir: Path, only: str | None) -> Iterator[None]:
    """Locks the folder for this run, checks that it belongs to this recipe, and mirrors it on the Hub if the recipe says so."""
    with ExitStack() as stack:

        def open_folder() -> None:
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output_dir))
            if recipe.push_to is not None:
                stack.enter_context(mirrored(recipe.push_to, output_dir))
            check_run(recipe, output_dir, only)

        on_main_process(open_folder)
        yield


def start_stage(recipe: Recipe, stage: Stage, output_dir: Path, on_stage: Callable[[str], None]) -> None:
    on_stage(f"{recipe.name}: stage {stage.name}, {stage.num_steps} steps")
    (output_dir / stage.name).mkdir(exist_ok=True)
    begin_stage(recipe, stage, output_dir)


def is_done(folder: Path) -> bool:
    """Whether a stage has its `final`; all processes must ask."""
    with partial_state().main_process_first():
        return has_folder(folder / "final")


def is_current(final: Path, last: Path) -> bool:
    """Whether `final` exists and is no older than the stage that it is made from."""
    return has_folder(final) and final.stat().st_mtime >= last.stat().st_mtime
