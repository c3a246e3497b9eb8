"""``alexnet-triton export``: files for other programs, written only if they give the network's own logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from alexnet_triton.cli import export as command
from alexnet_triton.data.dataset import Normalization
from alexnet_triton.models import reference_alexnet, reference_lenet
from alexnet_triton.training.checkpoint import Checkpoint, save_checkpoint

from ..command import run_here

CLASSES = ["[red]", "grün"]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, nn.Sequential]:
    """The folder of a run of LeNet on colour images, and the network of its best.pt; checkpoint.pt holds other weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(1)
    best, last = (reference_lenet(2, 3) for _ in range(2))
    for name, net in (("best.pt", best), ("checkpoint.pt", last)):
        save_checkpoint(folder / name, Checkpoint("lenet", CLASSES, [], net.state_dict(), channels=3, size=28))
    return folder, best.eval().requires_grad_(False)


def _images(count: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(2)).to(dtype)


def _check_metadata(found: dict[str, str], dtype: str) -> None:
    assert json.loads(found["classes"]) == CLASSES
    assert [found[key] for key in ("model", "channels", "size", "input_size", "dtype")] == ["lenet", "3", "28", "28", dtype]
    assert found["preprocessing"] == "red, green and blue in [0, 1]; the shorter side made 28, the middle cut out"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnx(run: tuple[Path, nn.Sequential], dtype: str) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    folder, net = run
    path = folder / ("best.onnx" if dtype == "float32" else "best-float16.onnx")
    result = run_here("export", str(folder), "--format", "onnx", "--dtype", dtype)
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"reading the network from {folder / 'best.pt'}\n"
    assert result.stdout == f"{path}, opset 18: images (N, 3, 28, 28), {dtype}; read back, it gives the network's logits\n"
    model = onnx.load(path)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert [each.name for each in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    _check_metadata({each.key: each.value for each in model.metadata_props}, dtype)
    for count in (1, 5):
        images = _images(count, getattr(torch, dtype))
        (logits,) = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits).float(), net(images.float()), rtol=0, atol=1e-5 if dtype == "float32" else 1e-2
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors(run: tuple[Path, nn.Sequential], dtype: str) -> None:
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    folder, net = run
    out = folder / "weights.safetensors"
    result = run_here("export", str(folder / "best.pt"), "--format", "safetensors", "--dtype", dtype, "--out", str(out))
    assert (result.returncode, result.stderr) == (0, "")
    with safe_open(out, "pt") as file:
        _check_metadata(file.metadata(), dtype)
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    expected = net.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value.to(getattr(torch, dtype))) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pt2_loads_without_this_package(run: tuple[Path, nn.Sequential], dtype: str, tmp_path: Path) -> None:
    folder, net = run
    out = tmp_path / "net.pt2"
    result = run_here("export", str(folder), "--format", "pt2", "--dtype", dtype, "--out", str(out))
    assert result.returncode == 0, result.stderr
    images = {count: _images(count, getattr(torch, dtype)) for count in (1, 5)}
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['alexnet_triton'] = sys.modules['kernels'] = None\n"
        "files = {'alexnet_triton.json': ''}\n"
        "net = torch.export.load('net.pt2', extra_files=files).module()\n"
        "logits = {n: net(images) for n, images in torch.load('images.pt').items()}\n"
        "torch.save((logits, files), 'logits.pt')\n"
    )
    alone = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=_environment()
    )
    assert alone.returncode == 0, alone.stderr
    logits, files = torch.load(tmp_path / "logits.pt")
    _check_metadata(json.loads(files["alexnet_triton.json"]), dtype)
    net.to(getattr(torch, dtype))
    for count, each in images.items():
        assert torch.equal(logits[count], net(each))


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.mark.slow
def test_alexnet(tmp_path: Path) -> None:
    """The metadata tell a reader that the training images are smaller than the network's input."""
    net = reference_alexnet()
    save_checkpoint(tmp_path / "a.pt", Checkpoint("alexnet", [str(i) for i in range(10)], [], net.state_dict()))
    result = run_here("export", str(tmp_path / "a.pt"), "--format", "pt2")
    assert result.returncode == 0, result.stderr
    files = {"alexnet_triton.json": ""}
    loaded = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    images = torch.rand(3, 1, 224, 224)
    torch.testing.assert_close(loaded(images), net.eval()(images))
    metadata = json.loads(files["alexnet_triton.json"])
    assert (metadata["size"], metadata["input_size"]) == ("28", "224")
    assert metadata["preprocessing"].endswith("the middle cut out, resized bilinearly to 224 x 224 (align_corners=False)")


def test_a_reader_is_told_of_patches() -> None:
    """The metadata say that the images are larger than the network's input, which is cut from their middle."""
    found = command.metadata_of(Checkpoint("alexnet", ["a", "b"], [], {}, channels=3, size=256), torch.float32)
    assert (found["size"], found["input_size"]) == ("256", "224")
    assert found["preprocessing"].endswith("; the shorter side made 256, the 224 x 224 in the middle cut out")


def test_what_is_missing_is_named(run: tuple[Path, nn.Sequential], monkeypatch: pytest.MonkeyPatch) -> None:
    for package, kind in (("onnxscript", "onnx"), ("safetensors", "safetensors")):
        monkeypatch.setitem(sys.modules, package, None)
        result = run_here("export", str(run[0] / "best.pt"), "--format", kind)
        expected = f"alexnet-triton: --format {kind} needs {package}: pip install 'alexnet-triton[export]'\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)
    assert {path.name for path in run[0].iterdir()} == {"best.pt", "checkpoint.pt"}


