"""Make the package's sample from full Fashion-MNIST: ``python -m alexnet_triton.data.make_sample SOURCE [OUT]``.

The sample has the first images of each class in the data set's order. Classes alternate, so that any prefix is balanced too.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import torch

from .dataset import Split
from .fashion_mnist import CLASSES, FILES, SAMPLE, read_folder

PER_CLASS = {"train": 100, "test": 50}


def balanced(split: Split, per_class: int) -> Split:
    """The first ``per_class`` images of each class, ordered 0, 1, ..., 9, 0, 1, ..."""
    of_class = [torch.nonzero(split.labels == c).flatten()[:per_class] for c in range(len(CLASSES))]
    index = torch.stack(of_class, dim=1).flatten()
    return Split(split.images[index], split.labels[index])


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as a gzipped IDX file. The same array always gives the same bytes."""
    header = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=9, mtime=0))


def main() -> None:
    """Write the sample's four files."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else SAMPLE
    data = read_folder(source)
    for split_name, split in (("train", data.train), ("test", data.test)):
        part = balanced(split, PER_CLASS[split_name])
        images_name, labels_name = FILES[split_name]
        write_idx(out / f"{images_name}.gz", part.images.numpy())
        write_idx(out / f"{labels_name}.gz", part.labels.numpy())


if __name__ == "__main__":
    main()
