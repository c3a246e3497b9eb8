"""One command for all tests and measurements that need a GPU: resumable, in calls of a few minutes.

``python -m benchmarks.gpu --minutes N [--out DIR]`` works through the stages of :mod:`benchmarks.gpu_stages`, most valuable
first, and begins only stages that fit into the minutes left. Each stage is a process. Its output is kept in ``DIR/logs``. Its
record is written to ``DIR/state.json`` when it ends, so a killed call loses only the running stage. The next call runs the
remaining stages: a stage is done for one commit (and the same uncommitted changes) on one GPU. Each call retries a failed stage
once, after the others. At the end the command prints the recorded stages and the open ones with the reason, and renders the
report and docs/performance.md in DIR.

``--dry`` needs no GPU: it runs the first stage of each kind on tiny inputs. Its records and times are marked as fake. If a
command refuses to run without a GPU after it has parsed its options, the record says ``parsed``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from alexnet_triton.data.fashion_mnist import FILES, holds_idx, usual_places
from alexnet_triton.training.files import write_atomically
from alexnet_triton.training.run_folder import held
from kernels.configs.tables import TABLES, gpu_slug

from . import render, stale
from .gpu_stages import Stage, stages
from .report import commit, gpu_name, printed_by

#: Seconds of a call that are kept for the summary and the rendering after the last stage.
_LAST_SECONDS = 15.0

#: Files whose changes do not invalidate a record, since tuning and rendering write them.
_RESULTS = ("kernels/configs/*.json", "benchmarks/results", "docs", "*.md")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The code and the machine for which a record is valid."""

    commit: str | None
    changes: str | None
    gpu: str
    torch: str
    triton: str
    fake: bool

    @classmethod
    def here(cls, fake: bool) -> Setting:
        """The setting of this working tree and GPU; ``changes`` is a hash of the uncommitted changes, None without any."""
        excluded = [f":(top,exclude){pattern}" for pattern in _RESULTS]
        difference = printed_by("git", "diff", "HEAD", "--", ":/", *excluded) or ""
        new = (printed_by("git", "ls-files", "--others", "--exclude-standard", "--full-name", ":/*.py") or "").splitlines()
        text = difference + "".join(f"{name}\n{(stale.ROOT / name).read_text()}" for name in new)
        changes = hashlib.sha256(text.encode()).hexdigest()[:12] if text else None
        gpu = gpu_name(torch.device("cpu" if fake else "cuda"))
        return cls(commit(), changes, gpu, torch.__version__, triton.__version__, fake)


def _end_with_parent() -> None:
    """Let this process be killed with its parent: an orphan would disturb the next call's measurements on the GPU."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def run_command(command: Sequence[str], log: Path, timeout: float, environment: dict[str, str]) -> int | None:
    """Run a command with its output in ``log``; return its exit status, or None if ``timeout`` killed it and its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=stale.ROOT,
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        try:
            return process.wait(timeout)
        except BaseException as end:  # a signal to this process must end the stage too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(end, subprocess.TimeoutExpired):
                return None
            raise


