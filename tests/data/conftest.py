"""Data sets in a temporary folder: what the tests of data sets write and where `datasets` keeps its cache."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydra_hf.modeling.image_processing_hydra import as_pixel_values


@pytest.fixture
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The cache of `datasets`, new and empty."""
    import datasets

    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    datasets.disable_progress_bars()
    return path


class Files:
    """Writes data sets of small one-coloured pictures. Picture n has the level 10 * n, and the caption "number n"."""

    def __init__(self, folder: Path):
        self.folder = folder

    def png(self, number: int, size: tuple[int, int] = (16, 16)) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, (10 * number,) * 3).save(buffer, "PNG")
        return buffer.getvalue()

    def folder_of(self, numbers, name: str = "pictures") -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        for number in numbers:
            (folder / f"{number:03d}.png").write_bytes(self.png(number))
        return folder

    def jsonl(self, rows: list[dict], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    def parquet(self, numbers, name: str = "rows.parquet", **columns) -> Path:
        import pyarrow
        import pyarrow.parquet

        images = [{"bytes": self.png(number), "path": None} for number in numbers]
        table = {"image": images, "caption": [f"number {number}" for number in numbers], **columns}
        pyarrow.parquet.write_table(pyarrow.table(table), self.folder / name, row_group_size=4)
        return self.folder / name

    def tar(self, samples: list[dict[str, bytes]], name: str = "000.tar") -> Path:
        with tarfile.open(self.folder / name, "w") as tar:
            for index, sample in enumerate(samples):
                for extension, content in sample.items():
                    member = tarfile.TarInfo(f"{index:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return self.folder / name

    def captioned_tar(self, numbers, name: str = "000.tar") -> Path:
        return self.tar([{"png": self.png(n), "txt": f"number {n}".encode()} for n in numbers], name)

    def chats(self, numbers) -> list[dict]:
        """Text without pictures, in LLaVA's form."""
        return [
            {"conversations": [{"from": "human", "value": f"question {n}"}, {"from": "gpt", "value": f"number {n}"}]}
            for n in numbers
        ]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def number_in():
    """A function that reads the number of a picture (3, H, W), levels or pixels in [-1, 1], off its level."""
    return lambda image: round(float(np.asarray((as_pixel_values(image).mean() + 1) / 2 * 255)) / 10)
