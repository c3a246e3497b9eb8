"""Reading IDX files, refusing broken ones, resizing, shuffling; the shipped sample."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_triton import data
from alexnet_triton.data import (
    FACTORS,
    SHIFT,
    DataError,
    draw_augmentation,
    load_fashion_mnist,
    read_folder,
    read_idx,
    to_input,
)
from alexnet_triton.make_sample import balanced, write_idx

FULL = Path("/usr/share/datasets/fashion-mnist")


def write_folder(folder: Path, train: int = 20, test: int = 10) -> Path:
    """A folder of valid files of random images."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for (images, labels), n in zip(data.FILES.values(), (train, test), strict=True):
        write_idx(folder / f"{images}.gz", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{labels}.gz", (np.arange(n) % 10).astype(np.uint8))
    return folder


def test_the_shipped_sample_is_balanced_and_real() -> None:
    sample = load_fashion_mnist("sample")
    assert len(sample.train) == 1000
    assert len(sample.test) == 500
    assert torch.equal(sample.train.labels.bincount(), torch.full((10,), 100))
    assert torch.equal(sample.test.labels.bincount(), torch.full((10,), 50))
    assert torch.equal(sample.train.limited(30).labels.bincount(), torch.full((10,), 3))
    assert 60 < sample.train.images.double().mean() < 85  # the full set's mean pixel is 72.9
    licence = (data.SAMPLE / "LICENSE").read_text()
    assert "MIT License" in licence
    assert "Zalando SE" in licence


@pytest.mark.skipif(not FULL.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_sample_is_what_make_sample_takes_from_the_full_set() -> None:
    full, sample = read_folder(FULL), load_fashion_mnist("sample")
    assert (len(full.train), len(full.test)) == (60000, 10000)
    for split, part, n in ((full.train, sample.train, 100), (full.test, sample.test, 50)):
        expected = balanced(split, n)
        assert torch.equal(part.images, expected.images)
        assert torch.equal(part.labels, expected.labels)


def test_gzipped_or_not(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    expected = read_folder(folder)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    got = read_folder(folder)
    assert torch.equal(got.train.images, expected.train.images)
    assert got.train.images.shape == (20, 28, 28)
    assert got.train.images.dtype == torch.uint8
    assert got.test.labels.dtype == torch.int64


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def _truncate(raw: bytes) -> bytes:
    return raw[:-100]


BROKEN = {
    "truncated": (IMAGES, _truncate, "only 15580: it is truncated"),
    "truncated_header": (IMAGES, lambda raw: raw[:9], "truncated: 9 bytes where the header alone has 16"),
    "too_long": (LABELS, lambda raw: raw + b"\0", "the file has more"),
    "magic": (IMAGES, lambda raw: b"\0\0\x08\x01" + raw[4:], "wrong magic number 0x00000801, expected 0x00000803"),
    "not_idx": (LABELS, lambda raw: b"<html>nothing</html>", "wrong magic number"),
    "label_count": (LABELS, lambda raw: b"\0\0\x08\x01\0\0\0\x13" + raw[8:-1], r"has 20 images, but .* has 19 labels"),
    "huge_header": (IMAGES, lambda raw: raw[:4] + b"\xff" * 4 + raw[8:], "header claims shape"),
    "other_size": (IMAGES, lambda raw: raw[:8] + b"\0\0\0\x20" + raw[12:], "of 28 x 28"),
    "bad_label": (LABELS, lambda raw: raw[:-1] + b"\x0a", r"label 10 is outside 0\.\.9"),
    "empty": (LABELS, lambda raw: b"", "truncated: 0 bytes"),
}


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named_with_its_fault(fault: str, packed: bool, tmp_path: Path) -> None:
    name, damage, message = BROKEN[fault]
    folder = write_folder(tmp_path)
    path = folder / f"{name}.gz"
    raw = damage(gzip.decompress(path.read_bytes()))
    if packed:
        path.write_bytes(gzip.compress(raw))
    else:
        path.unlink()
        path = folder / name
        path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_folder(folder)
    assert str(path) in str(error.value)


def test_a_header_that_claims_more_than_there_is_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / f"{IMAGES}.gz"
    for claimed in (1_000_000, 2**32 - 1):  # what passes for a size, and what does not
        path.write_bytes(gzip.compress(b"\0\0\x08\x03" + claimed.to_bytes(4, "big") + 2 * b"\0\0\0\x1c" + bytes(784)))
        tracemalloc.start()
        with pytest.raises(DataError, match=r"header (announces 784000000 bytes|claims shape)"):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_a_file_that_vanishes_halfway_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path)
    find = data._find_file

    def vanish(folder: Path, name: str) -> Path:
        path = find(folder, name)
        path.unlink()
        return path

    monkeypatch.setattr(data, "_find_file", vanish)
    with pytest.raises(DataError, match=rf"{IMAGES}\.gz: cannot be read: .*No such file"):
        read_folder(folder)


def test_a_damaged_gzip_stream_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    path = folder / f"{IMAGES}.gz"
    for packed in (path.read_bytes()[:-500], b"no gzip at all"):
        path.write_bytes(packed)
        with pytest.raises(DataError, match="cannot be read") as error:
            read_folder(folder)
        assert str(path) in str(error.value)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_fashion_mnist(tmp_path / "nowhere")
    folder = write_folder(tmp_path)
    (folder / f"{LABELS}.gz").unlink()
    with pytest.raises(DataError, match=f"no file {LABELS} or {LABELS}.gz"):
        load_fashion_mnist(folder)


def test_usual_places_come_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "found")
    (tmp_path / "empty").mkdir()  # as a download that failed leaves it
    monkeypatch.setattr(data, "USUAL_PLACES", (tmp_path / "nothing", tmp_path / "empty", folder))
    assert load_fashion_mnist().source == folder
    monkeypatch.setattr(data, "USUAL_PLACES", ())
    monkeypatch.setattr(data, "_download", lambda: folder)
    assert load_fashion_mnist().source == folder


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def no_network(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(data, "USUAL_PLACES", ())
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    with pytest.raises(DataError, match=r"could not be downloaded .*--data sample"):
        load_fashion_mnist()


def test_resize_is_torchvisions() -> None:
    from torchvision.transforms.v2.functional import resize

    images = load_fashion_mnist("sample").train.images[:8]
    ours = to_input(images, 224)
    assert ours.shape == (8, 1, 224, 224)
    assert ours.dtype == torch.float32
    assert ours.min() >= 0
    assert ours.max() <= 1
    theirs = resize(images.unsqueeze(1).float() / 255, [224, 224], antialias=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    rounded = resize(images.unsqueeze(1), [224, 224], antialias=True).float() / 255
    assert (ours - rounded).abs().max() <= 1 / 255
    assert torch.equal(to_input(images, 28)[:, 0], images.float() / 255)


def test_augmentations_fill_their_ranges_and_follow_the_seed() -> None:
    torch.manual_seed(5)
    offset, flip, brightness, contrast = draw_augmentation(500, torch.device("cpu"))
    assert set(offset.flatten().tolist()) == set(range(-SHIFT, SHIFT + 1))
    assert 0.4 < flip.float().mean() < 0.6
    for factor in (brightness, contrast):
        assert FACTORS[0] <= factor.min() < FACTORS[0] + 0.01
        assert FACTORS[1] - 0.01 < factor.max() <= FACTORS[1]
    assert not torch.equal(brightness, contrast)
    torch.manual_seed(5)
    assert torch.equal(draw_augmentation(500, torch.device("cpu")).contrast, contrast)


def test_read_idx_takes_labels_too(tmp_path: Path) -> None:
    write_idx(tmp_path / "x.gz", np.arange(7, dtype=np.uint8))
    assert read_idx(tmp_path / "x.gz", 1).tolist() == list(range(7))
