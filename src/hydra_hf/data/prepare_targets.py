"""The targets of a data set's images as files: made once, by several processes, each file complete or absent. UniMRG, 3.1."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from hydra_hf.files import locked, write_file, write_image_grid, write_text
from hydra_hf.modeling import HydraImageProcessor
from hydra_hf.modeling.image_processing_hydra import ORIENTATION, check_image_size, pil_to_levels

from .painting import MANIFEST, path_below, picture_pixels, read_manifest, target_paths
from .records import RecordReader, find_columns, one_record
from .rows import list_images, open_rows, unfold_json
from .tables import find_files
from .targets import Painter
from .tasks import TASKS, UnreadableRecordError


MAX_ASPECT = 8  # our choice: a depth model enlarges the short side, and a strip would become millions of pixels
SHEET_ROWS, SHEET_SIDE = 8, 256


# Images of a data set


def find_images(images: Path, image_root: Path | None) -> tuple[Path, list[str], dict[str, int]]:
    """The folder of images, the images' paths below it, and what is left out, counted by reason.

    Args:
        images: a folder, or records that name images: LLaVA's JSON, or JSONL.
        image_root: the folder that image paths in records are relative to; None is that of the file.

    Raises ValueError if there are no images, and for two images that would share one target.
    """
    if images.is_dir():
        root, paths, skipped = images, list_images(str(images))[0], {}
    else:
        root = image_root or images.parent
        paths, skipped = _images_of_records(images, root)
    if not paths:
        raise ValueError(
            f"{images} has no images: expected a folder of them, or JSON whose records name them. {skipped}"
        )
    owners: dict[str, str] = {}
    for path in paths:
        other = owners.setdefault(target_paths(path)[1], path)
        if other != path:
            raise ValueError(f"{other} and {path} would have one target, {target_paths(path)[1]}: rename one of them.")
    return root, paths, skipped


def _images_of_records(file: Path, root: Path) -> tuple[list[str], dict[str, int]]:
    """Paths of the images of records with one image; the other records counted by the reason why they are left out."""
    rows, image_processor = open_rows(str(file), find_files(str(file)), in_place=False), HydraImageProcessor()
    paths: dict[str, None] = {}
    skipped: dict[str, int] = dict(rows.lost)
    for index in range(len(rows)):
        try:
            with one_record():
                record = unfold_json(rows[index])
                images = RecordReader(find_columns(set(record), ()), root, image_processor).images(record)
                path = path_below(images[0], root) if len(images) == 1 else None
                if path is None:
                    raise UnreadableRecordError("records without the path of one image below the folder of images")
                paths[path] = None
        except UnreadableRecordError as error:
            skipped[str(error)] = skipped.get(str(error), 0) + 1
    return list(paths), skipped


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, turned upright."""
    return Image.fromarray(pil_to_levels(image).to(torch.uint8).permute(1, 2, 0).numpy())


