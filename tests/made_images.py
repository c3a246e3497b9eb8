"""Makes a data set of small JPEGs that a network can tell apart: folders of classes and, with ``--shards``, also tar shards.

``python -m tests.made_images --images 100000 --classes 1000 --side 64 --out DIR --shards 16`` writes a data set for the tests
and benchmarks of large data sets. The same arguments give the same bytes.

DIR holds ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``. The shards are ``train-000000.tar``, ``val-000000.tar`` and so on, as
the package webdataset writes them: two members for each image, ``KEY.jpg`` and ``KEY.cls`` with the class's number.
``classes.txt`` lists the names of the classes in the order of their numbers, one a line.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: A class is a picture of FIELDS x FIELDS coloured fields. Each image is another crop, with its own brightness and noise.
FIELDS = 4

#: Training images of a class for each of its validation images.
TRAIN_PER_VAL = 20


def images_of(label: int, count: int, side: int, seed: int) -> Iterator[bytes]:
    """Yield ``count`` JPEGs of the class ``label``, ``side`` x ``side`` pixels."""
    random = np.random.default_rng((seed, label))
    fields = Image.fromarray(random.integers(0, 256, (FIELDS, FIELDS, 3), dtype=np.uint8))
    margin = max(1, side // 8)
    picture = np.asarray(fields.resize((side + margin, side + margin), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = random.normal(0, 12, (2 * side, 2 * side, 1)).astype(np.float32)  # each image takes another window of the noise
    for _ in range(count):
        top, left = random.integers(0, margin + 1, 2)
        y, x = random.integers(0, side + 1, 2)
        cut = picture[top : top + side, left : left + side]
        pixels = cut * random.uniform(0.7, 1.1) + noise[y : y + side, x : x + side]
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        yield file.getvalue()


def _write_shards(out: Path, split: str, images: list[tuple[bytes, int]], shards: int, seed: int) -> None:
    """Write (image, label) pairs, shuffled by ``seed``, into ``shards`` tar files whose lengths differ by at most one."""
    order: NDArray[np.int64] = np.random.default_rng((seed, len(images))).permutation(len(images))
    for number, part in enumerate(np.array_split(order, shards)):
        with tarfile.open(out / f"{split}-{number:06d}.tar", "w") as shard:
            for i in part.tolist():
                image, label = images[i]
                for suffix, content in (("jpg", image), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def make(out: Path, images: int, classes: int, side: int, shards: int = 0, seed: int = 0) -> None:
    """Write the data set into ``out``: ``images`` training images spread evenly over ``classes``, and the validation images.

    ``out`` appears only when the data set is complete.

    Raises:
        ValueError: there are fewer images than classes.
        FileExistsError: ``out`` is not empty.
    """
    if not 0 < classes <= images:
        raise ValueError(f"{images} images cannot be spread over {classes} classes")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    partial = out.with_name(f"partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    _write(partial, images, classes, side, shards, seed)
    os.replace(partial, out)


def _write(out: Path, images: int, classes: int, side: int, shards: int, seed: int) -> None:
    """Write the data set into ``out``, a folder that does not exist yet."""
    names = [f"class{label:04d}" for label in range(classes)]
    made: dict[str, list[tuple[bytes, int]]] = {"train": [], "val": []}
    for label, name in enumerate(names):
        count = images // classes + (label < images % classes)
        found = images_of(label, count + max(1, count // TRAIN_PER_VAL), side, seed)
        for split in made:
            (out / split / name).mkdir(parents=True)
        for i, image in enumerate(found):
            split = "train" if i < count else "val"
            (out / split / name / f"{i:06d}.jpg").write_bytes(image)
            if shards:
                made[split].append((image, label))
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    for split, found_images in made.items() if shards else ():
        _write_shards(out, split, found_images, -(-shards * len(found_images) // images), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="number of training images; default %(default)s")
    parser.add_argument("--classes", type=int, default=1000, help="number of classes; default %(default)s")
    parser.add_argument("--side", type=int, default=64, help="side of an image in pixels; default %(default)s")
    parser.add_argument("--shards", type=int, default=0, help="also write the training images into this many tar shards")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images; default %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    arguments = vars(parser.parse_args())
    try:
        make(**arguments)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
