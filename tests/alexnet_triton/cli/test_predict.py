"""``alexnet-triton predict`` prints the network's probabilities; a file that is not an image gives a one-line error."""

from __future__ import annotations

import io
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import kernels
from alexnet_triton.cli.predict import image_files
from alexnet_triton.data.dataset import DataError
from alexnet_triton.data.fashion_mnist import CLASSES, load_fashion_mnist
from alexnet_triton.data.image_files import read_image, read_images
from alexnet_triton.training.checkpoint import Checkpoint, save_checkpoint
from alexnet_triton.training.evaluation import classify, evaluate
from alexnet_triton.training.networks import load_checkpoint, new_model

from ...permissions import permissions_hold
from ..command import run_here

CPU = torch.device("cpu")
ON_PYTORCH = ("--device", "cpu", "--backend", "torch")


def checkpoint_of(
    folder: Path, model: str = "lenet", channels: int = 1, size: int = 28, classes: tuple[str, ...] = CLASSES
) -> Path:
    """A checkpoint of a network with random weights."""
    net = new_model(model, 0, CPU, classes=len(classes), channels=channels)
    path = folder / f"{model}{channels}.pt"
    save_checkpoint(path, Checkpoint(model, list(classes), [], net.state_dict(), channels=channels, size=size))
    return path


def test_it_prints_what_the_network_says_of_the_test_images(tmp_path: Path) -> None:
    """The data set's images, saved as files, get the probabilities of the data set's pixels, in order and in batches."""
    path = checkpoint_of(tmp_path)
    test = load_fashion_mnist("sample").test.limited(5)
    files = [str(tmp_path / f"{i}.png") for i in range(5)]
    for file, image in zip(files, test.images, strict=True):
        Image.fromarray(image.numpy()).save(file)
    net, _ = load_checkpoint(path, CPU)
    with kernels.use_backend("torch"), torch.no_grad():
        expected = net.eval()(test.images[:, None] / 255).softmax(1)
    result = run_here("predict", str(path), *files, "--json", "--top", "10", "--batch-size", "2", *ON_PYTORCH)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert list(found) == files
    for row, classes in zip(expected, found.values(), strict=True):
        assert list(classes.values()) == sorted(classes.values(), reverse=True)
        assert [classes[name] for name in CLASSES] == pytest.approx(row.tolist(), rel=1e-4)

    lines = run_here("predict", str(path), files[0], "--top", "2", *ON_PYTORCH).stdout.splitlines()
    best = expected[0].argmax().item()
    assert lines[0] == files[0]
    assert lines[1].split() == [*CLASSES[best].split(), f"{expected[0, best]:.4f}"]
    assert len(lines) == 3
    assert len(run_here("predict", str(path), files[0], *ON_PYTORCH).stdout.splitlines()) == 6


def test_probabilities_agree_with_the_evaluation(tmp_path: Path) -> None:
    net, _ = load_checkpoint(checkpoint_of(tmp_path), CPU)
    test = load_fashion_mnist("sample").test.limited(30)
    with kernels.use_backend("torch"):
        probabilities = classify(net.train(), test.images, batch_size=7, image_size=28, device=CPU)
        loss, accuracy, _ = evaluate(net, test, batch_size=30, image_size=28, device=CPU)
    assert probabilities.shape == (30, 10)
    assert (probabilities.argmax(1) == test.labels).double().mean().item() == pytest.approx(accuracy)
    assert -probabilities[torch.arange(30), test.labels].log().mean().item() == pytest.approx(loss, rel=1e-5)
    assert not net.training


def test_three_channels_and_classes_of_its_own(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, channels=3, classes=("[red]", "blue"))
    pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "[bold] colours.png"  # file names are not markup either
    Image.fromarray(pixels.numpy()).save(file)
    net, kept = load_checkpoint(path, CPU)
    assert (kept.channels, kept.size, kept.classes) == (3, 28, ["[red]", "blue"])
    with kernels.use_backend("torch"), torch.no_grad():
        red, blue = net.eval()(pixels.permute(2, 0, 1)[None] / 255).softmax(1)[0].tolist()
    result = run_here("predict", str(path), str(file), *ON_PYTORCH)
    lines = [str(file), f"  [red]  {red:.4f}", f"  blue   {blue:.4f}"]
    assert result.stdout.splitlines() == (lines if red > blue else [lines[0], lines[2], lines[1]])


