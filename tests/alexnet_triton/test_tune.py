"""The tables of tuned configurations: what may be in one, who reads it, what a candidate must fit."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from alexnet_triton import tune
from alexnet_triton.cli import app
from kernels import config

from ..conftest import DEVICE

H100 = "h100-80gb-hbm3"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of tables, read as on the H100 of the committed one."""
    monkeypatch.setattr(config, "TABLES", tmp_path)
    monkeypatch.setattr(config, "INTERPRETED", False)
    monkeypatch.setattr(config, "capability", lambda device: 90)
    config.read_table.cache_clear()
    yield tmp_path
    config.read_table.cache_clear()


def _write(folder: Path, configs: object) -> None:
    (folder / f"{H100}.json").write_text(json.dumps({"configs": configs}))


def test_a_table_overrides_the_rule_and_only_what_it_names(tables: Path) -> None:
    cpu, shape = torch.device("cpu"), (128, 12, 12, 256, 384, 3, 3)
    rule = config.conv2d_images_config(cpu, "conv2d_fprop", *shape)
    assert rule["num_stages"] != 2
    _write(tables, {config.conv2d_key("conv2d_fprop", *shape): {"num_stages": 2, "of another kernel": 7}})
    config.read_table.cache_clear()
    assert config.conv2d_images_config(cpu, "conv2d_fprop", *shape) == rule | {"num_stages": 2}
    with config.untuned():
        assert config.conv2d_images_config(cpu, "conv2d_fprop", *shape) == rule
    with config.override(num_stages=5):
        assert config.conv2d_images_config(cpu, "conv2d_fprop", *shape)["num_stages"] == 5
    other = (64, *shape[1:])
    assert config.conv2d_images_config(cpu, "conv2d_fprop", *other)["num_stages"] == rule["num_stages"]


@pytest.mark.parametrize("content", ["{", "[]", '{"configs": {"a": {"b": "c"}}}', '{"configs": 3}', "{}"])
def test_a_broken_table_is_named(content: str, tables: Path) -> None:
    (tables / f"{H100}.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{H100}\.json: not a table of tuned configurations"):
        config.tuned(torch.device("cpu"), "anything")


def test_every_committed_entry_is_of_a_job_and_a_candidate_of_it() -> None:
    """What is read at each launch can only be what was verified and measured."""
    table = json.loads((config.TABLES / f"{H100}.json").read_text())
    known = {job.key: job for job in tune.jobs((128,))}
    measured = {key for key, job in known.items() if job.layer != tune.POOLED}  # the pool's kernels are younger than the table
    assert measured <= set(table["configs"]) == set(table["measured"]) <= set(known)
    for key, values in table["configs"].items():
        assert values in known[key].candidates()
        assert table["measured"][key]["wrong"] == 0


@pytest.mark.parametrize("batch", [1, 7, 128, 1024])
def test_every_pass_has_candidates(batch: int) -> None:
    for job in tune.jobs((batch,)):
        few_images = batch < 64 and "conv" in job.layer and job.pass_ == "wgrad"
        assert few_images or len(job.candidates()) > 3, job


def _write_entries(path: Path, batches: list[int]) -> None:
    with mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"):
        for batch in batches:
            job = tune.Job("conv3", "fprop", batch)
            tune.write_table([tune.Tuned(job, 2.0, 1.0, 3.0, {"BLOCK_M": batch}, [], [(1.0, {})])], torch.bfloat16, path)


def test_entries_of_another_run_stay(tmp_path: Path) -> None:
    path = tmp_path / "configs" / "gpu.json"
    _write_entries(path, [128, 64])
    content = json.loads(path.read_text())
    assert [content["configs"][tune.Job("conv3", "fprop", batch).key] for batch in (128, 64)] == [
        {"BLOCK_M": 128},
        {"BLOCK_M": 64},
    ]
    assert list(path.parent.iterdir()) == [path]


def test_processes_that_tune_at_the_same_time_keep_each_others_entries(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write_entries, args=(path, list(range(i, 61, 3)))) for i in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    configs = json.loads(path.read_text())["configs"]
    assert configs == {tune.Job("conv3", "fprop", batch).key: {"BLOCK_M": batch} for batch in range(1, 61)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_the_command_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1
    assert "tune needs a CUDA GPU" in result.output
    assert "no layer 'conv9'" in CliRunner().invoke(app, ["tune", "--layer", "conv9"]).output


def test_the_first_layer_with_its_pool_as_one_kernel_and_as_two(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the job runs, on small tensors: the reference's result, by the kernels that it is to choose between."""
    monkeypatch.setitem(tune.LAYERS, tune.POOLED, (1, 39, 16, 11, 4, 1))
    job = tune.Job(tune.POOLED, "fprop", 2)
    # Integers, of which bfloat16 holds every sum: so both find the same maxima.
    shapes = ((2, 1, 39, 39), (16, 1, 11, 11), (16,), (2, 16, 3, 3))
    tensors = tuple(torch.randint(-1, 2, shape).bfloat16().to(DEVICE) for shape in shapes)
    exact = tune._reference(job, tuple(t.float() for t in tensors))
    for fused in (0, 1):
        launches.clear()
        with config.override(IMAGES_WGRAD=1, FUSED=fused):
            ours = tune._run(job, tensors)
        assert ("_conv2d_stem_pool_kernel" in launches) == bool(fused)
        assert torch.equal(ours.float(), exact)


def test_two_kernels_in_place_of_one_are_timed_as_their_tables_have_them(tables: Path) -> None:
    _write(tables, {"a shape": {"num_stages": 2}})
    config.read_table.cache_clear()
    for candidate, values in (({"FUSED": 0}, {"num_stages": 2}), ({"FUSED": 1}, {}), ({}, {})):
        with tune._configured(candidate):
            assert config.tuned(torch.device("cpu"), "a shape") == values
