"""The made data set: its contents as folders and as shards, and that a second run writes the same bytes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .made_images import make


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_and_shards_hold_the_same_images_and_come_out_the_same_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / name, images=50, classes=12, side=24, shards=3)
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "two")
    names = one["classes.txt"].decode().splitlines()
    assert names == sorted(names)
    assert len(names) == 12
    assert sorted(path for path in one if path.endswith(".tar")) == [
        *(f"train-{i:06d}.tar" for i in range(3)),
        "val-000000.tar",
    ]
    for split, count in (("train", 50), ("val", 12)):
        in_folders = sorted((names.index(path.split("/")[1]), one[path]) for path in one if path.startswith(f"{split}/"))
        in_shards = []
        for path in sorted(tmp_path.glob(f"one/{split}-*.tar")):
            with tarfile.open(path) as shard:
                members = {member.name: shard.extractfile(member).read() for member in shard}  # type: ignore[union-attr]
            keys = list(dict.fromkeys(member.split(".")[0] for member in members))
            assert list(members) == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "cls")]
            in_shards += [(int(members[f"{key}.cls"]), members[f"{key}.jpg"]) for key in keys]
        assert len(in_shards) == len(set(in_folders)) == count
        assert in_shards != in_folders  # a shard mixes classes
        assert sorted(in_shards) == in_folders
    image = Image.open(io.BytesIO(one["train/class0003/000000.jpg"]))
    assert (image.size, image.mode, image.format) == ((24, 24), "RGB", "JPEG")


def test_images_of_a_class_are_nearer_to_each_other_than_to_others(tmp_path: Path) -> None:
    make(tmp_path / "set", images=24, classes=4, side=32)
    pixels = [
        [np.asarray(Image.open(path), dtype=np.float32) for path in sorted(folder.iterdir())]
        for folder in sorted((tmp_path / "set" / "train").iterdir())
    ]

    def distance(one: int, other: int) -> float:
        return min(float(np.abs(a - b).mean()) for a in pixels[one][:3] for b in pixels[other][3:])

    assert all(distance(i, i) < distance(i, j) for i in range(4) for j in range(4) if i != j)


def test_what_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 images cannot be spread over 4 classes"):
        make(tmp_path / "few", images=3, classes=4, side=8)
    make(tmp_path / "set", images=2, classes=2, side=8)
    with pytest.raises(FileExistsError):
        make(tmp_path / "set", images=2, classes=2, side=8)
