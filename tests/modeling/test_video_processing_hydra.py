import numpy as np
import pytest
import torch
from clips import moving_square, pil_frames, write_clip
from PIL import Image
from tiny import tok_config
from transformers import AutoVideoProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from hydra_hf.modeling.image_processing_hydra import HydraImageProcessor
from hydra_hf.modeling.video_processing_hydra import HydraVideoProcessor
from hydra_hf.modeling.video_reading import ClipMetadata


SIZE = {"height": 28, "width": 42}
SMALL = {"min_pixels": 14 * 14, "max_pixels": 8 * 14 * 14}


@pytest.fixture
def video_processor() -> HydraVideoProcessor:
    return HydraVideoProcessor(size=SIZE)


def packed(video_processor, clips, **kwargs) -> torch.Tensor:
    return video_processor(clips, return_tensors="pt", **kwargs)["pixel_values_videos"]


def grids(video_processor, clips, **kwargs) -> list[list[int]]:
    return video_processor(clips, return_tensors="pt", **kwargs)["video_grid_thw"].tolist()


@pytest.mark.parametrize("size", [SIZE, SMALL, {"min_pixels": 56 * 56, "max_pixels": 448 * 448}])
@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(moving_square(1)[0]),
        Image.fromarray(np.dstack([moving_square(1)[0], moving_square(1)[0, ..., :1]]), "RGBA"),
        Image.fromarray(moving_square(1)[0]).convert("P"),
        moving_square(1)[0],
        moving_square(1)[0].astype(np.float32) / 255,
        torch.from_numpy(moving_square(1)[0]).permute(2, 0, 1),
        torch.from_numpy(moving_square(1)[0]).permute(2, 0, 1) / 127.5 - 1,
    ],
    ids=["pil", "rgba", "palette", "numpy", "numpy floats", "torch", "torch floats"],
)
def test_an_image_is_a_clip_of_one_frame_to_the_bit(image, size):
    of_image = HydraImageProcessor(size=size)(image, return_tensors="pt")
    for clip in (image, [image]):
        of_clip = HydraVideoProcessor(size=size)(clip, return_tensors="pt")
        assert set(of_clip) == {"pixel_values_videos", "video_grid_thw"}
        assert torch.equal(of_clip["pixel_values_videos"], of_image["pixel_values"])
        assert torch.equal(of_clip["video_grid_thw"], of_image["image_grid_thw"])


@pytest.mark.parametrize("size", [SIZE, SMALL])
def test_a_clip_is_packed_as_its_frames_are_and_its_grid_counts_them(size):
    frames = pil_frames(moving_square(5))
    of_images = HydraImageProcessor(size=size)(frames, return_tensors="pt")
    of_clip = HydraVideoProcessor(size=size)(frames, return_tensors="pt")
    assert torch.equal(of_clip["pixel_values_videos"], of_images["pixel_values"])
    assert of_clip["video_grid_thw"].tolist() == [[5, *of_images["image_grid_thw"][0, 1:].tolist()]]
    assert of_clip["pixel_values_videos"].aminmax() == (of_clip["pixel_values_videos"].min(), 1)


def test_clips_of_several_sizes_and_lengths_come_in_their_order():
    video_processor = HydraVideoProcessor(size=SMALL)
    clips = [moving_square(9), moving_square(1, 100, 20), moving_square(5, 28, 42)]
    assert grids(video_processor, clips) == [[9, 2, 3], [1, 6, 1], [5, 2, 3]]
    alone = [packed(video_processor, clip) for clip in clips]
    assert torch.equal(packed(video_processor, clips), torch.cat(alone))