def is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Whether a target is there, can be decoded, and has this width and height."""
    try:
        with Image.open(path) as target:
            target.load()
            return target.size == size
    except (OSError, SyntaxError, ValueError):  # missing or damaged: it is made again
        return False


def target_file(out: Path, name: str, path: str) -> Path:
    return out / name / target_paths(path)[1]


# Work


def paint_targets(
    paths: Iterable[str], image_root: Path, out: Path, painters: list[Painter]
) -> dict[str, dict[str, Any]]:
    """Writes the targets that do not exist yet. Returns task -> how many were made and kept, and failures by image.

    An image that cannot be read, or that a painter makes nothing of, is a failure; a full disk is an OSError.
    """
    report = {painter.name: {"made": 0, "kept": 0, "failures": {}} for painter in painters}
    for path in paths:
        try:
            image, missing = read_if_needed(image_root / path, path, out, painters)
        except Exception as error:  # decoders raise nearly anything for damaged files
            for counts in report.values():
                counts["failures"][path] = _reason(error)
            continue
        for painter in painters:
            counts = report[painter.name]
            if painter not in missing:
                counts["kept"] += 1
                continue
            try:
                target = painter(image)
            except Exception as error:  # one strange image must not end a run of days
                counts["failures"][path] = _reason(error)
                continue
            write_file(target_file(out, painter.name, path), target.save)
            counts["made"] += 1
    return report


def read_if_needed(
    file: Path, path: str, out: Path, painters: list[Painter]
) -> tuple[Image.Image | None, list[Painter]]:
    """The upright RGB image, and the painters whose target of it does not exist yet; no image if all exist."""
    with Image.open(file) as picture:
        check_image_size(picture.height, picture.width, HydraImageProcessor.max_input_pixels)
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            raise ValueError(f"{picture.width}x{picture.height} pixels: one side is over {MAX_ASPECT} times the other")
        is_on_its_side = picture.getexif().get(ORIENTATION, 1) >= 5
        width, height = picture.size[::-1] if is_on_its_side else picture.size
        missing = [
            painter
            for painter in painters
            if not is_whole(target_file(out, painter.name, path), painter.target_size(width, height))
        ]
        return (upright_rgb(picture) if missing else None), missing


def _reason(error: Exception) -> str:
    """The first line of an error, after its type unless that is ValueError."""
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}"


@dataclass(frozen=True)
class PreparedTargets:
    """What all processes have made; `targets` is name of a painter -> `made`, `kept` and `failures`, path -> reason."""

    out: str
    targets: dict[str, dict]

    def __str__(self) -> str:
        lines = []
        for name, counts in self.targets.items():
            failed = len(counts["failures"])
            line = f"{self.out}/{name}: {counts['made']} made, {counts['kept']} kept, {failed} failed"
            lines.append(f"{line}, see {self.out}/{MANIFEST}" if failed else line)
        return "\n".join(lines)


def prepare_targets(
    images: Path,
    out: Path,
    painters: list[Painter],
    state: PartialState,
    *,
    image_root: Path | None = None,
) -> PreparedTargets:
    """Makes this process's share of the missing targets of all images; returns a report.

    `out` has a folder of PNGs for each painter, `manifest.json` and `sheet.png`. Started again, it resumes.

    Args:
        images, image_root: see `find_images`.

    Raises ValueError for images or a folder that cannot be used, and if no target could be made at all.
    """
    image_root, paths, skipped = find_images(images, image_root)
    if out.resolve().is_relative_to(image_root.resolve()):
        raise ValueError(f"--out {out} is inside the images' folder {image_root}, expected a folder elsewhere.")
    manifest = check_manifest(out, painters)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out) if state.is_main_process else nullcontext():
        if state.is_main_process:
            write_manifest(out, manifest)  # says what the targets are, before the first one exists
        share = paths[state.process_index :: state.num_processes]
        bar = tqdm(share, unit="image", disable=not state.is_main_process)
        reports = gather_object([paint_targets(bar, image_root, out, painters)])
        total = {painter.name: _sum([report[painter.name] for report in reports]) for painter in painters}
        if state.is_main_process:
            for name, counts in total.items():
                earlier = manifest[name].get("failures", {})  # those of other images, too
                failures = {path: earlier[path] for path in earlier.keys() - {*paths}} | counts["failures"]
                manifest[name] |= {"images": len(paths), **counts, "failures": failures, "skipped": skipped}
            write_manifest(out, manifest)
            failed = {path for counts in total.values() for path in counts["failures"]}
            write_sheet(out, image_root, [path for path in paths if path not in failed], list(total))
    for name, counts in total.items():
        if not counts["made"] + counts["kept"]:
            path, reason = next(iter(counts["failures"].items()))
            raise ValueError(f"No {name} of {len(paths)} images could be made; {path}: {reason}.")
    return PreparedTargets(str(out), total)


def _sum(reports: list[dict]) -> dict[str, Any]:
    """The counts and failures of all processes."""
    failures = {path: reason for report in reports for path, reason in report["failures"].items()}
    counts = {name: sum(report[name] for report in reports) for name in ("made", "kept")}
    return {**counts, "failures": dict(sorted(failures.items()))}


def check_manifest(out: Path, painters: list[Painter]) -> dict[str, dict]:
    """The manifest in `out`, with the settings of new painters. Raises ValueError if targets there have other settings."""
    manifest = read_manifest(out)
    for painter in painters:
        noted = manifest.setdefault(painter.name, {"settings": painter.settings})["settings"]
        if noted != painter.settings:
            raise ValueError(
                f"{out / painter.name} was made with {noted}, but the options now say {painter.settings}: name another folder, or give"
                " the same options."
            )
    return manifest


def write_manifest(out: Path, manifest: dict[str, dict]) -> None:
    write_text(out / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))


def write_sheet(out: Path, image_root: Path, paths: list[str], names: list[str]) -> None:
    """`sheet.png`: the middle of some images and their targets, as training reads them, one image a row."""
    image_processor = HydraImageProcessor(size={"height": SHEET_SIDE, "width": SHEET_SIDE}, patch_size=SHEET_SIDE)
    rows = []
    num_rows = min(SHEET_ROWS, len(paths))
    for path in (paths[row * len(paths) // num_rows] for row in range(num_rows)):
        image = upright_rgb(Image.open(image_root / path))
        rows.append(picture_pixels(image, SHEET_SIDE, SHEET_SIDE, image_processor))
        for name in names:
            target = Image.open(target_file(out, name, path))
            rows.append(TASKS[name].paint(target, SHEET_SIDE, SHEET_SIDE, image_processor))
    if rows:
        write_image_grid(out / "sheet.png", torch.stack(rows), num_columns=1 + len(names))
