"""The command for a GPU, without one: its stages' options, its records, what it does not begin and what a kill loses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from alexnet_triton import tune
from alexnet_triton.cli.app import app
from alexnet_triton.training.run_folder import held
from benchmarks import gpu, host, kernelbench, render, stale, variant
from benchmarks.experiments import EXPERIMENTS
from benchmarks.gpu import Session, Setting
from benchmarks.gpu_stages import Stage, stages
from kernels.configs import tables

from .. import made_images

SETTING = Setting("c" * 40, None, "NVIDIA Test", torch.__version__, "3.6.0", fake=False)

#: A module that starts a child, works for the given number of seconds and ends with the given status.
WORK = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, "of", os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
child.kill()
print("worked", flush=True)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/work.py").write_text(WORK)
    (tmp_path / "modules/write.py").write_text("import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))


def stage(name: str, seconds: float = 5, sleeps: float = 0, status: int = 0, **more: Any) -> Stage:
    return Stage(name, ("work", str(sleeps), str(status), name), seconds, **more)


def outcomes(session: Session) -> list[tuple[str, str]]:
    return [(r["stage"], r["outcome"]) for r in json.loads(session.state.read_text())["records"]]


def session(tmp_path: Path, setting: Setting = SETTING, seconds: float = 300) -> Session:
    return Session(tmp_path / "out", setting, seconds, lambda line: None)


def ended(pid: int) -> bool:
    """Whether a process ends soon; a zombie has ended."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def child_and_worker(log: Path) -> tuple[int, int]:
    words = log.read_text().splitlines()[0].split()
    return int(words[1]), int(words[3])


def test_a_result_is_recorded_at_once_and_not_made_again(tmp_path: Path) -> None:
    first = session(tmp_path)
    first.work([stage("a"), stage("b")])
    assert outcomes(first) == [("a", "done"), ("b", "done")]
    record = first.records[0]
    assert dataclasses.asdict(SETTING).items() <= record.items()
    assert (record["exit"], record["argv"], record["said"][-1]) == (0, ["work", "0", "0", "a"], "worked")
    assert "worked" in (tmp_path / "out" / record["log"]).read_text()
    second = session(tmp_path)
    second.work([stage("a"), stage("b"), stage("c")])
    assert outcomes(second)[2:] == [("c", "done")]
    second.work([stage("a"), stage("b")], again=["b"])
    assert outcomes(second)[3:] == [("b", "done")]


@pytest.mark.parametrize(
    "change", [{"commit": "d" * 40}, {"changes": "1"}, {"gpu": "NVIDIA Other"}, {"triton": "3.7.0"}], ids=str
)
def test_of_another_commit_or_machine_nothing_is_done(change: dict[str, Any], tmp_path: Path) -> None:
    session(tmp_path).work([stage("a")])
    other = session(tmp_path, dataclasses.replace(SETTING, **change))
    other.work([stage("a")])
    assert outcomes(other) == [("a", "done")] * 2


def test_a_result_whose_file_is_gone_is_made_again(tmp_path: Path) -> None:
    a = stage("a", writes=("x/{gpu}.json",))
    first = session(tmp_path)
    first.work([a])
    assert not first.is_done(a)
    (tmp_path / "out/x/test.json").touch()
    assert first.is_done(a)


def test_a_stage_that_fails_stops_no_other_and_is_tried_once_a_call_after_them(tmp_path: Path) -> None:
    fails, a, b = stage("fails", status=3), stage("a"), stage("b")
    first = session(tmp_path)
    first.work([fails, a])
    assert outcomes(first) == [("fails", "failed"), ("a", "done")]
    assert first.records[0]["exit"] == 3
    text = first.summary([fails, a], {"c": "no data"})
    assert "Open: 2\n  fails: failed (logs/fails.log): worked\n  c: left out, no data" in text
    second = session(tmp_path)
    second.work([fails, a, b])
    assert outcomes(second)[2:] == [("b", "done"), ("fails", "failed")]


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    long, short = stage("long", seconds=100), stage("short", seconds=5)
    small = session(tmp_path, seconds=50)
    small.work([long, short])
    assert outcomes(small) == [("short", "done")]
    assert "Open: 1\n  long: no time, about 100 s" in small.summary([long, short], {})
    nothing = session(tmp_path, seconds=0)
    nothing.work([stage("other")])
    assert outcomes(nothing) == [("short", "done")]