def test_clips_may_come_in_all_nestings_of_transformers(video_processor, tmp_path):
    frames = moving_square(5)
    paths = [str(tmp_path / f"{index}.png") for index in range(5)]
    for path, picture in zip(paths, pil_frames(frames)):
        picture.save(path)
    expected = packed(video_processor, frames)
    as_tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    one_clip = [
        frames, [frames], frames[None], [*frames], [[*frames]], pil_frames(frames), [pil_frames(frames)], as_tensor,
        as_tensor[None], tmp_path, str(tmp_path), [tmp_path], [[str(tmp_path)]], [[paths]], [[frames], []],
    ]  # fmt: skip
    for clip in one_clip:
        assert torch.equal(packed(video_processor, clip), expected)
    two_clips = [
        [frames, as_tensor],
        [[str(tmp_path)], [pil_frames(frames)]],
        [[paths, frames]],
        np.stack([frames] * 2),
    ]
    for clips in two_clips:
        assert torch.equal(packed(video_processor, clips), torch.cat([expected] * 2))


def test_the_order_of_channels_is_that_of_arrays_alone(video_processor, tmp_path):
    frames = moving_square(5)
    frames_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    pil_frames(frames)[0].save(
        tmp_path / "clip.webp", save_all=True, append_images=pil_frames(frames)[1:], lossless=True
    )
    expected = packed(video_processor, frames)
    for clip in (frames, pil_frames(frames), str(tmp_path / "clip.webp")):
        assert torch.equal(packed(video_processor, clip, input_data_format="channels_last"), expected)
    assert torch.equal(packed(video_processor, frames_first, input_data_format="channels_first"), expected)


@pytest.mark.parametrize(
    ("clips", "complaint"),
    [
        ([], "no clips"), ([[], []], "no clips"), (7, "Got int for a clip"), ([moving_square(1), {}], "Got dict"),
        ([Image.new("RGB", (9, 9)), Image.new("RGB", (8, 9))], r"shapes .*\(9, 8, 3\)"),
    ],
)  # fmt: skip
def test_what_is_no_clip_is_refused(video_processor, clips, complaint):
    with pytest.raises(ValueError, match=complaint):
        video_processor(clips)


# Which frames


def sampled(video_processor, clip, **kwargs) -> tuple[list[int], ClipMetadata]:
    (metadata,) = video_processor(clip, return_metadata=True, **kwargs)["video_metadata"]
    return metadata.frames_indices, metadata


@pytest.mark.parametrize(("total", "num_frames"), [(20, 5), (17, 17), (40, 1), (33, 9), (100, 17), (1, 1), (18, 9)])
def test_evenly_spaced_frames_are_sampled_as_transformers_does(video_processor, total, num_frames):
    clip = np.zeros((total, 14, 14, 3), np.uint8)
    expected = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=num_frames).tolist()
    assert sampled(video_processor, clip, num_frames=num_frames)[0] == expected
    known = {"video_metadata": {"total_num_frames": total, "fps": 30.0}}
    assert sampled(video_processor, clip, num_frames=num_frames, **known)[0] == expected


def test_frames_are_sampled_by_when_they_are_shown(video_processor, tmp_path):
    """Nine frames in 4 s, the first half of which are shown in half a second."""
    clip = write_clip(tmp_path / "clip.mp4", moving_square(9), times=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.5, 2.5, 3.5])
    duration = sampled(video_processor, str(clip))[1].duration
    assert duration == pytest.approx(4.5, abs=0.6)  # how long the last is shown, the file may not say
    indices, metadata = sampled(video_processor, str(clip), num_frames=5)
    wanted = [index * duration / 5 for index in range(5)]
    assert indices == [0, 5, 6, 7, 8]
    for time, shown in zip(wanted, metadata.timestamps):
        assert shown <= time < shown + 1.01
    assert sampled(video_processor, str(clip), fps=2)[0] == [0, 5, 5, 6, 6, 7, 7, 8, 8]


def test_a_frame_that_is_shown_for_long_counts_for_as_many_as_the_rate_has(video_processor, tmp_path):
    """Pillow writes frames that do not differ as one that is shown longer."""
    first, second = pil_frames(moving_square(2))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=[first] * 11 + [second] * 5, duration=100)
    assert sampled(video_processor, str(tmp_path / "clip.gif"), fps=10)[0] == [0] * 12 + [1] * 5


