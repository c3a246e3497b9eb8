"""Image files as cameras and programs write them: orientation, JPEGs, narrow and deep images, names of image files."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from alexnet_triton.data import image_files
from alexnet_triton.data.dataset import DataError
from alexnet_triton.data.image_files import find_images, read_image, read_images

PIXELS = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
PICTURE = Image.fromarray(PIXELS.permute(1, 2, 0).numpy())
SQUARE = PIXELS[:, :, 10:50]


def _turned(square: torch.Tensor, orientation: int) -> torch.Tensor:
    """``square`` in EXIF's ``orientation`` 2 to 8; other values change nothing."""
    return {
        2: square.flip(2),
        3: square.rot90(2, (1, 2)),
        4: square.flip(1),
        5: square.transpose(1, 2),
        6: square.rot90(-1, (1, 2)),
        7: square.rot90(2, (1, 2)).transpose(1, 2),
        8: square.rot90(1, (1, 2)),
    }.get(orientation, square)


def _exif(kind: int, value: bytes, count: int = 1, more: bytes = b"", entries: int = 1) -> bytes:
    """EXIF data with an orientation of TIFF type ``kind``; ``more`` holds further tags of 12 bytes each."""
    tag = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", entries) + tag + more + bytes(4)


def _negative_latitude(orientation: int) -> bytes:
    """EXIF with a GPS latitude of -1/1, a signed fraction: Pillow reads it, but cannot write it as an unsigned fraction."""
    gps = struct.pack("<HHII", 0x8825, 4, 1, 38) + bytes(4)
    entry = struct.pack("<HHHII", 1, 2, 10, 1, 56) + bytes(4) + struct.pack("<ii", -1, 1)
    return _exif(3, struct.pack("<H", orientation), more=gps[:12], entries=2) + entry