def test_how_long_a_stage_took_is_expected_of_it(tmp_path: Path) -> None:
    a = stage("a", seconds=1000)
    session(tmp_path, seconds=2000).work([a])
    later = session(tmp_path, dataclasses.replace(SETTING, commit="d" * 40), seconds=100)
    assert later.expected(a) == 1.25 * later.records[0]["seconds"] + 5 < 100
    later.work([a])
    assert outcomes(later) == [("a", "done")] * 2


@pytest.mark.slow
def test_a_stage_out_of_time_is_killed_with_its_children(tmp_path: Path) -> None:
    hangs, a = stage("hangs", seconds=4, sleeps=600), stage("a")
    one = session(tmp_path)
    one.work([hangs, a])
    assert outcomes(one) == [("hangs", "out of time"), ("a", "done")]
    assert one.records[0]["exit"] is None
    assert one.records[0]["seconds"] < 100
    assert all(map(ended, child_and_worker(tmp_path / "out/logs/hangs.log")))
    assert one.expected(hangs) == 2 * one.records[0]["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_kill_loses_only_the_stage_that_ran(number: signal.Signals, tmp_path: Path) -> None:
    slow = {"seconds": 100, "sleeps": 600}
    program = f"""
from pathlib import Path
from benchmarks.gpu import Session, Setting, _ended_by_sigterm
from benchmarks.gpu_stages import Stage
todo = [Stage("a", ("work", "0", "0", "a"), 5), Stage("slow", ("work", "600", "0", "slow"), 100)]
with _ended_by_sigterm():
    Session(Path({str(tmp_path / "out")!r}), Setting(**{dataclasses.asdict(SETTING)!r}), 300).work(todo)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(stale.ROOT), os.environ["PYTHONPATH"]))}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=stale.ROOT)
    log = tmp_path / "out/logs/slow.log"
    until = time.monotonic() + 120
    while not (log.is_file() and "\n" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    child, worker = child_and_worker(log)
    process.send_signal(number)
    assert process.wait(60) == (-9 if number == signal.SIGKILL else 128 + number)
    assert ended(worker)  # else it would use the GPU while the next call measures
    if number == signal.SIGTERM:
        assert ended(child)
    else:
        os.kill(child, signal.SIGKILL)  # its parent was killed and cannot end it
    after = session(tmp_path)
    assert outcomes(after) == [("a", "done")]
    after.work([stage("a"), dataclasses.replace(stage("slow", **slow), argv=("work", "0", "0", "slow"))])
    assert outcomes(after) == [("a", "done"), ("slow", "done")]


def test_the_table_says_its_commit_and_comes_back_to_the_next_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    monkeypatch.setattr(gpu, "TABLES", tables)
    monkeypatch.setattr(Stage, "tunes", property(lambda self: self.name == "tune"))
    table, committed = tables / "test.json", {"measured": {"old": {"ms": 1.0}, "again": {"ms": 1.0}}}
    table.write_text(json.dumps(committed))
    tuned = json.dumps({"measured": {"old": {"ms": 1.0}, "again": {"ms": 2.0}, "new": {"ms": 3.0}}})
    todo = [Stage("tune", ("write", str(table), tuned), 5)]
    session(tmp_path).work(todo)
    kept = json.loads(table.read_text())["measured"]
    assert {key: entry.get("commit") for key, entry in kept.items()} == {
        "old": None,
        "again": SETTING.commit,
        "new": SETTING.commit,
    }
    table.write_text(json.dumps(committed))
    session(tmp_path, dataclasses.replace(SETTING, commit="d" * 40)).restore_table(todo)
    assert json.loads(table.read_text()) == committed  # the entries are another commit's
    session(tmp_path).restore_table(todo)
    assert json.loads(table.read_text())["measured"] == kept


def test_changes_are_tested_since_the_last_commit_that_passed_here(tmp_path: Path) -> None:
    pieces = [stage("tests 1/2: x ..."), stage("tests 2/2: y ...")]
    session(tmp_path).work(pieces[:1])
    later = dataclasses.replace(SETTING, commit="d" * 40)
    assert session(tmp_path, later).tested() is None
    session(tmp_path).work(pieces)
    assert session(tmp_path, later).tested() == SETTING.commit
    assert session(tmp_path).tested() is None  # the only commit that passed is this one


def content(commit: str, impl: str, timer: str = "a clock") -> dict[str, Any]:
    row = {"section": "step", "case": "network", "dtype": "bfloat16", "batch": 128, "pass": "train", "impl": impl}
    row |= {"ms": 2.0, "images_per_s": 64e3, "peak_mb": 1.0, "verified": True, "flops": 1, "bytes": 1, "note": None}
    environment = {"gpu": "NVIDIA Test", "torch": "2.11", "triton": "3.6", "timer": timer, "commit": commit}
    ceilings = {"bf16_tflops": 700.0, "tf32_tflops": 300.0, "copy_tbps": 3.0}
    network = {"forward_flops": 1, "step_flops": 3, "parameters": 10}
    return {"environment": environment, "ceilings": ceilings, "network": network, "rows": [row], "left_out": []}


WRONG = content("", "ours")["rows"][0] | {"verified": False, "ms": None, "note": "WRONG: it is"}


def test_the_reports_pieces_of_this_commit_become_one_and_the_pages_tables(tmp_path: Path) -> None:
    pieces = [Stage(f"report {name}", (), 1, (f"report/{name}/{{gpu}}.json",)) for name in ("a", "b", "old", "missing")]
    one = session(tmp_path)
    for piece, commit, impl in zip(
        pieces, (SETTING.commit, SETTING.commit, "d" * 40), ("ours", "eager_nchw", "x"), strict=False
    ):
        path = tmp_path / "out" / one.filled(piece.writes[0])
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content(str(commit), impl)))
    written = one.render(pieces)
    combined = json.loads((tmp_path / "out/report-test.json").read_text())
    assert [r["impl"] for r in combined["rows"]] == ["ours", "eager_nchw"]
    assert tmp_path / "out/performance.md" in written
    page = (tmp_path / "out/performance.md").read_text()
    assert f"NVIDIA Test, torch 2.11, Triton 3.6, commit {'c' * 10}" in page
    assert "| **ours** | 2.000 |" in page


def test_fake_times_reach_no_page(tmp_path: Path) -> None:
    fake = session(tmp_path, dataclasses.replace(SETTING, fake=True))
    path = tmp_path / "out/report/a/test.json"
    path.parent.mkdir(parents=True)
    said: list[str] = []
    fake.say = said.append
    path.write_text(json.dumps(content("c" * 40, "ours", "FAKE: nothing was timed") | {"rows": [WRONG]}))
    fake.render([Stage("report a", (), 1, ("report/a/{gpu}.json",))])
    assert said == ["step network train bfloat16 128 ours: WRONG: it is"]
    assert "FAKE" in (tmp_path / "out/report-test.md").read_text()
    assert not (tmp_path / "out/performance.md").exists()
    assert "FAKE" in fake.summary([], {})


class Parsed(Exception):
    """A command has read its options and would start."""


def _parsed(*_: object, **__: object) -> None:
    raise Parsed


def _accepts(argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own parser accepts its options; without a GPU it stops there."""
    command: Any = typer.main.get_command(app)
    if argv[0] == "pytest":
        files = [argument for argument in argv if argument.endswith(".py")]
        assert files
        assert all((stale.ROOT / file).is_file() for file in files)
    elif argv[0] == "alexnet_triton":
        command.commands[argv[1]].make_context(argv[1], list(argv[2:]))
    else:
        monkeypatch.setattr("sys.argv", list(argv))
        with pytest.raises((SystemExit, Parsed)) as end:
            importlib.import_module(argv[0]).main()
        assert isinstance(end.value, Parsed) or "CUDA GPU" in str(end.value)


def test_every_command_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "run", _parsed)
    monkeypatch.setattr(host.backend, "INTERPRETED", False)
    monkeypatch.setattr(kernelbench, "run", _parsed)
    monkeypatch.setattr(made_images, "make", _parsed)
    everything = stages("/somewhere")
    for each in everything:
        _accepts(each.argv, monkeypatch)
    with pytest.raises(AssertionError):  # the parser exits with 2 and names no GPU
        _accepts(("benchmarks.report", "--part", "nothing"), monkeypatch)


