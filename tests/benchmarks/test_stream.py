"""The benchmark of streams on tiny data: each part runs and records its results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import stream


def _run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, dict[str, object]]:
    path = tmp_path / "results" / "stream.json"
    monkeypatch.setattr("sys.argv", ["stream", "--dry", "--backend", "torch", "--json", str(path), *options])
    threads = torch.get_num_threads()
    try:
        stream.main()
    finally:
        torch.set_num_threads(threads)
    content: dict[str, dict[str, object]] = json.loads(path.read_text())
    return content


@pytest.mark.slow
def test_every_way_is_timed_with_every_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _run(tmp_path, monkeypatch)["speed"]
    assert [(row["workers"], row["way"]) for row in rows] == [(n, way) for n in (0, 1, 2) for way in stream.WAYS]  # type: ignore[index]
    assert all(row["ours"] == 1 for row in rows if row["way"] == "ours")  # type: ignore[index]
    assert "by arithmetic: 20,000 images/s take" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_listing_and_what_a_gpu_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _run(tmp_path, monkeypatch, "--memory", "--listing", "--cuda")
    assert found["memory"]["images"] == 64
    assert found["memory"]["most_bytes"] >= found["memory"]["last_bytes"] > 1e6  # type: ignore[operator]
    assert list(found["listing"]) == ["40"]
    assert list(found["cuda"]) == ["gpu_decoder", "feeds", "training"]
    assert list(found["cuda"]["training"]) == ["in memory", "streamed"]  # type: ignore[call-overload]


def test_all_ways_read_the_same_images() -> None:
    """Transforms of a tensor give exactly our pixels; transforms of Pillow's image differ by rounding."""
    with stream.made_folder(11, stream.TINY) as folder:
        split = stream._streamed(folder, 0)
        for index in range(4):
            image = Image.open(split.source.name(index)).convert("RGB")
            assert torch.equal(stream._ON_TENSOR(image), split.image(index))
            assert (stream._ON_IMAGE(image).int() - split.image(index).int()).abs().max() <= 2


def test_files_are_jpegs_that_differ() -> None:
    files = stream.jpegs(2, 64)
    assert files[0] != files[1]
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(64, 64)] * 2
