"""Reading IDX files, refusing broken ones, resizing, augmentation, normalization; the shipped sample."""

from __future__ import annotations

import gzip
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as tv
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from alexnet_triton.data import augment as augment_module
from alexnet_triton.data import fashion_mnist as data
from alexnet_triton.data.augment import (
    AREA,
    EVERYTHING,
    FACTORS,
    NOTHING,
    SHIFT,
    Augment,
    augmented_input,
    draw_augmentation,
    draw_boxes,
    draw_light,
    network_input,
    to_input,
)
from alexnet_triton.data.dataset import DataError, Dataset, Normalization, Split
from alexnet_triton.data.fashion_mnist import load_fashion_mnist, read_folder, read_idx
from alexnet_triton.data.make_sample import balanced, write_idx

from ...conftest import DEVICE

FULL = Path("/usr/share/datasets/fashion-mnist")


def write_folder(folder: Path, train: int = 20, test: int = 10) -> Path:
    """A folder of valid IDX files with random images."""
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
    for claimed in (1_000_000, 2**32 - 1):  # one that is a plausible size, and one that is not
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
    (tmp_path / "empty").mkdir()  # as left by a failed download
    monkeypatch.setattr(data, "usual_places", lambda: (tmp_path / "nothing", tmp_path / "empty", folder))
    assert load_fashion_mnist().source == folder
    monkeypatch.setattr(data, "usual_places", lambda: ())
    monkeypatch.setattr(data, "_download", lambda: folder)
    assert load_fashion_mnist().source == folder


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def no_network(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(data, "usual_places", lambda: ())
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


CPU = torch.device("cpu")

#: Each part of the augmentation alone, and all parts with each crop.
PARTS = {
    "flip": Augment(flip=True),
    "pad": Augment(crop="pad"),
    "resized": Augment(crop="resized"),
    "colour": Augment(colour=True),
    "all_pad": EVERYTHING,
    "all_resized": Augment(flip=True, crop="resized", colour=True),
}


def test_augmentations_fill_their_ranges_and_follow_the_seed() -> None:
    torch.manual_seed(5)
    offset, flip, brightness, contrast, size = draw_augmentation(500, CPU)
    assert size is None
    assert set(offset.flatten().tolist()) == set(range(-SHIFT, SHIFT + 1))
    assert 0.4 < flip.float().mean() < 0.6
    for factor in (brightness, contrast):
        assert FACTORS[0] <= factor.min() < FACTORS[0] + 0.01
        assert FACTORS[1] - 0.01 < factor.max() <= FACTORS[1]
    assert not torch.equal(brightness, contrast)
    torch.manual_seed(5)
    assert torch.equal(draw_augmentation(500, CPU).contrast, contrast)


#: The random numbers that each part draws, in order.
DRAWN: dict[str, list[Callable[[], object]]] = {
    "flip": [lambda: torch.rand(7)],
    "pad": [lambda: torch.randint(-2, 3, (7, 2), dtype=torch.int32)],
    "resized": [lambda: torch.rand(7, 10), lambda: torch.rand(7, 10), lambda: torch.rand(7, 2)],
    "colour": [lambda: torch.rand(7), lambda: torch.rand(7)],
}
DRAWN["all_pad"] = DRAWN["pad"] + DRAWN["flip"] + DRAWN["colour"]
DRAWN["all_resized"] = DRAWN["resized"] + DRAWN["flip"] + DRAWN["colour"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("part", ["nothing", *PARTS])
def test_nothing_is_drawn_for_a_part_that_is_off(part: str, channels: int) -> None:
    """The generator's state is exactly that after the part's own draws."""
    images = torch.randint(0, 256, (7, 28, 28) if channels == 1 else (7, 3, 28, 28), dtype=torch.uint8)
    augment = PARTS.get(part, NOTHING)
    draws = DRAWN.get(part, [])
    if channels == 3 and augment.colour:
        draws = [*draws[:-2], lambda: torch.randn(3, 7)]
    torch.manual_seed(1)
    augmented_input(images, torch.arange(7), 28, augment)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for draw in draws:
        draw()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("part", PARTS)
def test_augmented_images_are_torchvisions(part: str, backend: str, channels: int) -> None:
    """torchvision takes one image after the other with the same parameters; every image is changed."""
    device, augment = torch.device(DEVICE), PARTS[part]
    shape = (5, 28, 28) if channels == 1 else (5, 3, 28, 28)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    index = torch.tensor([4, 0, 0, 2, 1, 3], device=device)
    torch.manual_seed(2)
    with kernels.use_backend(backend):  # type: ignore[arg-type]
        ours = augmented_input(images, index, 56, augment)
    torch.manual_seed(2)
    offset, flip, brightness, contrast, size = draw_augmentation(
        6, device, augment=Augment(augment.flip, augment.crop, augment.colour and channels == 1)
    )
    light = draw_light(6, device) if augment.colour and channels == 3 else torch.zeros(6, channels, device=device)
    assert (offset is None, flip is None) == (augment.crop == "none", not augment.flip)
    changed = 0
    for n in range(6):
        plain = image = images[index[n]].view(channels, 28, 28).float() / 255
        if offset is not None:
            image = tv.crop(image, *offset[n].tolist(), *([28, 28] if size is None else size[n].tolist()))
        if flip is not None and flip[n]:
            image = tv.horizontal_flip(image)
        if brightness is not None:
            image = tv.adjust_contrast(tv.adjust_brightness(image, brightness[n].item()), contrast[n].item())
        expected = tv.resize(image, [56, 56]) + light[n][:, None, None]
        torch.testing.assert_close(ours[n], expected, rtol=0, atol=1e-5)
        changed += not torch.allclose(ours[n], tv.resize(plain, [56, 56]), rtol=0, atol=1e-3)
    assert changed >= (1 if part == "flip" else 5)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov distance: the largest difference between the distribution functions of two samples."""
    values = torch.cat([ours, theirs]).unique()
    functions = (torch.searchsorted(x.sort().values, values, right=True) / len(x) for x in (ours, theirs))
    return torch.sub(*functions).abs().max().item()


#: Functions of boxes (top, left, height, width) whose distributions are compared.
MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "top": lambda b: b[0],
    "left": lambda b: b[1],
    "height": lambda b: b[2],
    "width": lambda b: b[3],
    "area": lambda b: b[2] * b[3],
    "aspect": lambda b: b[3] / b[2],
    "bottom": lambda b: b[0] + b[2],
    "right": lambda b: b[1] + b[3],
}

BOXES = 20_000
#: Two samples of one distribution are further apart than this in one of 10,000 cases.
FAR = math.sqrt(-math.log(1e-4 / 2) / BOXES)


def our_boxes(size: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.cat(draw_boxes(BOXES, CPU, size), 1).double().T  # [4, BOXES]


def their_boxes(size: int, area: tuple[float, float]) -> torch.Tensor:
    torch.manual_seed(4)
    crop, image = transforms.RandomResizedCrop(size, scale=area), torch.empty(1, size, size)
    drawn = (crop.make_params([image]) for _ in range(BOXES))
    return torch.tensor([[p[key] for key in ("top", "left", "height", "width")] for p in drawn], dtype=torch.float64).T


@pytest.mark.parametrize(
    ("size", "area"), [(28, AREA), (224, AREA), (28, (0.97, 1.0))], ids=["S28", "S224", "S28-where_few_fit"]
)
def test_boxes_are_distributed_as_torchvisions(size: int, area: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "AREA", area)
    ours, theirs = our_boxes(size), their_boxes(size, area)
    for name, measure in MEASURES.items():
        assert distance(measure(ours), measure(theirs)) < FAR, name
    assert ours.min() == 0
    assert (ours[:2] + ours[2:]).max() == size
    assert ours[2:].min() >= 1
    # After ten tries the whole image is taken, which shows where few tries fit.
    whole = ((ours[2] == size) & (ours[3] == size)).double().mean()
    assert whole < 0.01 if area == AREA else whole > 0.2


WRONG: dict[str, dict[str, Any]] = {
    "area": {"AREA": (0.12, 1.0)},
    "aspect": {"ASPECT": (0.8, 1.25)},
    "reversed": {"ASPECT": (0.8, 4 / 3)},
}


@pytest.mark.parametrize("wrong", [*WRONG, "one_try"])
def test_the_comparison_of_distributions_sees_a_wrong_one(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    area = AREA if wrong in WRONG else (0.97, 1.0)
    for name, value in WRONG.get(wrong, {"AREA": area, "TRIES": 1}).items():
        monkeypatch.setattr(augment_module, name, value)
    ours, theirs = our_boxes(28), their_boxes(28, area)
    assert max(distance(measure(ours), measure(theirs)) for measure in MEASURES.values()) > 1.5 * FAR


def test_where_no_try_fits_it_is_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "ASPECT", (3.0, 4.0))
    monkeypatch.setattr(augment_module, "AREA", (0.9, 1.0))
    corner, box = draw_boxes(50, CPU, 28)
    assert corner.unique().tolist() == [0]
    assert box.unique().tolist() == [28]


@pytest.mark.parametrize("n", [0, 1])
def test_boxes_of_no_image_and_of_one_pixel(n: int) -> None:
    corner, box = draw_boxes(n, CPU, 1)
    assert (corner.shape, box.shape) == ((n, 2), (n, 2))
    assert corner.dtype == box.dtype == torch.int32
    assert corner.tolist() == [[0, 0]] * n
    assert box.tolist() == [[1, 1]] * n


class Operations(TorchDispatchMode):
    """Notes the names of all PyTorch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


#: Operations that a captured step cannot do: read a number from the device, or copy a constant from the host.
NOT_CAPTURABLE = {"_local_scalar_dense", "item", "nonzero", "equal", "lift_fresh", "masked_select", "unique"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_no_draw_waits_for_the_device_or_copies_to_it(part: str, channels: int) -> None:
    """Making the images does not either; on a GPU test_training checks this for a whole step."""
    images = torch.randint(0, 256, (5, 28, 28) if channels == 1 else (5, 3, 28, 28), dtype=torch.uint8)
    index = torch.tensor([4, 0, 2])
    with Operations() as seen, kernels.use_backend("torch"):
        augmented_input(images, index, 56, PARTS[part])
    assert seen.names & {"rand", "randint", "randn"}
    assert not seen.names & NOT_CAPTURABLE
    with Operations() as seen:
        torch.tensor([1.0, 2.0]).max().item()
    assert len(seen.names & NOT_CAPTURABLE) == 2


def test_an_augmentation_says_what_it_is_and_refuses_what_there_is_not() -> None:
    assert Augment() == NOTHING
    assert str(NOTHING) == "nothing"
    assert str(EVERYTHING) == "flip, pad crop, colour"
    assert str(PARTS["resized"]) == "resized crop"
    with pytest.raises(ValueError, match="crop must be one of none, pad, resized, patch, got 'centre'"):
        Augment(crop="centre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="crop must be one of none, pad, resized, patch, got True"):
        Augment(crop=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="flip must be a bool, got 'pad'"):
        Augment("pad")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="colour must be a bool, got 1"):
        Augment(colour=1)  # type: ignore[arg-type]


def test_read_idx_takes_labels_too(tmp_path: Path) -> None:
    write_idx(tmp_path / "x.gz", np.arange(7, dtype=np.uint8))
    assert read_idx(tmp_path / "x.gz", 1).tolist() == list(range(7))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [NOTHING, EVERYTHING], ids=["plain", "augmented"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_inputs(channels: int, augment: Augment, dtype: torch.dtype) -> None:
    """Pixels in [0, 1] minus the mean, divided by the standard deviation, after all other changes."""
    device = torch.device(DEVICE)
    shape = (5, 20, 20) if channels == 1 else (5, 3, 20, 20)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    by = Normalization((0.25, 0.5, 0.75)[:channels], (0.5, 0.25, 2.0)[:channels])
    index = torch.tensor([3, 0, 4], device=device)
    results = []
    for normalization in (None, by):
        torch.manual_seed(0)
        results.append(augmented_input(images, index, 24, augment, torch.float32, normalization=normalization))
    plain, normalized = results
    mean, std = (torch.tensor(values, device=device)[None, :, None, None] for values in (by.mean, by.std))
    torch.testing.assert_close(normalized, (plain - mean) / std)
    torch.manual_seed(0)
    half = augmented_input(images, index, 24, augment, dtype, normalization=by)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), normalized, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_normalization_of_images_has_mean_0_and_standard_deviation_1(channels: int) -> None:
    shape = (50, 3, 5) if channels == 1 else (50, 3, 3, 5)
    images = (torch.rand(shape) ** 2 * 200 + 20).to(torch.uint8)
    by = Normalization.of([images])
    inputs = network_input(images[:, ..., :3], torch.arange(50), 3, normalization=by).double()
    seen = images[..., :3].double().view(50, channels, 3, 3) / 255
    mean, std = (torch.tensor(values, dtype=torch.float64)[None, :, None, None] for values in (by.mean, by.std))
    torch.testing.assert_close(inputs, (seen - mean) / std, atol=1e-5, rtol=1e-5)
    all_of_it = (images.double().view(50, channels, -1) / 255).transpose(0, 1).flatten(1)
    assert by.mean == pytest.approx(all_of_it.mean(1).tolist(), rel=1e-12)
    assert by.std == pytest.approx(all_of_it.std(1, correction=0).tolist(), rel=1e-9)


def test_equal_pixels_are_divided_by_nothing() -> None:
    assert Normalization.of([torch.full((3, 4, 4), 51, dtype=torch.uint8)]) == Normalization((0.2,), (1.0,))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.0, 0.0), (1.0, 1.0), "1 or 3 means"),
        ((0.0,), (1.0, 1.0, 1.0), "1 or 3 means"),
        ((0.0,), (0.0,), "above 0"),
        ((math.nan,), (1.0,), "finite"),
        ((0.0,), (math.inf,), "finite"),
    ],
)
def test_what_is_no_normalization(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalization(mean, std)


def test_a_normalization_is_of_the_images_channels() -> None:
    images = torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot be normalized"):
        network_input(images, torch.arange(2), 4, normalization=Normalization((0.0,) * 3, (1.0,) * 3))


def test_both_splits_are_normalized_by_the_training_images() -> None:
    images, labels = torch.randint(0, 256, (6, 4, 4), dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    dataset = Dataset(Split(images, labels), Split(images // 2, labels), Path(), ("a", "b"), "made").normalized()
    assert dataset.train.normalization == dataset.test.normalization == Normalization.of([images])
    assert dataset.train.limited(2).normalization == dataset.test.to(torch.device("cpu")).normalization is not None