def test_the_stages_are_the_issues_in_order() -> None:
    """Every test file occurs once, every kind comes in order, no name occurs twice."""
    everything = stages(since=None)
    names = [each.name for each in everything]
    assert len(set(names)) == len(names)
    kinds = list(dict.fromkeys(each.kind for each in everything))
    trained = ["train", "cold", "made", "imagenet"]
    assert kinds == ["tests", "sanitize", "tune", "report", "host", "stream", "profile", "kernelbench", *trained, "experiment"]
    files = [argument for each in everything if each.kind in ("tests", "suite") for argument in each.argv if ".py" in argument]
    assert sorted(files) == sorted(stale.all_tests())
    assert names.index("report bfloat16 128 steps") < names.index("report bfloat16 128 tuned")
    assert all(each.seconds <= 300 for each in everything)  # so that a call of ten minutes finishes some
    assert [e.prediction for e in everything if e.kind == "experiment"] == [e.prediction for e in EXPERIMENTS]


def test_the_rest_of_the_suite_comes_after_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stale, "changed_files", lambda commit: ["kernels/dropouts.py", "README.md"])
    pieces = {kind: [a for s in stages() if s.kind == kind for a in s.argv if ".py" in a] for kind in ("tests", "suite")}
    assert "tests/kernels/test_dropout.py" in pieces["tests"]
    assert "tests/benchmarks/test_render.py" not in pieces["tests"]
    assert sorted(pieces["tests"] + pieces["suite"]) == sorted(stale.all_tests())
    assert pieces["suite"]