def test_a_file_with_other_logits_is_not_written(run: tuple[Path, nn.Sequential], monkeypatch: pytest.MonkeyPatch) -> None:
    """The existing file is kept."""
    out = run[0] / "best.pt2"
    out.write_bytes(b"before")
    kind = command._KINDS[command.Format.pt2]
    for wrong in (lambda logits: logits * 1.001, lambda logits: logits * torch.nan):

        def logits(*arguments: object, wrong=wrong) -> Tensor:
            return wrong(kind.logits(*arguments))

        monkeypatch.setitem(command._KINDS, command.Format.pt2, command._Kind((), kind.content, logits))
        result = run_here("export", str(run[0] / "best.pt"), "--format", "pt2")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"alexnet-triton: {out}: not written: its logits are off by ")
        assert result.stderr.count("\n") == 1
        assert out.read_bytes() == b"before"
        assert len(list(run[0].iterdir())) == 3


def test_what_cannot_be_asked_for(run: tuple[Path, nn.Sequential], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder = run[0]
    half = run_here("export", str(folder / "best.pt"), "--format", "onnx", "--dtype", "bfloat16")
    assert (half.returncode, half.stderr.count("\n")) == (1, 1)
    assert "no bfloat16 convolution in opset 18" in half.stderr
    named = run_here("export", str(folder), "--format", "pt2", "--out", str(folder / "best.pt"))
    assert named.returncode == 2
    assert "must end in .pt2" in named.stderr
    (folder / "best.pt").rename(folder / "odd.pt2")
    assert "not be the checkpoint" in run_here("export", str(folder / "odd.pt2"), "--format", "pt2").stderr
    nowhere = run_here("export", str(folder), "--format", "pt2", "--out", str(folder / "checkpoint.pt" / "a.pt2"))
    assert nowhere.returncode == 1
    assert "cannot be written" in nowhere.stderr
    empty = run_here("export", str(tmp_path), "--format", "pt2")
    assert empty.stderr == f"alexnet-triton: {tmp_path}: not the folder of a run: it has neither best.pt nor checkpoint.pt\n"
    assert {path.name for path in folder.iterdir()} == {"odd.pt2", "checkpoint.pt"}


def test_a_normalized_runs_metadata_say_by_what(run: tuple[Path, nn.Sequential]) -> None:
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    folder, net = run
    by = Normalization((0.5, 0.25, 0.125), (0.5, 1.0, 2.0))
    normalized = Checkpoint("lenet", CLASSES, [], net.state_dict(), channels=3, size=28, normalization=by)
    save_checkpoint(folder / "best.pt", normalized)
    result = run_here("export", str(folder / "best.pt"), "--format", "safetensors")
    assert result.returncode == 0, result.stderr
    with safe_open(folder / "best.safetensors", "pt") as file:
        found = file.metadata()
    assert (json.loads(found["mean"]), json.loads(found["std"])) == (list(by.mean), list(by.std))
    assert found["preprocessing"].endswith(
        "cut out; then the mean [0.5, 0.25, 0.125] subtracted from each channel, and divided by [0.5, 1.0, 2.0]"
    )


def test_a_normalized_run_is_evaluated_and_predicts_normalized(run: tuple[Path, nn.Sequential], tmp_path: Path) -> None:
    """A second network's first layer undoes the normalization: both checkpoints give the same results."""
    _, net = run
    by = Normalization((0.5, 0.25, 0.125), (0.5, 1.0, 2.0))
    mean, std = torch.tensor(by.mean), torch.tensor(by.std)
    inverse = {key: value.clone() for key, value in net.state_dict().items()}
    # The zero padding is not normalized, so set the weights that meet padding to zero.
    inverse["0.weight"][:, :, :2] = inverse["0.weight"][:, :, 3:] = 0
    inverse["0.weight"][:, :, :, :2] = inverse["0.weight"][:, :, :, 3:] = 0
    plain = {key: value.clone() for key, value in inverse.items()}
    inverse["0.weight"] = plain["0.weight"] * std[None, :, None, None]
    inverse["0.bias"] = plain["0.bias"] + (plain["0.weight"] * mean[None, :, None, None]).sum((1, 2, 3))
    data = tmp_path / "data"
    for name in CLASSES:
        for part in ("train", "test"):
            (data / part / name).mkdir(parents=True)
            pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(data / part / name / "a.png")
    results = []
    for number, (weights, normalization) in enumerate(((plain, None), (inverse, by))):
        path = tmp_path / f"{number}.pt"
        save_checkpoint(path, Checkpoint("lenet", CLASSES, [], weights, channels=3, size=28, normalization=normalization))
        evaluated = run_here("evaluate", str(path), "--data", str(data), "--device", "cpu", "--backend", "torch")
        image = str(data / "test" / CLASSES[0] / "a.png")
        predicted = run_here("predict", str(path), image, "--json", "--device", "cpu", "--backend", "torch")
        assert evaluated.returncode == predicted.returncode == 0, evaluated.stderr + predicted.stderr
        loss = float(evaluated.stdout.split("test loss")[1])
        results.append((loss, *json.loads(predicted.stdout)[image].values()))
    assert results[0] == pytest.approx(results[1], abs=2e-3)
    assert len(set(results[0])) == len(results[0])