@pytest.mark.parametrize(
    ("total", "fps", "expected"), [(20, 10, 21), (17, 10, 17), (16, 10, 17), (15, 10, 17), (14, 10, 13), (20, 5, 9),
                                   (20, 1, 1), (30, 1, 5), (5, 0.01, 1), (9, 20, 17)]
)  # fmt: skip
def test_a_rate_gives_the_nearest_number_of_frames(video_processor, total, fps, expected):
    clip = np.zeros((total, 14, 14, 3), np.uint8)
    indices, metadata = sampled(
        video_processor, clip, fps=fps, video_metadata={"total_num_frames": total, "fps": 10.0}
    )
    assert len(indices) == expected
    assert indices == sorted(indices)
    assert metadata.timestamps == pytest.approx([index / 10 for index in indices])


def test_times_rounded_to_milliseconds_lose_no_frame(video_processor):
    """30 frames a second in the milliseconds of WebM: 0, 33, 67, 100, ..."""
    times = [round(index / 30, 3) for index in range(297)]
    metadata = ClipMetadata(total_num_frames=297, fps=30.0, duration=times[-1] + 0.033, frame_times=times)
    assert video_processor.sample_frames(metadata, num_frames=297).tolist() == [*range(297)]
    assert video_processor.sample_frames(metadata, fps=30).tolist() == [*range(297)]


def test_a_shorter_clip_gives_the_frames_that_it_has(video_processor):
    assert grids(video_processor, [moving_square(20), moving_square(8), moving_square(3)]) == [
        [17, 2, 3], [5, 2, 3], [1, 2, 3]
    ]  # fmt: skip
    assert grids(HydraVideoProcessor(size=SIZE, temporal_patch_size=1), moving_square(8)) == [[8, 2, 3]]


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"num_frames": 6}, r"num_frames=6 must be 1 \+ 4n: an anchor frame, then groups of 4"),
        ({"num_frames": 5, "fps": 2}, "num_frames=5 and fps=2, expected one"),
        ({"fps": 2}, "without times"),
        ({"do_sample_frames": False}, r"num_frames=10 must be 1 \+ 4n"),
        ({"num_frames": 5, "video_metadata": {"total_num_frames": 7}}, "10 frames and metadata.total_num_frames=7"),
        ({"temporal_patch_size": 0}, "temporal_patch_size"),
    ],
)
def test_a_wrong_number_of_frames_is_refused(video_processor, kwargs, complaint):
    with pytest.raises(ValueError, match=complaint):
        video_processor(moving_square(10), **kwargs)


def test_a_clip_is_taken_as_it_is_when_nothing_is_to_be_sampled(video_processor, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", moving_square(21))
    for each in (moving_square(21), str(clip)):
        assert grids(video_processor, each, do_sample_frames=False) == [[21, 2, 3]]


# Settings


@pytest.mark.parametrize("settings", [{"num_frames": 9}, {"fps": 2}, {"temporal_patch_size": 2, "size": SMALL}])
def test_saving_and_loading_gives_the_same_video_processor(tmp_path, settings):
    tok_config().save_pretrained(tmp_path)
    saved = HydraVideoProcessor(**settings)
    saved.save_pretrained(tmp_path)
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is HydraVideoProcessor
    assert loaded.to_dict() == saved.to_dict()
    metadata = {"total_num_frames": 20, "fps": 10.0}
    first, second = (each(moving_square(20), video_metadata=metadata, return_tensors="pt") for each in (saved, loaded))
    assert torch.equal(first["pixel_values_videos"], second["pixel_values_videos"])
    assert loaded(moving_square(20), num_frames=5)["video_grid_thw"][0][0] == 5  # in the place of a rate


def test_sizes_off_the_patches_are_refused(video_processor):
    with pytest.raises(ValueError, match="multiples of patch_size=14"):
        video_processor(moving_square(1), size={"height": 20, "width": 28})
    with pytest.raises(ValueError, match="height=48"):
        video_processor(moving_square(1), do_resize=False)
    with pytest.raises(ValueError, match="max_input_pixels=100"):
        HydraVideoProcessor(max_input_pixels=100)(moving_square(1))
