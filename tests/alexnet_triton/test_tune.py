"""The tables of tuned configurations: their contents, how launches read them, and the limits that candidates must fit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from alexnet_triton import tune
from alexnet_triton.cli.app import app
from kernels import configs
from kernels.convolution import rules, taps_rules
from kernels.runtime import launch

from ..configurations import pretend_gpu
from ..conftest import DEVICE
from ..permissions import permissions_hold

H100 = "h100-80gb-hbm3"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of tables, read as on the H100 of the committed table."""
    monkeypatch.setattr(configs.tables, "TABLES", tmp_path)
    monkeypatch.setattr(configs.tables, "INTERPRETED", False)
    monkeypatch.setattr(rules, "INTERPRETED", False)
    monkeypatch.setattr(configs.tables, "capability", lambda device: 90)
    monkeypatch.setattr(rules, "capability", lambda device: 90)
    configs.tables.read_table.cache_clear()
    yield tmp_path
    configs.tables.read_table.cache_clear()


def _write(folder: Path, configs: object) -> None:
    (folder / f"{H100}.json").write_text(json.dumps({"configs": configs}))


def test_a_table_overrides_the_rule_and_only_what_it_names(tables: Path) -> None:
    cpu, shape = torch.device("cpu"), (128, 12, 12, 256, 384, 3, 3)
    rule = rules.conv2d_images_config(cpu, "conv2d_fprop", *shape)
    assert rule["num_stages"] != 2
    _write(tables, {rules.conv2d_key("conv2d_fprop", *shape): {"num_stages": 2, "FUSED": 1}})
    configs.tables.read_table.cache_clear()
    assert rules.conv2d_images_config(cpu, "conv2d_fprop", *shape) == rule | {"num_stages": 2}
    with configs.tables.untuned():
        assert rules.conv2d_images_config(cpu, "conv2d_fprop", *shape) == rule
    with configs.tables.override(num_stages=5):
        assert rules.conv2d_images_config(cpu, "conv2d_fprop", *shape)["num_stages"] == 5
    other = (64, *shape[1:])
    assert rules.conv2d_images_config(cpu, "conv2d_fprop", *other)["num_stages"] == rule["num_stages"]


def _entry(name: str, value: object, key: str = "a") -> str:
    return json.dumps({"configs": {key: {name: value}}, "measured": {}})


BROKEN = {
    "cut_short": ("{", "Expecting"),
    "no_dict": ("[]", "it has no 'configs'"),
    "empty": ("{}", "it has no 'configs'"),
    "number": ('{"configs": 3}', "it has no 'configs'"),
    "entry": ('{"configs": {"a": [1]}}', "it has no 'configs'"),
    "deep": ("[" * 100_000, "recursion"),
    "not_text": (b"\xff\xfe\0", "codec can't decode"),
    "long_number": ('{"configs": {"a": {"SPLIT": 1' + "0" * 5000 + "}}}", "integer string conversion"),
    "unknown": (_entry("BLOCK", 64), r"no kernel has 'BLOCK' = 64 \('a'\)"),
    "text": (_entry("num_warps", "4"), "no kernel has 'num_warps' = 4"),
    "code": (_entry("num_warps", "__import__('os').mkdir('ran')"), "no kernel has 'num_warps' = __import__"),
    "fraction": (_entry("num_warps", 4.0), r"no kernel has 'num_warps' = 4\.0"),
    "true": (_entry("SPLIT", True), "no kernel has 'SPLIT' = True"),
    "list": (_entry("SPLIT", [1]), r"no kernel has 'SPLIT' = \[1\]"),
    "nan": ('{"configs": {"a": {"SPLIT": NaN}}}', "no kernel has 'SPLIT' = nan"),
    "no_power_of_2": (_entry("BLOCK_M", 96), "no kernel has 'BLOCK_M' = 96"),
    "too_small": (_entry("BLOCK_N", 8), "no kernel has 'BLOCK_N' = 8"),
    "negative": (_entry("SPLIT", -1), "no kernel has 'SPLIT' = -1"),
    "zero": (_entry("SPLIT", 0), "no kernel has 'SPLIT' = 0"),
    "rows": (_entry("ROWS", 3, "linear_narrow_fprop m128 n10 k84"), "no kernel has 'ROWS' = 3"),
    "huge": (_entry("num_warps", 2**40), "no kernel has 'num_warps' = 1099511627776"),
    "large": (" " * (2**24 + 1), "larger than 16 MB"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_or_hostile_table_is_named_and_nothing_of_it_is_used(fault: str, tables: Path) -> None:
    content, message = BROKEN[fault]
    path = tables / f"{H100}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for use in (lambda: configs.tables.tuned(torch.device("cpu"), "a"), lambda: tune.tune([], "bfloat16", path, print)):
        with pytest.raises(ValueError, match=rf"{H100}\.json: not a table of tuned configurations: .*{message}") as error:
            use()
        assert len(str(error.value)) < 400
    assert not Path("ran").exists()


def test_tuning_leaves_a_file_that_is_no_table_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "package.json"
    path.write_text(_entry("SPLIT", 2).replace(', "measured": {}', ""))
    before = path.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = CliRunner().invoke(app, ["tune", "--out", str(path)])
    assert (result.exit_code, path.read_bytes()) == (1, before)
    line = f"alexnet-triton: {path}: not a table of tuned configurations: it does not say what was measured\n"
    assert result.output == line


@pytest.mark.parametrize("where", ["closed/gpu.json", "closed/new/gpu.json", "file/gpu.json", "folder"])
def test_a_table_that_cannot_be_written_is_told_before_anything_is_tuned(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("minutes of work")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "compile_all", never)
    (tmp_path / "closed").mkdir(0o500)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with permissions_hold():
        result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / where)])
    assert result.exit_code == 1
    assert result.output.startswith(f"alexnet-triton: {tmp_path / where}: cannot be written")
    assert result.output.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpus_name_leads_to_no_other_folder() -> None:
    assert Path(configs.tables.gpu_slug("NVIDIA ../../A/B 80GB")).name == "..-..-a-b-80gb"