def test_an_experiment_with_a_stages_command_is_settled_by_it(tmp_path: Path) -> None:
    measured, waiting = stage("report x"), dataclasses.replace(stage("report x"), name="experiment y", prediction="It is fast.")
    one = session(tmp_path)
    one.work([measured, waiting])
    failing = [dataclasses.replace(s, argv=("work", "0", "1")) for s in (measured, waiting)]
    one.work(failing)
    assert outcomes(one) == [("report x", "done"), ("report x", "failed")]
    assert "  experiment y: done" in one.summary([measured, waiting], {})
    assert "predicted: It is fast." in one.summary([measured, waiting], {})


def test_data_in_no_place_leaves_training_out(tmp_path: Path) -> None:
    assert not gpu._has_data(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    assert gpu._has_data(str(tmp_path))
    assert [s.kind for s in stages() if s.needs_data] == ["train"] * 6 + ["cold"]


def test_variants_are_configurations() -> None:
    assert variant.configuration("TAPS=0,num_stages=3") == {"TAPS": 0, "num_stages": 3}
    for wrong in ("TAPS", "TAPS=x", "A=1,"):
        with pytest.raises(variant.argparse.ArgumentTypeError, match="is not NAME=NUMBER"):
            variant.configuration(wrong)
    assert variant.Overridden("conv2", "wgrad", 128).candidates() == [{}]


def test_variants_keep_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What a configuration does not set comes from the table, also in the blocks that tuning opens."""
    seen: list[tuple[bool, dict[str, int]]] = []

    def tune_job(job: tune.Job, dtype: torch.dtype) -> tune.Tuned:
        for candidate in job.candidates(dtype):
            with tune._configured(candidate):
                seen.append((tables._use_tables.value, tables.apply_overrides({"TAPS": 1, "SPLIT": 2})))
        return tune.Tuned(job, 1.0, 1.0, 1.0, {}, [], [])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune_job", tune_job)
    monkeypatch.setattr("sys.argv", ["variant", "--layer", "conv2", "--pass", "wgrad", "TAPS=0"])
    with pytest.raises(SystemExit, match="0"):
        variant.main()
    assert seen == [(True, {"TAPS": 1, "SPLIT": 2}), (True, {"TAPS": 0, "SPLIT": 2})]
    assert "{'TAPS': 0}: 1000.0 us" in capsys.readouterr().out
    with tables.untuned():
        assert not tables._use_tables.value


def _main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["gpu", *arguments])
        gpu.main()

    return run


def test_without_a_gpu_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        _main(monkeypatch)("--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_fake_and_real_records_share_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    session(tmp_path).work([stage("a")])
    with pytest.raises(SystemExit):
        _main(monkeypatch)("--dry", "--out", str(tmp_path / "out"))
    assert "holds real records" in capsys.readouterr().err


def test_two_calls_share_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with held(tmp_path, print), pytest.raises(SystemExit, match="another run is writing into it"):
        _main(monkeypatch)("--dry", "--out", str(tmp_path))


def test_results_and_tables_make_no_new_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tuning and rendering change only files that are not code, so stages recorded before them stay done."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    for name in ("kernels/configs/x.json", "kernels/a.py", "README.md", "docs/b.md", "benchmarks/results/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(gpu, "printed_by", lambda command, *arguments: git(*arguments).strip())
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    for name in (
        "kernels/configs/x.json",
        "README.md",
        "docs/b.md",
        "benchmarks/results/x.json",
        "benchmarks/results/new.json",
    ):
        (tmp_path / name).write_text("after")
    assert Setting.here(fake=True).changes is None
    (tmp_path / "kernels/new.py").write_text("new")
    new = Setting.here(fake=True).changes
    (tmp_path / "kernels/new.py").write_text("newer")
    newer = Setting.here(fake=True).changes
    (tmp_path / "kernels/a.py").write_text("after")
    assert None not in (new, newer)
    assert len({new, newer, Setting.here(fake=True).changes}) == 3


@pytest.mark.slow
def test_a_dry_run_walks_every_kind_of_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in gpu.TABLES.glob("*.json")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--minutes", "9", "--out", str(out)]
    printed = subprocess.run(command, cwd=stale.ROOT, capture_output=True, text=True, check=True).stdout
    records = json.loads((out / "state.json").read_text())["records"]
    found = {r["stage"].split()[0]: r["outcome"] for r in records}
    parsed = dict.fromkeys(("sanitize", "tune", "profile", "experiment"), "parsed")
    ran = dict.fromkeys(("tests", "report", "host", "stream", "kernelbench", "train", "cold", "made", "imagenet"), "done")
    assert parsed | ran == {kind: outcome for kind, outcome in found.items() if kind != "suite"}
    assert all(r["fake"] and r["gpu"].startswith("no GPU") for r in records)
    assert "FAKE: nothing was timed" in printed
    assert "Open: 0" in printed
    (combined,) = out.glob("report-*.json")
    assert render.is_fake(json.loads(combined.read_text()))
    assert not (out / "performance.md").exists()
    assert not list(out.rglob("*.pt"))
    assert before == {path: path.read_bytes() for path in gpu.TABLES.glob("*.json")}