def _save(path: Path, exif: bytes) -> Path:
    PICTURE.save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_all_orientations(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_image(_save(tmp_path / f"a{suffix}", exif if suffix == ".tif" else exif.tobytes()), 3, 40)  # type: ignore[arg-type]
    assert torch.equal(found, _turned(SQUARE, orientation))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_whose_bytes_are_its_pixels(orientation: int, mode: str, tmp_path: Path) -> None:
    """If Pillow gets the file's path, it maps the file into memory and confuses its rows with columns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = PICTURE.convert(mode)
    picture.save(tmp_path / "a.tif", exif=exif)
    square = pil_to_tensor(picture.convert("RGB"))[:, :, 10:50]
    assert torch.equal(read_image(tmp_path / "a.tif", 3, 40), _turned(square, orientation))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_tag_that_cannot_be_written_back_does_not_damage_an_image(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = _save(tmp_path / f"a{suffix}", _negative_latitude(orientation))
    assert Image.open(path).getexif().get_ifd(0x8825)[2] == -1
    assert torch.equal(read_image(path, 3, 40), _turned(SQUARE, orientation))


def test_the_same_of_a_jpeg(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.jpg", _negative_latitude(6))
    plain = pil_to_tensor(Image.open(path)).rot90(-1, (1, 2))
    assert torch.equal(read_image(path, 3, 40), center_crop(plain, [40, 40]))


ODD = {
    "long": (_exif(4, struct.pack("<I", 6)), 6),
    "byte": (_exif(1, b"\6"), 6),
    "two_shorts": (_exif(3, struct.pack("<HH", 6, 1), count=2), 6),
    "text": (_exif(2, b"6\0", count=2), 6),
    "float": (_exif(11, struct.pack("<f", 6.0)), 6),
    "undefined": (_exif(7, b"\6"), 6),
    "words": (_exif(2, b"up\0", count=3), 1),
    "not_a_number": (_exif(11, struct.pack("<f", float("nan"))), 1),
    "no_value": (_exif(3, b"", count=0), 1),
    "unknown_type": (_exif(99, b"\6"), 1),
    "elsewhere": (_exif(3, struct.pack("<I", 10**6), count=9), 1),
    "no_tiff": (b"Exif\0\0rubbish that is no TIFF", 1),
    "cut_short": (_exif(3, struct.pack("<H", 6))[:12], 1),
}


@pytest.mark.filterwarnings("ignore:.*EXIF.*", "ignore:Truncated File Read", "ignore:Metadata Warning")
@pytest.mark.parametrize("name", ODD)
def test_odd_and_broken_exif(name: str, tmp_path: Path) -> None:
    exif, orientation = ODD[name]
    assert torch.equal(read_image(_save(tmp_path / "a.png", exif), 3, 40), _turned(SQUARE, orientation))


# ------------------------------------------------------------------------------------------------------------------ JPEGs

JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "no_subsampling": {"subsampling": 0},
    "half": {"subsampling": 1},
    "quarter": {"subsampling": 2},
    "rgb": {"keep_rgb": True},
    "comment": {"comment": b"a"},
    "profile": {"icc_profile": bytes(70_000)},
}


def _jpeg(mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    PICTURE.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def _by_pillow(data: bytes) -> torch.Tensor | None:
    try:
        return pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


@pytest.mark.parametrize("name", JPEGS)
def test_a_plain_jpeg_has_pillows_pixels(name: str) -> None:
    data = _jpeg(**JPEGS[name])
    found, expected = image_files._plain_jpeg(io.BytesIO(data)), _by_pillow(data)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "data",
    [
        _jpeg("L"),
        _jpeg("CMYK"),
        _jpeg(exif=_exif(3, struct.pack("<H", 6))),
        _jpeg(xmp=b"<x>"),
        _jpeg()[:-600],
        b"\xff\xd8\xff",
        b"",
    ],
)
def test_other_jpegs_are_pillows(data: bytes) -> None:
    file = io.BytesIO(data)
    assert image_files._plain_jpeg(file) is None
    assert file.tell() == 0


def test_a_torchvision_without_its_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow decodes what torchvision did, to the same pixels: torchvision 0.29 announces to remove its decoders."""
    (tmp_path / "a.jpg").write_bytes(_jpeg())
    expected = read_image(tmp_path / "a.jpg", 3, 28)
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    image_files._jpeg_decoder.cache_clear()
    try:
        assert image_files._plain_jpeg(io.BytesIO(_jpeg())) is None
        assert torch.equal(read_image(tmp_path / "a.jpg", 3, 28), expected)
    finally:
        image_files._jpeg_decoder.cache_clear()


def test_a_large_jpeg_is_pillows_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    (tmp_path / "a.jpg").write_bytes(_jpeg())
    with pytest.raises(DataError, match=r"a\.jpg: too large to be decoded"):
        read_image(tmp_path / "a.jpg", 3, 28)


def test_damaged_jpegs_are_as_pillow_has_them() -> None:
    """Bytes are changed or cut off: if torchvision decodes the file, Pillow decodes it to the same pixels."""
    random = Random(0)
    seen = 0
    for _ in range(400):
        data = bytearray(_jpeg(**random.choice(list(JPEGS.values()))))
        for _ in range(random.choice([1, 3])):
            data[random.randrange(len(data))] = random.randrange(256)
        data = data[: random.randrange(len(data))] if random.random() < 0.2 else data
        found = image_files._plain_jpeg(io.BytesIO(bytes(data)))
        if found is not None:
            expected = _by_pillow(bytes(data))
            assert expected is not None
            assert torch.equal(found, expected)
            seen += 1
    assert seen > 50


# ----------------------------------------------------------------------------------------------------------- narrow images


def _narrow(path: Path, long: int, short: int, upright: bool) -> np.ndarray:
    """Save an image with a ramp from black to white along the longer side; returns its pixels."""
    ramp = np.linspace(0, 255, long).astype(np.uint8)
    pixels = np.repeat(np.repeat(ramp[None, :, None], short, 0), 3, 2)
    pixels = pixels.transpose(1, 0, 2) if upright else pixels
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    return pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("shape", [(3_000_000, 1), (65_535, 1), (65_534, 1), (300_000, 2), (4_001, 2)], ids=str)
def test_a_narrow_image_costs_no_more_than_its_middle(
    shape: tuple[int, int], upright: bool, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _narrow(tmp_path / "a.png", *shape, upright=upright)
    seen: list[int] = []

    def watched(image: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        output = resize(image, *arguments, **options)
        seen.append(output.numel())
        return output

    monkeypatch.setattr("torchvision.transforms.v2.functional.resize", watched)
    image = read_image(tmp_path / "a.png", channels, 224)
    assert image.shape == ((224, 224) if channels == 1 else (3, 224, 224))
    assert image.float().mean().sub(127.5).abs() < 1
    assert max(seen) <= channels * (image_files._MOST_RESIZED + 2 * 224**2)


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("shape", [(500, 3), (501, 3), (400, 2), (1001, 5)], ids=str)
def test_a_cut_image_is_what_the_whole_one_would_be(
    shape: tuple[int, int], upright: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow image that is cut before resizing has the pixels of the uncut one, within one grey level."""
    _narrow(tmp_path / "a.png", *shape, upright=upright)
    monkeypatch.setattr(image_files, "_MOST_RESIZED", 1 << 40)
    whole = read_image(tmp_path / "a.png", 3, 64)
    monkeypatch.setattr(image_files, "_MOST_RESIZED", 1)
    assert (read_image(tmp_path / "a.png", 3, 64).int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(1000, 800), (60, 45), (4000, 300), (224, 224), (17, 1), (1, 17), (700, 9)], ids=str)
def test_an_ordinary_image_keeps_its_bytes(shape: tuple[int, int], tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    for size in (28, 224):
        whole = center_crop(resize(pixels, [size], antialias=True), [size, size])
        assert torch.equal(read_image(tmp_path / "a.png", 3, size), whole)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 9 bytes")], ids=repr
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_memory_that_is_short_is_that_files_error(
    suffix: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    PICTURE.save(path)

    def short(*_: object) -> None:
        raise error

    monkeypatch.setattr(image_files, "_square", short)
    _, readable, (only,) = read_images([path], 3, 28)
    assert (readable, str(only)) == ([], f"{path}: too large to be decoded: it takes more memory than there is")


@pytest.mark.slow
def test_memory_that_is_short_indeed(tmp_path: Path) -> None:
    """In a process with a memory limit, the large file gives one line of error and the small file is read."""
    Image.new("RGB", (9000, 9000)).save(tmp_path / "large.png")
    PICTURE.save(tmp_path / "small.png")
    script = f"""
import resource
from pathlib import Path
from alexnet_triton.data.image_files import read_images
small, large = Path({str(tmp_path / "small.png")!r}), Path({str(tmp_path / "large.png")!r})
read_images([small], 3, 28)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
_, readable, errors = read_images([large, small], 3, 28)
assert readable == [small], readable
print(*errors)
"""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}/large.png: too large to be decoded: it takes more memory than there is\n"


# ------------------------------------------------------------------------------------------------------------- deep images


def _png(bits: int, colour: int, channels: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)
    rows = (b"\0" + b"\x80" * (8 * channels * bits // 8)) * 8
    palette = chunk(b"PLTE", bytes(range(48))) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _tiff(bits: int, channels: int) -> bytes:
    data = b"\x80" * (8 * 8 * channels * bits // 8)
    extra = struct.pack("<" + "H" * channels, *[bits] * channels)
    entries = [
        (256, 3, 1, 8),
        (257, 3, 1, 8),
        (258, 3, channels, bits if channels == 1 else 200),
        (259, 3, 1, 1),
        (262, 3, 1, 1 if channels == 1 else 2),
        (273, 4, 1, 300),
        (277, 3, 1, channels),
        (278, 3, 1, 8),
        (279, 4, 1, len(data)),
    ]
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4)
    return head.ljust(200, b"\0") + extra.ljust(100, b"\0") + data


def _sgi(bits: int, channels: int) -> bytes:
    header = struct.pack(">HBBHHHH", 474, 0, bits // 8, 3 if channels > 1 else 2, 8, 8, channels)
    return header.ljust(512, b"\0") + b"\x80" * (8 * 8 * channels * bits // 8)


def _jpeg_2000(bits: int, channels: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB" if channels == 3 else "L", (8, 8), 128).save(buffer, "JPEG2000")
    data = bytearray(buffer.getvalue())
    begin = data.index(b"\xff\x4f\xff\x51") + 42
    for channel in range(channels):
        data[begin + 3 * channel] = bits - 1
    return bytes(data)


SHALLOW = {
    "png_grey": _png(8, 0, 1),
    "png_1": _png(1, 0, 1),
    "png_rgb": _png(8, 2, 3),
    "png_palette": _png(8, 3, 1),
    "png_palette_4": _png(4, 3, 1),
    "png_grey_alpha": _png(8, 4, 2),
    "tiff_grey": _tiff(8, 1),
    "tiff_rgb": _tiff(8, 3),
    "ppm": b"P6 8 8 255\n" + bytes(192),
    "ppm_of_100_values": b"P6 8 8 99\n" + bytes(192),
    "ppm_text": b"P3 8 8 255\n" + b"9 " * 192,
    "sgi": _sgi(8, 3),
    "jpeg_2000": _jpeg_2000(8, 3),
    # Five or six bits per channel.
    "bmp_of_16_bits_a_pixel": b"BM"
    + struct.pack("<IIIIiiHHIIiiII", 194, 0, 66, 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0)
    + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    + bytes(128),
}
DEEP = {
    "png_grey": _png(16, 0, 1),
    "png_rgb": _png(16, 2, 3),
    "png_grey_alpha": _png(16, 4, 2),
    "png_rgba": _png(16, 6, 4),
    "tiff_grey": _tiff(16, 1),
    "tiff_rgb": _tiff(16, 3),
    "tiff_rgba": _tiff(16, 4),
    "tiff_32": _tiff(32, 1),
    "pgm": b"P5 8 8 65535\n" + bytes(128),
    "ppm": b"P6 8 8 65535\n" + bytes(384),
    "ppm_of_1000_values": b"P6 8 8 999\n" + bytes(384),
    "ppm_text": b"P3 8 8 1000\n" + b"9 " * 192,
    "pfm": b"Pf 8 8 1.0\n" + bytes(256),
    "sgi_grey": _sgi(16, 1),
    "sgi_rgb": _sgi(16, 3),
    "jpeg_2000_grey": _jpeg_2000(12, 1),
    "jpeg_2000_rgb": _jpeg_2000(16, 3),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_8_bits_a_channel_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(SHALLOW[name])
    assert read_image(tmp_path / "a", 3, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_a_channel_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DEEP[name])
    with pytest.raises(DataError, match=r"a: pixels of more than 8 bits"):
        read_image(tmp_path / "a", 3, 8)


# -------------------------------------------------------------------------------------------------------- what is an image


def test_the_images_of_a_folder(tmp_path: Path) -> None:
    """All files whose format is read, and no others, sorted by folder; hidden files are left out."""
    images = [
        "B.JPG",
        "a.avif",
        "a.gif",
        "a.jfif",
        "a.jp2",
        "a.mpo",
        "a.png",
        "a.qoi",
        "a.tga",
        "a.webp",
        "more/z.png",
        "n/a.bmp",
    ]
    others = ["Thumbs.db", "a", "a.eps", "a.h5", "a.mp4", "a.mpg", "a.pdf", "a.ps", "a.txt", "a.wmf", "desktop.ini"]
    hidden = [".a.png", "._a.png", ".DS_Store", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "lost+found/a.png", "n/.b/a.png"]
    for name in (*images, *others, *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(".")
    found, passed_over = find_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == images
    assert [str(path.relative_to(tmp_path)) for path in passed_over] == others
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".avif", ".webp", ".tga", ".jp2", ".qoi", ".ico", ".pcx", ".dds", ".ppm"])
def test_what_counts_as_an_image_can_be_read(suffix: str, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / f"a{suffix}")
    (path,), _ = find_images(tmp_path)
    assert read_image(path, 3, 20).shape == (3, 20, 20)