class Session:
    """One call: its folder, its deadline, and the records of this call and earlier ones.

    Args:
        out: the folder; created if missing.
        setting: the code and machine of this call.
        seconds: the most that the call's stages may take.
        say: prints a line.
    """

    def __init__(self, out: Path, setting: Setting, seconds: float, say: Callable[[str], object] = print) -> None:
        self.out, self.setting, self.say = out, setting, say
        self.deadline = time.monotonic() + seconds
        self.state = out / "state.json"
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = json.loads(self.state.read_text())["records"] if self.state.is_file() else []

    @property
    def remaining(self) -> float:
        """Seconds left for stages."""
        return self.deadline - time.monotonic()

    def filled(self, text: str) -> str:
        """``text`` with the folder for ``{out}`` and the GPU's name for ``{gpu}``."""
        return text.replace("{out}", str(self.out.resolve())).replace("{gpu}", gpu_slug(self.setting.gpu))

    def command(self, stage: Stage) -> tuple[str, ...]:
        """A stage's command after ``python -m``, the dry one in a dry run; ``{out}`` and ``{gpu}`` are not replaced yet."""
        return stage.dry if self.setting.fake and stage.dry else stage.argv

    def last(self, stage: Stage, here: bool = True) -> dict[str, Any] | None:
        """The last record of a stage's command, with ``here`` only of this setting; None if there is none."""
        wanted = {"argv": list(self.command(stage)), "cold": stage.cold}
        wanted |= dataclasses.asdict(self.setting) if here else {"fake": self.setting.fake}
        found = [r for r in self.records if wanted.items() <= r.items()]
        return found[-1] if found else None

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage is recorded as done in this setting and its files exist."""
        record = self.last(stage)
        if record is None or record["outcome"] not in ("done", "parsed"):
            return False
        return record["outcome"] == "parsed" or all((self.out / self.filled(path)).is_file() for path in stage.writes)

    def expected(self, stage: Stage) -> float:
        """Upper estimate of the stage's seconds, from its last record of any commit if there is one."""
        record = self.last(stage, here=False)
        if record is None or record["outcome"] == "failed":
            return min(stage.seconds, 60.0) if self.setting.fake else stage.seconds
        return 2 * float(record["seconds"]) if record["outcome"] == "out of time" else 1.25 * float(record["seconds"]) + 5

    def run(self, stage: Stage) -> dict[str, Any]:
        """Run a stage and record it."""
        for path in stage.writes:
            folder = (self.out / self.filled(path)).parent
            if stage.needs_data:  # `train` refuses a folder that already has a run
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        log = self.out / "logs" / f"{''.join(c if c.isalnum() else '-' for c in stage.name)}.log"
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as cache:
            search = os.pathsep.join(filter(None, (str(stale.ROOT), os.environ.get("PYTHONPATH"))))
            environment = os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"}
            environment |= {"TRITON_CACHE_DIR": cache} if stage.cold else {}
            environment |= dict(stage.environment)
            if self.setting.fake:
                environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
                environment |= {"TRITON_INTERPRET": "0" if stage.kind == "host" else "1"}
            command = [sys.executable, "-m", *map(self.filled, self.command(stage))]
            timeout = self.remaining if self.setting.fake else min(self.remaining, max(2 * self.expected(stage), stage.seconds))
            status = run_command(command, log, max(timeout, 0.0), environment)
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        outcome = {None: "out of time", 0: "done"}.get(status, "failed")
        if outcome == "failed" and self.setting.fake and said and "CUDA GPU" in said[-1]:
            outcome = "parsed"
        elif outcome == "failed" and stage.may_fail:
            outcome = "done"
        record = {
            **dataclasses.asdict(self.setting),
            "stage": stage.name,
            "argv": list(self.command(stage)),
            "cold": stage.cold,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begin, 1),
            "outcome": outcome,
            "exit": status,
            "said": said,
            "log": str(log.relative_to(self.out)),
        }
        for checkpoint in self.out.glob("train/*/*.pt"):  # hundreds of megabytes that are not part of a result
            checkpoint.unlink()
        self.records.append(record)
        write_atomically(self.state, (json.dumps({"records": self.records}, indent=1) + "\n").encode())
        return record

    def work(self, todo: Sequence[Stage], again: Sequence[str] = ()) -> None:
        """Run each open stage that fits once, those that have not failed yet first."""
        wanted = [s for s in todo if s.name in again or not self.is_done(s)]
        ran = set()
        for stage in sorted(wanted, key=lambda s: self.last(s) is not None and s.name not in again):
            command = (self.command(stage), stage.cold)  # an experiment may have the command of another stage
            if command in ran or self.expected(stage) > self.remaining:
                continue
            ran.add(command)
            self.say(f"{stage.name}: about {self.expected(stage):.0f} s, {self.remaining:.0f} s left")
            before = self._measured()
            record = self.run(stage)
            if stage.tunes and record["outcome"] != "parsed":
                self._keep_table(before)
            self.say(f"{stage.name}: {record['outcome']} after {record['seconds']} s")

    def _measured(self) -> dict[str, Any]:
        """The entries of the table that the kernels read on this GPU."""
        table = TABLES / self.filled("{gpu}.json")
        return json.loads(table.read_text())["measured"] if table.is_file() else {}

    def _keep_table(self, before: dict[str, Any]) -> None:
        """Write the commit into the table's entries that a stage changed, and keep a copy of the table."""
        table = TABLES / self.filled("{gpu}.json")
        if table.is_file():
            content = json.loads(table.read_text())
            for key, entry in content["measured"].items():
                if entry != before.get(key):
                    entry["commit"] = self.setting.commit
            write_atomically(table, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
            shutil.copy(table, self.out)

    def restore_table(self, everything: Sequence[Stage]) -> None:
        """Copy back the table that an earlier call tuned for this commit, if any: each call may get a fresh machine."""
        table = self.out / self.filled("{gpu}.json")
        if any(stage.tunes and self.last(stage) for stage in everything) and table.is_file():
            shutil.copy(table, TABLES)

    def tested(self) -> str | None:
        """The last other commit whose stages ``tests`` have all passed here; None if there is none."""
        passed: dict[str, set[str]] = {}
        for record in self.records:
            if record["stage"].startswith("tests ") and record["outcome"] == "done" and record["commit"] != self.setting.commit:
                pieces = passed.setdefault(record["commit"], set())
                pieces.add(record["stage"].split(":")[0])
        whole = [c for c, pieces in passed.items() if len(pieces) == int(next(iter(pieces)).split("/")[1])]
        return whole[-1] if whole else None

    def summary(self, todo: Sequence[Stage], left_out: dict[str, str]) -> str:
        """The recorded stages and the open ones, as text."""
        lines = [f"Recorded in {self.state}" + (", FAKE: nothing was timed:" if self.setting.fake else ":")]
        open_stages = []
        for stage in todo:
            record = self.last(stage)
            if record is not None and self.is_done(stage):
                lines.append(f"  {stage.name}: {record['outcome']}, {record['seconds']} s")
                if stage.prediction:
                    lines += [f"    predicted: {stage.prediction}", *(f"    {line}" for line in record["said"])]
            elif record is not None:
                open_stages.append(f"  {stage.name}: {record['outcome']} ({record['log']}): {' / '.join(record['said'][-1:])}")
            else:
                open_stages.append(f"  {stage.name}: no time, about {self.expected(stage):.0f} s")
        open_stages += [f"  {name}: left out, {why}" for name, why in left_out.items()]
        return "\n".join([*lines, f"Open: {len(open_stages)}", *open_stages])

    def render(self, todo: Sequence[Stage]) -> list[Path]:
        """Merge this commit's pieces of the report and write its tables and (for real times) docs/performance.md; the paths.

        Prints a line for each result that was wrong and got no time.
        """
        slug = gpu_slug(self.setting.gpu)
        written = []
        for kind in ("report", "kernelbench"):
            pieces = [self.out / self.filled(s.writes[0]) for s in todo if s.kind == kind]
            contents = [json.loads(path.read_text()) for path in dict.fromkeys(pieces) if path.is_file()]
            contents = [c for c in contents if c["environment"]["commit"] == self.setting.commit and c["rows"]]
            if not contents:
                continue
            path, content = self.out / f"{kind}-{slug}.json", render.combined(contents)
            write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
            written.append(path)
            for row in content["rows"]:
                if row["verified"] is False:
                    labels = (str(row[name]) for name in ("section", "case", "pass", "dtype", "batch", "impl"))
                    self.say(f"{' '.join(labels)}: {row['note']}")
            if kind == "report":
                written += render.render_results(path, self.out)
                if not self.setting.fake:
                    page = self.out / "performance.md"
                    page.write_text(render.performance(render.PERFORMANCE.read_text(), [path]))
                    written.append(page)
        return written


def _has_data(data: str | None) -> bool:
    """Whether Fashion-MNIST is in ``data``, or if ``data`` is None in a usual place."""
    return any(holds_idx(Path(folder)) for folder in ([data] if data else usual_places()))


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block and its running stage, as Ctrl-C does."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Work through the stages, print the summary, render the results."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="the most minutes that this call may take")
    parser.add_argument(
        "--out", type=Path, default=stale.ROOT / "runs/gpu", help="folder of the results; a later call continues there"
    )
    parser.add_argument("--data", help="folder of Fashion-MNIST's IDX files, if not in a usual place")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only stages whose name begins with NAME")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="run these stages again, even if done")
    parser.add_argument("--dry", action="store_true", help="run tiny stages without a GPU; nothing is timed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry:
        sys.exit("gpu: there is no CUDA GPU here; --dry walks through the stages without one")
    setting = Setting.here(arguments.dry)
    session = Session(arguments.out, setting, 60 * arguments.minutes - _LAST_SECONDS - (time.monotonic() - begin))
    if any(record["fake"] != arguments.dry for record in session.records):
        parser.error(f"{arguments.out} holds {'real' if arguments.dry else 'fake'} records: give another --out")
    everything = stages(arguments.data, since=session.tested() or stale.last_commit())
    if unknown := set(arguments.again) - {s.name for s in everything}:
        parser.error(f"there is no stage {sorted(unknown)}")
    todo = [s for s in everything if s.name.startswith(tuple(arguments.only or [""]))]
    left_out = {}
    if arguments.dry:
        todo = list({s.kind: s for s in reversed(todo)}.values())[::-1]
    elif not _has_data(arguments.data):
        left_out = {
            s.name: f"no {FILES['train'][0]} in {arguments.data or 'a usual place'}: --data" for s in todo if s.needs_data
        }
        todo = [s for s in todo if s.name not in left_out]
    try:
        with held(session.out, print), _ended_by_sigterm():
            session.restore_table(everything)
            session.work(todo, arguments.again)
            print(session.summary(todo, left_out))
            for path in session.render(todo):
                print(path)
    except BlockingIOError as error:
        sys.exit(f"gpu: {error}")


if __name__ == "__main__":
    main()