def test_every_committed_entry_is_of_a_job_and_a_candidate_of_it() -> None:
    """A launch can read only configurations that were verified and measured."""
    table = json.loads((configs.tables.TABLES / f"{H100}.json").read_text())
    known = {job.key: job for job in tune.jobs((128,))}
    # The kernels with the pool and those for few outputs were written after the table.
    measured = {key for key, job in known.items() if job.layer != tune.POOLED and job.pass_ not in tune.NARROW_PASSES}
    assert measured <= set(table["configs"]) == set(table["measured"]) <= set(known)
    for key, values in table["configs"].items():
        # Entries measured before equal shares and rows of taps existed do not name these options.
        older = {("PROGRAMS", 0), ("CUT", 0), ("STREAM_K", 0), ("TAPS", 0)}
        candidates = [c if c.get("PROGRAMS") else c.items() - older for c in known[key].candidates()]
        assert dict(values) in [dict(c) for c in candidates]
        assert configs.tables.read_table(H100)[key] == values
        assert table["measured"][key]["wrong"] == 0


def test_a_candidate_says_which_form_it_is_of(tables: Path) -> None:
    """A candidate names its kernel form: otherwise the rule could choose equal shares or rows of taps for any tiles."""
    device, dtype = torch.device("cpu"), torch.bfloat16
    for job in tune.jobs((128,), ("conv2", "conv3", "conv4", "conv5")):
        c, size, k, r, *_ = tune.LAYERS[job.layer]
        sizes = (128, size, size, c, k, r, r)
        for candidate in job.candidates():
            with pretend_gpu(90, interpreted=False), configs.tables.untuned(), configs.tables.override(**candidate):
                if job.pass_ == "wgrad":
                    assert rules.conv2d_wgrad_streams(device, *sizes, dtype=dtype) == bool(candidate["STREAM_K"])
                elif job.pass_ == "fprop":
                    assert taps_rules.conv2d_by_taps(device, *sizes, channels_last=True, dtype=dtype) == bool(candidate["TAPS"])


@pytest.mark.parametrize("precision", tune.PRECISIONS)
@pytest.mark.parametrize("batch", [1, 7, 128, 1024])
def test_every_pass_has_candidates(batch: int, precision: str) -> None:
    dtype, linear_tf32 = tune.PRECISIONS[precision]
    with tune.float32_switches(linear_tf32):
        for job in tune.jobs((batch,)):
            few_images = batch < 64 and "conv" in job.layer and job.pass_ == "wgrad"
            candidates = job.candidates(dtype)
            assert few_images or len(candidates) > 3, job
            configs.tables.check_table({"configs": {str(i): candidate for i, candidate in enumerate(candidates)}})


def test_float32_follows_pytorchs_default_switches_and_tf32_is_for_both() -> None:
    def switches() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = switches()
    for precision, expected in (("float32", (True, False)), ("tf32", (True, True))):
        with contextlib.suppress(KeyError), tune.float32_switches(tune.PRECISIONS[precision][1]):
            assert switches() == expected
            raise KeyError
        assert switches() == before


