import numpy as np
import torch
from PIL import Image

from hydra_hf.evaluation.pictures import make_grid, save_grid


def grey(grid: Image.Image) -> str:
    """A grey grid as text: black, margin, white."""
    names = {0: ".", 128: "|", 255: "#"}
    return "\n" + "\n".join("".join(names[value] for value in row) for row in np.asarray(grid)[..., 0].tolist())


def test_pictures_stand_row_by_row_and_the_last_row_may_be_short():
    pixel_values = torch.tensor([-1.0, 1.0, 1.0])[:, None, None, None].expand(3, 3, 1, 2)
    assert grey(make_grid(pixel_values, num_columns=2, margin=1)) == """
|||||||
|..|##|
|||||||
|##||||
|||||||"""  # fmt: skip


def test_a_grid_shows_pixels_as_they_are_and_clamps_what_is_out_of_range():
    pixel_values = torch.tensor([-3.0, 0.5, 3.0]).reshape(1, 3, 1, 1)
    assert make_grid(pixel_values, num_columns=1).getpixel((2, 2)) == (0, 191, 255)


def test_a_saved_grid_is_a_png_in_a_folder_that_need_not_exist(tmp_path):
    path = tmp_path / "new" / "grid.png"
    save_grid(torch.zeros(5, 3, 4, 4), path, num_columns=3)
    with Image.open(path) as image:
        assert image.size == (3 * 6 + 2, 2 * 6 + 2)
