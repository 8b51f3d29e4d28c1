"""How well a model knows the clips and edits of the toy world, all held out, next to what needs no model: the commonest answers,
frozen clips, unedited pictures.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from hydra_hf.evaluation.reconstruction import reconstruct
from hydra_hf.modeling import HydraForConditionalGeneration, HydraProcessor
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .checker import ToyChecker
from .clips import NUM_FRAMES, Clip, ToyClips, check_clip, render_clips
from .edits import EDIT_KINDS, Edit, ToyEdits, check_edit, source_scenes, target_scenes
from .evaluation import progress, score_answers


def evaluate_video_understanding(
    model: HydraForConditionalGeneration,
    processor: HydraProcessor,
    clips: ToyClips,
    num_questions: int,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, float]:
    """Share of exact answers to one question about each clip: `video_vqa/<type>` and the rest as in `score_answers`."""
    sampled, asked = clips.sample_turns(num_questions, torch.Generator().manual_seed(seed), split="test")
    frames = (render_clips(clips.world, [clip])[0].transpose(0, 1) for clip in sampled)
    pictures = (processor.image_processor.postprocess(each, output_type="pil") for each in frames)
    questions = [question for question, *_ in asked]
    return score_answers(model, processor, pictures, questions, "video_vqa", batch_size)


def evaluate_video_generation(
    pipeline: HydraPipeline,
    clips: ToyClips,
    num_captions: int,
    seed: int = 0,
    num_frames: int = NUM_FRAMES,
    batch_size: int = 32,
    **kwargs,
) -> dict[str, float]:
    """Share of held-out captions whose clip has what `ClipVerdict` lists: `t2v/objects`, `t2v/directions` and so on, `t2v/right`
    for all of it, and `t2v/<n>_movers` for all of it where n objects move.

    `t2v_frozen/...` is the first picture of a true clip for all frames. `kwargs` go to the pipeline.
    """
    generator = torch.Generator().manual_seed(seed)
    captions, expected = clips.sample_prompts(num_captions, generator, split="test", num_frames=num_frames)
    drawn = draw_clips(pipeline, captions, generator, num_frames, batch_size, **kwargs)
    frozen = (render_clips(clips.world, [clip])[0][:, :1].expand(-1, num_frames, -1, -1) for clip in expected)
    checker = ToyChecker(clips.world)
    return {
        f"{name}/{key}": share
        for name, shown in (("t2v", drawn), ("t2v_frozen", frozen))
        for key, share in _verdict_shares(checker, shown, expected).items()
    }


def draw_clips(
    pipeline: HydraPipeline,
    captions: Sequence[str],
    generator: torch.Generator,
    num_frames: int = NUM_FRAMES,
    batch_size: int = 32,
    **kwargs,
) -> Iterator[Tensor]:
    """A clip (3, T, H, W) in [-1, 1] of each caption."""
    for start in progress(range(0, len(captions), batch_size), "clips"):
        texts = list(captions[start : start + batch_size])
        frames = pipeline(texts, num_frames=num_frames, generator=generator, output_type="pt", **kwargs).frames
        yield from frames.cpu().transpose(1, 2) * 2 - 1


def _verdict_shares(checker: ToyChecker, shown: Iterable[Tensor], expected: list[Clip]) -> dict[str, float]:
    verdicts = [check_clip(checker, frames, clip) for frames, clip in zip(shown, expected, strict=True)]
    right: dict[str, list[bool]] = {}
    for verdict, clip in zip(verdicts, expected):
        for key, is_right in (*asdict(verdict).items(), ("right", verdict.is_right)):
            right.setdefault(key, []).append(is_right)
        right.setdefault(f"{len(clip.movers)}_movers", []).append(verdict.is_right)
    return {key: sum(values) / len(values) for key, values in right.items()}


def evaluate_edits(
    pipeline: HydraPipeline, edits: ToyEdits, edits_per_kind: int, seed: int = 0, batch_size: int = 32, **kwargs
) -> dict[str, float]:
    """`edit/<kind>` is the share of held-out edits that are followed, `edit_psnr/<kind>` the mean PSNR in dB outside the edited region
    against the source; `mean` is that of the kinds, and `new_wording` is in words that training never shows.

    `edit_decoded` is the true target through the tokenizer, the most that can be had, and `edit_unedited` the source itself.
    `kwargs` go to the pipeline.
    """
    checker, scores, rows = ToyChecker(edits.world), {}, dict.fromkeys(EDIT_KINDS, "train") | {"new_wording": "test"}
    for index, (row, wording) in enumerate(progress(rows.items(), "edits")):
        generator = torch.Generator().manual_seed(seed + index)
        kinds = (row,) if row in EDIT_KINDS else EDIT_KINDS
        sampled = edits.sample(edits_per_kind, generator, kinds=kinds, split="test", wording=wording)
        targets = edits.world.render(target_scenes(sampled))
        pictures = {
            "edit": torch.stack([*draw_edits(pipeline, edits, sampled, generator, batch_size, **kwargs)]),
            "edit_decoded": reconstruct(pipeline.model.model.vision_tower, targets, seed),
            "edit_unedited": edits.world.render(source_scenes(sampled)),
        }
        for name, shown in pictures.items():
            verdicts = [check_edit(checker, picture, edit) for picture, edit in zip(shown, sampled)]
            scores[f"{name}/{row}"] = sum(verdict.is_followed for verdict in verdicts) / len(verdicts)
            scores[f"{name}_psnr/{row}"] = sum(verdict.psnr_outside for verdict in verdicts) / len(verdicts)
    names = dict.fromkeys(key.split("/")[0] for key in scores)
    means = {f"{name}/mean": sum(scores[f"{name}/{kind}"] for kind in EDIT_KINDS) / len(EDIT_KINDS) for name in names}
    return scores | means


def draw_edits(
    pipeline: HydraPipeline,
    edits: ToyEdits,
    sampled: Sequence[Edit],
    generator: torch.Generator,
    batch_size: int = 32,
    **kwargs,
) -> Iterator[Tensor]:
    """The picture (3, H, W) in [-1, 1] that the model makes of each edit's source."""
    sources = edits.world.render(source_scenes(sampled))
    pictures = pipeline.processor.image_processor.postprocess(sources, output_type="pil")
    for start in range(0, len(sampled), batch_size):
        part = slice(start, start + batch_size)
        instructions = [edit.instruction for edit in sampled[part]]
        yield from (
            pipeline(instructions, image=pictures[part], generator=generator, output_type="pt", **kwargs).images.cpu()
            * 2
            - 1
        )