def test_an_image_is_made_a_square_of_its_middle(tmp_path: Path) -> None:
    from torchvision.transforms.v2.functional import resize

    pixels = torch.randint(0, 256, (3, 40, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png")
    middle = pixels[:, :, 30:70]
    assert torch.equal(read_image(tmp_path / "a.png", 3, 40), middle)
    small = read_image(tmp_path / "a.png", 3, 20)
    assert small.shape == (3, 20, 20)
    # At the crop's borders, resizing also reads pixels outside the crop.
    assert torch.equal(small[:, :, 2:-2], resize(middle, [20, 20], antialias=True)[:, :, 2:-2])
    grey = read_image(tmp_path / "a.png", 1, 40)
    weights = torch.tensor([0.299, 0.587, 0.114])
    assert grey.shape == (40, 40)
    assert (grey - (weights[:, None, None] * middle).sum(0)).abs().max() <= 1
    # EXIF records the orientation of the camera.
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png", 3, 40), middle.rot90(-1, (1, 2)))
    transparent = picture.copy()
    transparent.putalpha(100)
    transparent.save(tmp_path / "transparent.png")
    assert torch.equal(read_image(tmp_path / "transparent.png", 3, 40), middle)


def _png(side: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).save(buffer, "PNG")
    return buffer.getvalue()


def _bomb(side: int) -> bytes:
    """A PNG whose header claims ``side`` x ``side`` pixels; Pillow checks the header before it decodes."""
    raw = bytearray(_png())
    raw[16:24] = side.to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


def _deep() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def _with_a_long_text() -> bytes:
    """A PNG with 2 MB of text compressed to a few bytes; Pillow raises an error of a general class for it."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    Image.new("L", (30, 30)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


BAD = {
    "missing": (None, "no such file"),
    "folder": (None, "cannot be read: Is a directory"),
    "text": (b"hello", "not an image"),
    "empty": (b"", "not an image"),
    "cut_short": (_png()[:400], "cannot be read: image file is truncated"),
    "changed": (_png()[:200] + bytes(20) + _png()[220:], "cannot be read: broken data stream"),
    "swollen": (_with_a_long_text(), "damaged: Decompressed data too large"),
    "sixteen_bits": (_deep(), "pixels of more than 8 bits"),
    "pipe": (None, "not a regular file"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\nshowpage\n", "not an image"),
    "bomb": (_bomb(20_000), "too large to be decoded: .* exceeds limit"),
    "half_a_bomb": (_bomb(12_000), "too large to be decoded: .* exceeds limit"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_is_no_image_is_one_line_and_the_others_are_classified(bad: str, tmp_path: Path) -> None:
    content, message = BAD[bad]
    file, good = tmp_path / f"{bad}.png", tmp_path / "good.png"
    good.write_bytes(_png())
    if content is not None:
        file.write_bytes(content)
    elif bad == "folder":
        file.mkdir()
    elif bad == "pipe":
        os.mkfifo(file)  # opening a pipe would block forever
    if bad == "postscript":
        assert Image.open(file).format == "EPS"  # despite the file's name
    with pytest.raises(DataError, match=message) as error:
        read_image(file, 1, 28)
    images, readable, (only,) = read_images([file, good], 1, 28)
    assert (images.shape, readable, str(only)) == ((1, 28, 28), [good], str(error.value))
    if bad in ("missing", "bomb"):
        path = checkpoint_of(tmp_path)
        result = run_here("predict", str(path), str(file), str(good), *ON_PYTORCH)
        assert result.returncode == 1
        assert result.stderr == f"alexnet-triton: {error.value}\n"
        assert result.stdout.splitlines()[0] == str(good)
        alone = run_here("predict", str(path), str(file), str(file), *ON_PYTORCH)
        assert (alone.returncode, alone.stdout, alone.stderr) == (1, "", 2 * f"alexnet-triton: {error.value}\n")


def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "secret.png"
    file.write_bytes(_png())
    file.chmod(0)
    with permissions_hold(), pytest.raises(DataError, match=r"secret\.png: cannot be read: Permission denied"):
        read_image(file, 1, 28)


def test_what_is_missing_on_the_command_line(tmp_path: Path) -> None:
    result = run_here("predict", "/nowhere.pt", "/nowhere.png", *ON_PYTORCH)
    assert (result.returncode, result.stderr) == (1, "alexnet-triton: /nowhere.pt: no such file\n")
    nothing = run_here("predict", str(checkpoint_of(tmp_path)), *ON_PYTORCH)
    assert nothing.returncode == 2
    assert "IMAGE" in nothing.stderr


def test_a_run_is_its_best_checkpoint_else_its_last(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    run = tmp_path / "run"
    run.mkdir()
    nothing = run_here("predict", str(run), str(tmp_path / "a.png"), *ON_PYTORCH)
    expected = f"alexnet-triton: {run}: not the folder of a run: it has neither best.pt nor checkpoint.pt\n"
    assert (nothing.returncode, nothing.stderr) == (1, expected)
    last, best = checkpoint_of(tmp_path, classes=("a", "b")), checkpoint_of(tmp_path, channels=3, classes=("c", "d"))
    for taken, name, classes in ((last, "checkpoint.pt", {"a", "b"}), (best, "best.pt", {"c", "d"})):
        taken.rename(run / name)
        result = run_here("predict", str(run), str(tmp_path / "a.png"), "--json", *ON_PYTORCH)
        assert (result.returncode, result.stderr) == (0, f"reading the network from {run / name}\n")
        (found,) = json.loads(result.stdout).values()
        assert found.keys() == classes


def test_a_folder_of_images(tmp_path: Path) -> None:
    """Images are sorted by folder, then by name; hidden names, other files, PostScript and linked folders are left out."""
    names = ["b.jfif", "c.gif", "d.mpo", "a/2.PNG", "a/b/1.png"]
    others = [".hidden.png", ".ipynb_checkpoints/a.png", "a/notes.txt", "a.eps", "document.pdf", "png", "a.mpg", "a.h5"]
    others.append("__MACOSX/a.png")
    images = tmp_path / "images"
    for name in (*names, *others):
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png())
    (images / "loop").symlink_to(images)
    (images / "damaged.png").write_bytes(b"hello")
    alone = tmp_path / "alone"
    alone.write_bytes(_png())
    found, errors = image_files([images])
    assert errors == []
    assert found == [images / name for name in ("b.jfif", "c.gif", "d.mpo", "damaged.png", "a/2.PNG", "a/b/1.png")]
    path = str(checkpoint_of(tmp_path))
    result = run_here("predict", path, str(alone), str(images), "--json", "--batch-size", "2", *ON_PYTORCH)
    assert result.returncode == 1
    assert (
        result.stderr == f"alexnet-triton: {images / 'damaged.png'}: not an image, or of a format that Pillow does not know\n"
    )
    assert list(json.loads(result.stdout)) == [str(alone), *(str(images / name) for name in names)]

    (tmp_path / "empty").mkdir()
    empty = run_here("predict", path, str(tmp_path / "empty"), str(alone), *ON_PYTORCH)
    assert (empty.returncode, empty.stderr) == (1, f"alexnet-triton: {tmp_path / 'empty'}: no image files in it\n")
    assert empty.stdout.startswith(f"{alone}\n")


def test_a_folder_without_permission(tmp_path: Path) -> None:
    for name in ("good", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(_png())
    (tmp_path / "secret").chmod(0)
    with permissions_hold():
        found, errors = image_files([tmp_path])
    (tmp_path / "secret").chmod(0o700)
    assert found == [tmp_path / "good/a.png"]
    assert [str(error) for error in errors] == [f"{tmp_path / 'secret'}: cannot be read: Permission denied"]


def test_alexnet_predicts(tmp_path: Path) -> None:
    """An image of 28 x 28 is resized to 224 x 224 as in training, not when it is decoded."""
    path = checkpoint_of(tmp_path, "alexnet")
    test = load_fashion_mnist("sample").test.limited(1)
    Image.fromarray(test.images[0].numpy()).save(tmp_path / "a.png")
    net, _ = load_checkpoint(path, CPU)
    with kernels.use_backend("torch"):
        expected = classify(net, test.images, batch_size=1, image_size=224, device=CPU)[0].max().item()
    result = run_here("predict", str(path), str(tmp_path / "a.png"), "--json", *ON_PYTORCH)
    assert max(json.loads(result.stdout)[str(tmp_path / "a.png")].values()) == pytest.approx(expected, rel=1e-5)