@contextlib.contextmanager
def _on_a_gpu(precision: str) -> Iterator[torch.dtype]:
    """Pretend to be on an H100, with the tuner's precision switches; yields the dtype. No kernel is run."""
    dtype, linear_tf32 = tune.PRECISIONS[precision]
    with pretend_gpu(90, interpreted=False), tune.float32_switches(linear_tf32):
        yield dtype


def _empty(job: tune.Job, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tune.Maxima | None]:
    """Uninitialised tensors of the job, and maxima if the job needs them."""
    tensors = tuple(tune.channels_last(torch.empty(size, dtype=dtype)) for size in tune.sizes(job.layer, job.batch))
    unread = torch.empty(0)
    maxima = tune.Maxima(unread, unread, torch.empty_like(tensors[3], dtype=torch.uint8))
    return tensors, maxima if job.needs_maxima else None


def _recorded(prepare: Callable[..., Callable[[], Tensor]], *arguments: object) -> list[dict]:
    """Grid and arguments of each launch of the function that ``prepare`` returns."""
    found: list[dict] = []
    with launch.record_launches(lambda kernel, grid, launched: found.append({"grid": grid, **launched})):
        prepare(*arguments)()
    return found


PRECISE_JOBS = [(precision, job) for precision in ("float32", "tf32") for job in tune.jobs((128,), dtype=torch.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "job"), PRECISE_JOBS, ids=lambda v: v if isinstance(v, str) else f"{v.layer}-{v.pass_}")
def test_what_tuning_of_float32_writes_is_what_a_launch_reads(precision: str, job: tune.Job, tables: Path) -> None:
    """The first, a middle and the last candidate of each job are written as its entry; a launch has each of the values."""
    with _on_a_gpu(precision) as dtype:
        candidates = job.candidates(dtype)
        for candidate in (candidates[0], candidates[len(candidates) // 2], candidates[-1]):
            _write(tables, {job.table_key(dtype): candidate})
            configs.tables.forget_tables()
            found = _recorded(tune.operation, job, *_empty(job, dtype))
            wanted = dict(candidate)
            boxes = wanted.pop("IMAGES", None) == 0
            programs, cut = wanted.pop("PROGRAMS", 0), wanted.pop("CUT", 0)
            streams, taps = wanted.pop("STREAM_K", 0), wanted.pop("TAPS", 0)
            assert not taps  # AlexNet's channel counts are multiples of a float32 chunk
            narrow = wanted.pop("NARROW", 0)
            if streams:  # a convolution's weight gradient in equal shares; the last share may be empty
                found = [arguments for arguments in found if "STEPS" in arguments]
                assert all(0.95 * programs < arguments["grid"][0] <= programs for arguments in found)
            elif programs:  # a linear layer in equal shares
                wanted |= {"grid": (programs,), "CUT": cut}
                del wanted["SPLIT"]
            # A linear layer's kernel takes the number of parts (SPLIT) from the grid.
            found = [{"SPLIT": arguments["grid"][-1], **arguments} for arguments in found]
            assert any(wanted.items() <= arguments.items() for arguments in found), candidate
            assert boxes == any("NB" in arguments for arguments in found)
            assert narrow == any("stride_wn" in arguments for arguments in found)
    configs.tables.forget_tables()


_COMPILE = """
import sys, torch
from alexnet_triton import tune
from benchmarks.offline import SHARED_BYTES, compile_launches
from tests.alexnet_triton.test_tune import _empty

dtype = getattr(torch, sys.argv[1])
for job in tune.jobs((128,), tuple(sys.argv[2:]), dtype):
    candidates = job.candidates(dtype)
    for candidate in candidates[:: len(candidates) // 2]:
        def step():
            run = tune.operation(job, *_empty(job, dtype))
            with tune._configured(candidate):
                run()
        for compiled in compile_launches(step, 90):
            fits = not (compiled.stack_bytes or compiled.local_bytes) and compiled.shared_bytes <= SHARED_BYTES["sm_90"]
            assert fits and not compiled.register_operands, (job, candidate, compiled)
    print(job.layer, job.pass_, len(candidates))
"""


def _compile_candidates(dtype: str, layers: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, "-c", _COMPILE, dtype, *layers], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(tune.jobs((128,), layers, getattr(torch, dtype)))


@pytest.mark.slow
def test_candidates_of_float32_compile_without_spills() -> None:
    """A few candidates of each convolution; all of them have been compiled once."""
    _compile_candidates("float32", tuple(tune.LAYERS))


@pytest.mark.slow
def test_candidates_of_the_first_layer_with_its_pool_compile_without_spills() -> None:
    """The same check for the first layer with its pool, in bfloat16."""
    _compile_candidates("bfloat16", (tune.POOLED,))


#: Small layers in place of AlexNet's: channels, image size, filters, filter size, stride, padding.
SMALL = {
    "conv1": (1, 27, 96, 11, 4, 1),
    "conv2": (96, 4, 64, 3, 1, 1),
    "conv4": (32, 4, 96, 3, 1, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", tune.jobs((64,), tuple(SMALL), torch.float32), ids=lambda job: f"{job.layer}-{job.pass_}")
def test_values_of_float32_candidates(job: tune.Job, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last candidate of each convolution pass equal PyTorch's results bit for bit, on integers."""
    for layer, sizes in SMALL.items():
        monkeypatch.setitem(tune.LAYERS, layer, sizes)
    candidates = job.candidates(torch.float32)
    generator = torch.Generator().manual_seed(0)
    shapes = tune.sizes(job.layer, job.batch)
    tensors = tuple(tune.channels_last(torch.randint(-2, 3, s, generator=generator).float().to(DEVICE)) for s in shapes)
    exact = tune._reference(job, tensors)
    assert exact.count_nonzero() > 0.1 * exact.numel()
    with tune.float32_switches(linear_tf32=False):
        for candidate in (candidates[0], candidates[-1]):
            launches.clear()
            run = tune.operation(job, tensors)
            with tune._configured(candidate):
                assert torch.equal(run(), exact), candidate
            assert any(kernel in name for name in launches for kernel in ("_rows_", "_images_", "_box_"))


BATCHES = range(1, 61)


def _at_the_same_time(run: Callable[[int], None], processes: int) -> list[int | None]:
    """Exit codes of ``run(0)``, ``run(1)``, ..., each in its own process; all start together once every process is ready."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(processes)

    def start(number: int) -> None:
        ready.wait(60)
        run(number)

    started = [fork.Process(target=start, args=(number,)) for number in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def _write_entries(path: Path, batches: Sequence[int]) -> None:
    with mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"):
        for batch in batches:
            job = tune.Job("conv3", "fprop", batch)
            tune.write_table([tune.Tuned(job, 2.0, 1.0, 3.0, {"SPLIT": batch}, [], [(1.0, {})])], torch.bfloat16, path)


def test_entries_of_another_run_stay(tmp_path: Path) -> None:
    path = tmp_path / "configs" / "gpu.json"
    _write_entries(path, [128, 64])
    content = json.loads(path.read_text())
    assert [content["configs"][tune.Job("conv3", "fprop", batch).key] for batch in (128, 64)] == [
        {"SPLIT": 128},
        {"SPLIT": 64},
    ]
    assert list(path.parent.iterdir()) == [path]


def test_processes_that_tune_at_the_same_time_keep_each_others_entries(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert _at_the_same_time(lambda i: _write_entries(path, BATCHES[i::3]), 3) == [0, 0, 0]
    configs = json.loads(path.read_text())["configs"]
    assert configs == {tune.Job("conv3", "fprop", batch).key: {"SPLIT": batch} for batch in BATCHES}


def test_without_their_lock_they_would_lose_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes read the file before either writes: one entry is lost, or one process fails on the other's file."""
    path = tmp_path / "gpu.json"
    both_read = multiprocessing.get_context("fork").Barrier(2)
    read = tune._table_so_far

    def read_and_wait(path: Path) -> dict:
        content = read(path)
        both_read.wait(60)
        return content

    monkeypatch.setattr(tune, "_table_so_far", read_and_wait)
    monkeypatch.setattr(tune, "held", lambda *_, **__: contextlib.nullcontext())
    assert 0 in _at_the_same_time(lambda i: _write_entries(path, [i + 1]), 2)
    assert len(json.loads(path.read_text())["configs"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would tune on this GPU")
def test_the_command_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["tune"])
    assert result.exit_code == 1
    assert "tune needs a CUDA GPU" in result.output
    assert "no layer 'conv9'" in CliRunner().invoke(app, ["tune", "--layer", "conv9"]).output


@pytest.mark.parametrize("dtype", ["float32", "tf32"])
def test_the_first_layer_with_its_pool_is_refused_in_float32(dtype: str) -> None:
    result = CliRunner().invoke(app, ["tune", "--layer", "fc1", "--layer", tune.POOLED, "--dtype", dtype])
    assert result.exit_code == 2
    assert "conv1_pool has no kernels of its own in float32" in " ".join(result.output.replace("│", "").split())


@pytest.mark.parametrize("pass_", ["fprop", "wgrad"])
def test_the_first_layer_with_its_pool_as_one_kernel_and_as_two(
    pass_: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small tensors, one fused kernel and two kernels both give the reference's result; the job chooses between them."""
    monkeypatch.setitem(tune.LAYERS, tune.POOLED, (1, 39, 16, 11, 4, 1))
    job = tune.Job(tune.POOLED, pass_, 2)
    # Integers whose sums bfloat16 represents exactly, so that both forms find the same maxima.
    shapes = ((2, 1, 39, 39), (16, 1, 11, 11), (16,), (2, 16, 3, 3))
    tensors = tuple(tune.channels_last(torch.randint(-1, 2, shape).bfloat16().to(DEVICE)) for shape in shapes)
    maxima = tune.Maxima.of(job, tensors) if job.needs_maxima else None
    exact = tune._reference(job, tuple(t.float() for t in tensors), maxima)
    kernel = "_conv2d_stem_pool_kernel" if pass_ == "fprop" else "_conv2d_stem_pool_wgrad_kernel"
    for fused in (0, 1):
        launches.clear()
        with configs.tables.override(IMAGES_WGRAD=1, FUSED=fused):
            ours = tune.operation(job, tensors, maxima)()
        assert (kernel in launches) == bool(fused)
        assert ("_max_pool2d_dgrad_kernel" in launches) == (pass_ == "wgrad" and not fused)
        assert torch.equal(ours.float(), exact)


@pytest.mark.parametrize("pass_", tune.NARROW_PASSES)
def test_few_outputs_in_one_launch_and_as_products(pass_: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.LINEAR_LAYERS, "fc3", (37, 10, False))
    job = tune.Job("fc3", pass_, 20)
    tensors = tuple(torch.randint(-2, 3, shape).float().to(DEVICE) for shape in tune.sizes("fc3", 20))
    exact = tune._listed(tune._reference(job, tensors))
    for candidate in ({}, {"NARROW": 0}):
        launches.clear()
        with tune._configured(candidate):
            ours = tune._listed(tune.operation(job, tensors)())
        assert (launches == [f"_linear_{pass_}_kernel"]) == (candidate == {})
        assert len(ours) == len(exact)
        assert all(torch.equal(got, due) for got, due in zip(ours, exact, strict=True))


def test_few_outputs_are_jobs_where_the_rule_takes_them_and_their_products_are_too(launches: list[str]) -> None:
    assert [job.pass_ for job in tune.jobs((128,), ("fc3",))] == ["fprop", *tune.NARROW_PASSES]
    assert [job.pass_ for job in tune.jobs((1024,), ("fc3",))] == ["fprop"]
    with configs.tables.override(BLOCK_K=64):
        tune.operation(tune.Job("fc3", "fprop", 2), tuple(torch.zeros(s).to(DEVICE) for s in tune.sizes("fc3", 2)))()
    assert launches == ["_matmul_kernel"]


def test_a_table_chooses_the_gradient_of_the_first_layer_with_its_pool(tables: Path) -> None:
    """The backward pass runs the form that the table's entry names: one kernel with its tiles, or two kernels."""
    job = tune.Job(tune.POOLED, "wgrad", 128)
    with _on_a_gpu("bfloat16") as dtype:
        for candidate in job.candidates(dtype)[:2]:
            _write(tables, {job.table_key(dtype): candidate})
            configs.tables.forget_tables()
            found = _recorded(tune.operation, job, *_empty(job, dtype))
            fused = [arguments for arguments in found if "position_desc" in arguments]
            assert len(fused) == candidate["FUSED"]
            assert all({"FUSED": 1, **fused[0]}.items() >= candidate.items() for _ in fused)
    configs.tables.forget_tables()


def test_two_kernels_in_place_of_one_are_timed_as_their_tables_have_them(tables: Path) -> None:
    _write(tables, {"a shape": {"num_stages": 2}})
    configs.tables.read_table.cache_clear()
    for candidate, values in (({"FUSED": 0}, {"num_stages": 2}), ({"FUSED": 1}, {}), ({}, {})):
        with tune._configured(candidate):
            assert configs.tables.tuned(torch.device("cpu"), "a shape") == values
