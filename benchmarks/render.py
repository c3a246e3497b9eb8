"""Tables and plots from stored results alone.

``python -m benchmarks.render [--results FILE ...] [--out DIR]`` writes, for each ``<gpu>.json`` of ``benchmarks.report``, a
Markdown table, a bar plot and a roofline. ``--pages`` also rewrites the text between the markers in README.md and
docs/performance.md, and the README's picture, from the committed audit and the stored results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from kernels.configs.tables import TABLES

from .audit import COMMITTED, total_rows
from .networks import OURS
from .report import RESULTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs/performance.md"
PICTURE = ROOT / "docs/pictures/images-per-second.svg"

#: Sources of the README's picture and numbers: the newest report, which has batch 128; the report of all batches; the eager
#: and captured steps of ``benchmarks.host``, which are newer than that one; and a training run.
NEWEST_REPORT = RESULTS / "h100-80gb-hbm3-2026-11-27.json"
FIRST_REPORT = RESULTS / "h100-80gb-hbm3.json"
FIRST_HOST = RESULTS / "host/h100-80gb-hbm3.json"
FIRST_RUN = RESULTS / "fashion-mnist-h100-seed0.jsonl"
KERNELBENCH = RESULTS / "kernelbench/h200.json"

Row = dict[str, Any]


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [list(header), *([("" if cell is None else str(cell).replace("|", "\\|")) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_fake(content: dict[str, Any]) -> bool:
    """Whether the results come from :class:`FakeTimer`, which times nothing."""
    return str(content["environment"]["timer"]).startswith("FAKE")


def combined(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports of the same commit and GPU: the first one's ceilings and environment, the rows of all."""
    rows, left_out = ([entry for content in contents for entry in content[name]] for name in ("rows", "left_out"))
    return {**contents[0], "rows": rows, "left_out": left_out}


def is_ours(row: Row) -> bool:
    """Whether a row is of our implementation, eager or as a graph."""
    return str(row["impl"]).removesuffix("_graph") == OURS


def _groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by the work measured, over all implementations."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("section", "case", "dtype", "batch", "pass")), []).append(row)
    return groups


def best(rows: Iterable[Row], ours: bool) -> Row | None:
    """The fastest row of ours (or of the peers) that has a time; None if there is none."""
    timed = [r for r in rows if r["ms"] is not None and is_ours(r) == ours]
    return min(timed, key=lambda r: float(r["ms"])) if timed else None


def floor_ms(content: dict[str, Any], dtype: str, batch: int, mode: str) -> float | None:
    """Lower bound in ms of a whole step by the measured ceilings; None if the product's rate was not measured.

    Training: its FLOPs at the product's rate (for float32 that of TF32), then plain SGD's three passes over the parameters at
    the copy's rate (parameter and gradient read, parameter written). Inference: its FLOPs or one read of the parameters,
    whichever takes longer.
    """
    network, ceilings = content["network"], content["ceilings"]
    tflops = ceilings.get("tf32_tflops" if dtype == "float32" else "bf16_tflops")
    if tflops is None:
        return None
    parameters = (4 if dtype == "float32" else 2) * network["parameters"] / (ceilings["copy_tbps"] * 1e9)
    if mode == "train":
        return float(batch * network["step_flops"] / (tflops * 1e9) + 3 * parameters)
    return float(max(batch * network["forward_flops"] / (tflops * 1e9), parameters))


def _ratio(peer: Row | None, ours: Row | None) -> str | None:
    return None if peer is None or ours is None else f"{peer['ms'] / ours['ms']:.2f}"


def step_table(content: dict[str, Any]) -> str:
    """Table of every implementation of the training step and of inference."""
    lines = []
    for (_, _, dtype, batch, mode), rows in _groups(r for r in content["rows"] if r["section"] == "step").items():
        peer, floor = best(rows, ours=False), floor_ms(content, dtype, batch, mode)
        for row in sorted(rows, key=lambda r: (r["ms"] is None, r["ms"])):
            timed = row["ms"] is not None
            lines.append(
                (
                    mode,
                    dtype,
                    batch,
                    f"**{row['impl']}**" if is_ours(row) else row["impl"],
                    f"{row['ms']:.3f}" if timed else None,
                    f"{row['images_per_s']:,.0f}" if timed else None,
                    _ratio(peer, row) if timed else None,
                    f"{floor / row['ms']:.0%}" if timed and floor is not None else None,
                    f"{row['peak_mb']:,.0f}" if timed and row["peak_mb"] is not None else None,
                    row.get("note"),
                )
            )
    header = (
        "mode",
        "dtype",
        "batch",
        "implementation",
        "ms",
        "images/s",
        "speed, best peer = 1",
        "of the floor",
        "peak MB",
        "note",
    )
    return markdown_table(header, lines)


def operation_table(content: dict[str, Any], section: str) -> str:
    """Table of each operation and pass: ours, the best peer, how many times faster ours is."""
    lines = []
    for (_, case, dtype, batch, which), rows in _groups(r for r in content["rows"] if r["section"] == section).items():
        ours, peer = best(rows, ours=True), best(rows, ours=False)
        notes = [r["note"] for r in rows if is_ours(r) and r.get("note")]
        lines.append(
            (
                case,
                which,
                dtype,
                batch,
                f"{ours['ms']:.4f}" if ours else None,
                f"{peer['ms']:.4f}" if peer else None,
                peer["impl"] if peer else None,
                _ratio(peer, ours),
                "; ".join(notes),
            )
        )
    header = ("operation", "pass", "dtype", "batch", "ours, ms", "best peer, ms", "best peer", "times faster", "note")
    return markdown_table(header, lines)


def markdown(content: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    environment, ceilings = content["environment"], content["ceilings"]
    parts = [f"# {environment['gpu']}"]
    if is_fake(content):
        parts.append("**FAKE: nothing was timed. These numbers only show that the report runs.**")
    parts.append(markdown_table(("environment", ""), environment.items()))
    tf32 = f"{ceilings['tf32_tflops']:.1f} TFLOP/s (TF32 product), " if "tf32_tflops" in ceilings else ""
    parts.append(
        f"Measured ceilings: {ceilings['bf16_tflops']:.1f} TFLOP/s (bfloat16 product), {tf32}"
        f"{ceilings['copy_tbps']:.3f} TB/s (copy)."
    )
    parts += ["## Whole network", step_table(content)]
    for section, title in (("fused", "Fused operations against separate ones"), ("plain", "Single operations")):
        parts += [f"## {title}", operation_table(content, section)]
    if content["left_out"]:
        parts.append(f"Left out for lack of time: {len(content['left_out'])} measurements: " + ", ".join(content["left_out"]))
    return "\n\n".join(parts) + "\n"


def plot_bars(content: dict[str, Any], path: Path) -> None:
    """Plot images/s of every implementation of the training step, by batch size."""
    groups = {k: v for k, v in _groups(r for r in content["rows"] if r["section"] == "step").items() if k[4] == "train"}
    figure = Figure(figsize=(9, 1.5 + 2.6 * max(len(groups), 1)), layout="constrained")
    axes = figure.subplots(max(len(groups), 1), 1, squeeze=False)[:, 0]
    for axis, ((_, _, dtype, batch, _), rows) in zip(axes, groups.items(), strict=False):
        timed = sorted((r for r in rows if r["ms"] is not None), key=lambda r: float(r["images_per_s"]))
        colours = ["tab:green" if is_ours(r) else "tab:gray" for r in timed]
        bars = axis.barh([r["impl"] for r in timed], [r["images_per_s"] for r in timed], color=colours)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        floor = floor_ms(content, dtype, batch, "train")
        axis.set(xlabel="images/s", title=f"training step, batch {batch}, {dtype}")
        if floor is not None:
            axis.axvline(batch / floor * 1e3, color="tab:red", linestyle="--", label="floor")
            axis.legend(loc="lower right")
        axis.margins(x=0.12)
    figure.suptitle(_title(content))
    figure.savefig(path, dpi=140)


def roofline_points(content: dict[str, Any], ours: bool) -> list[tuple[float, float]]:
    """(FLOPs per byte, TFLOP/s) of each pass of each single operation with a product, in half precision."""
    points = []
    for rows in _groups(r for r in content["rows"] if r["section"] == "plain" and r["flops"]).values():
        row = best(rows, ours)
        if row is not None and row["dtype"] in ("bfloat16", "float16") and row["pass"] != "backward":
            points.append((row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9))
    return points


def plot_roofline(content: dict[str, Any], path: Path) -> None:
    """Plot each matrix operation of ours and of the best peer under the measured ceilings, by FLOPs per byte."""
    tflops, tbps = content["ceilings"]["bf16_tflops"], content["ceilings"]["copy_tbps"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    ridge = tflops / tbps
    axis.loglog([ridge / 1000, ridge, ridge * 100], [tflops / 1000, tflops, tflops], color="black", label="measured ceilings")
    for ours, marker, colour in ((True, "o", "tab:green"), (False, "x", "tab:gray")):
        points = roofline_points(content, ours)
        if points:
            axis.scatter(*zip(*points, strict=True), marker=marker, color=colour, label="ours" if ours else "best peer")
    axis.set(xlabel="FLOPs a byte", ylabel="TFLOP/s", title=_title(content))
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=140)


def commit_text(environment: dict[str, Any]) -> str:
    """The measured commit as text, with its number of changed files."""
    commit, changed = environment.get("commit"), environment.get("changed_files")
    if not commit:
        return "commit unknown"
    return f"commit {commit[:10]}" + (f" with {changed} file{'s' * (changed > 1)} changed" if changed else "")


def _title(content: dict[str, Any]) -> str:
    environment = content["environment"]
    title = f"{environment['gpu']}, torch {environment['torch']}, Triton {environment['triton']}"
    return "FAKE TIMES: " + title if is_fake(content) else title


def render_results(path: Path, out: Path) -> list[Path]:
    """Write ``<gpu>.md``, ``<gpu>-steps.png`` and ``<gpu>-roofline.png`` from a report's JSON; return their paths."""
    content = json.loads(path.read_text())
    out.mkdir(parents=True, exist_ok=True)
    table, bars, roofline = (out / f"{path.stem}{suffix}" for suffix in (".md", "-steps.png", "-roofline.png"))
    table.write_text(markdown(content))
    plot_bars(content, bars)
    plot_roofline(content, roofline)
    return [table, bars, roofline]


def audit_markdown(committed: dict[str, Any]) -> str:
    """The committed audit's totals as Markdown."""
    parts = []
    for key, totals in committed.items():
        parts.append(f"`{key}`\n\n" + markdown_table(("a step", "ours", "`nn.Sequential`", "ratio"), total_rows(totals)))
        parts.append(
            f'<details markdown="1"><summary>by layer and pass</summary>\n\n{_layer_table(totals["layers"])}\n\n</details>'
        )
    return "\n\n".join(parts)


def _layer_table(layers: list[Row]) -> str:
    lines = []
    for row in layers:
        issued = row["issued_flops"]
        lines.append(
            (
                row["layer"],
                row["pass"],
                row["launches"],
                row["regs"] or None,
                f"{row['useful_flops'] / 1e9:.1f}" if issued else None,
                f"{row['useful_flops'] / issued:.2f}" if issued else None,
                f"{row['min_bytes'] / 1e6:.1f}",
                row["floor_us"],
            )
        )
    header = ("layer", "pass", "launches", "registers", "GFLOP", "useful / issued", "MB", "floor, us")
    return markdown_table(header, lines)


def replace_between(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: the text does not have both markers, once each and in order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"no {begin} ... {end} in the text")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def tuned_markdown(table: dict[str, Any]) -> str:
    """Table of the times of ``alexnet-triton tune`` on one GPU: each pass of each layer beside PyTorch's, in microseconds."""
    rows: dict[tuple[str, str, int], dict[str, str]] = {}
    for measured in table["measured"].values():
        ours, theirs = 1e3 * measured["ms"], 1e3 * measured["pytorch_ms"]
        precision = measured["precision"] if "precision" in measured else table["dtype"]  # older tables have one for all
        few, pass_ = " in one kernel" if "narrow" in measured["pass"] else "", measured["pass"].removeprefix("narrow_")
        rows.setdefault((precision, measured["layer"] + few, measured["batch"]), {})[pass_] = (
            f"{ours:.1f} / {theirs:.1f} ({theirs / ours:.2f})"
        )
    columns = {"fprop": "forward", "dgrad": "input gradient", "wgrad": "weight gradient"}
    if any("backward" in row for row in rows.values()):
        columns["backward"] = "all gradients"
    lines = [
        (f"{layer}, {precision}, batch {batch}", *map(row.get, columns))
        for (precision, layer, batch), row in sorted(rows.items())
    ]
    versions = table["versions"]
    commits = ", ".join(sorted({commit_text(measured) for measured in table["measured"].values()}))
    title = (
        f"{table['gpu']}, torch {versions['torch']}, triton {versions['triton']}, {table['date'][:10]}, {commits}: "
        "ours / PyTorch (how many times as fast), microseconds"
    )
    return f"{title}\n\n{markdown_table(('layer', *columns.values()), lines)}"


#: The cases of the audit on docs/performance.md.
SHOWN_AUDIT = (
    "sm_90-bfloat16-N128-train",
    "sm_90-float32-N128-train",
    "sm_90-bfloat16-N128-trainer",
    "sm_90-bfloat16-N128-infer",
)


#: A GPU's report is named after the GPU. Reports of other days have a date after the name. The page shows the newest one, and
#: its text links to the others.
_DATED = re.compile(r"-\d{4}-\d{2}-\d{2}")


def performance(text: str, results: Iterable[Path]) -> str:
    """docs/performance.md with its tables rebuilt.

    The tables are the audit, the whole networks of the newest report and of each undated one in ``results``, each GPU's tuned
    passes, the stored eager steps, KernelBench's networks and the training runs.

    Raises:
        ValueError: a report's times are fake.
    """
    committed = json.loads(COMMITTED.read_text())
    text = replace_between(text, "audit", audit_markdown({key: committed[key] for key in SHOWN_AUDIT}))
    tables = []
    for path in sorted(results, key=lambda path: path != NEWEST_REPORT):
        content = json.loads(path.read_text())
        if is_fake(content):
            raise ValueError(f"{path}: its times are fake and must not be shown on a page")
        if _DATED.search(path.stem) and path != NEWEST_REPORT:
            continue
        tables.append(f"{_title(content)}, {commit_text(content['environment'])} (`{path.name}`):\n\n{step_table(content)}")
    nothing = "No GPU has measured it yet: `make report` on one writes `benchmarks/results/`, `make render` this table."
    text = replace_between(text, "results", "\n\n".join(tables) or nothing)
    tuned = [tuned_markdown(json.loads(path.read_text())) for path in sorted(TABLES.glob("*.json"))]
    text = replace_between(text, "tuned", "\n\n".join(tuned) or "No GPU has been tuned for yet.")
    text = replace_between(text, "eager", eager_table(host_steps(json.loads(FIRST_HOST.read_text()))))
    text = replace_between(text, "kernelbench", kernelbench_table(json.loads(KERNELBENCH.read_text())))
    return replace_between(text, "runs", runs_table(sorted(RESULTS.glob("fashion-mnist-*.jsonl"))))


def host_steps(content: dict[str, Any]) -> dict[tuple[str, int, bool], tuple[float, float]]:
    """Whole steps of ``benchmarks.host``: (train or infer, batch, whether a graph) -> milliseconds of ours and PyTorch's."""
    return {
        (row["case"], row["batch"], row["mode"] == "graph"): (row["ours_us"] / 1e3, row["peer_us"] / 1e3)
        for row in content["rows"]
        if row["mode"] in ("eager", "graph")
    }


def eager_table(steps: dict[tuple[str, int, bool], tuple[float, float]]) -> str:
    """Table of whole steps beside PyTorch's, without a CUDA graph and with one, in milliseconds."""
    lines = [
        (mode, batch, *(f"{time:.2f}" for graph in (False, True) for time in steps[mode, batch, graph]))
        for mode, batch in dict.fromkeys(key[:2] for key in sorted(steps, key=lambda key: (key[0] != "train", key[1])))
    ]
    return markdown_table(("mode", "batch", "ours, eager", "PyTorch, eager", "ours, graph", "PyTorch, graph"), lines)


def kernelbench_table(content: dict[str, Any]) -> str:
    """Table of KernelBench's networks beside PyTorch, in milliseconds."""
    times = {(row["case"], row["dtype"], row["batch"], row["impl"]): row["ms"] for row in content["rows"]}
    lines = [
        (*kind, *(f"{times[*kind, impl]:.2f}" for impl in ("ours", "eager", "compile_default")))
        for kind in dict.fromkeys(key[:3] for key in times)
    ]
    return markdown_table(("network", "precision", "batch", "ours, eager", "PyTorch, eager", "`torch.compile`"), lines)


class Run(NamedTuple):
    """A training run: number of epochs, the last epoch's metrics, total seconds and mean images/s (0 if not recorded)."""

    epochs: int
    last: Row
    seconds: float
    images_per_s: float


def training_run(path: Path) -> Run:
    """Read the run whose ``metrics.jsonl`` was stored as ``path``."""
    epochs = [json.loads(line) for line in path.read_text().splitlines()]
    timed = [epoch for epoch in epochs if "seconds" in epoch]
    seconds = sum(float(epoch["seconds"]) for epoch in timed)
    images = sum(epoch["seconds"] * epoch["images_per_s"] for epoch in timed)
    return Run(len(epochs), epochs[-1], seconds, images / seconds if timed else 0.0)


def runs_table(paths: Iterable[Path]) -> str:
    """Table of training runs: the last epoch's loss and accuracies, images/s and seconds of training."""
    lines = []
    for path in paths:
        run = training_run(path)
        lines.append(
            (
                f"[{path.stem.removeprefix('fashion-mnist-')}](../benchmarks/results/{path.name})",
                run.epochs,
                f"{run.last['loss']:.3f}",
                f"{run.last['train_acc']:.1%}",
                f"{run.last['test_acc']:.1%}",
                f"{run.images_per_s:,.0f}" if run.seconds else None,
                f"{run.seconds:.1f}" if run.seconds else None,
            )
        )
    return markdown_table(
        ("run", "epochs", "training loss", "training accuracy", "test accuracy", "images/s", "training, s"), lines
    )


#: The names of the report's peers in the README.
_PEERS = {
    "compile_default": "torch.compile",
    "eager_channels_last": "eager, channels-last",
    "eager_channels_last_autocast": "eager, channels-last, autocast",
    "eager_nchw": "eager, NCHW",
}


def _steps(content: dict[str, Any], mode: str, dtype: str = "bfloat16") -> dict[int, list[Row]]:
    """The report's rows of whole steps in ``dtype``, by batch."""
    groups = _groups(row for row in content["rows"] if row["section"] == "step")
    return {key[3]: rows for key, rows in sorted(groups.items()) if key[2] == dtype and key[4] == mode}


def _graph_and_eager(rows: Iterable[Row], impl: str) -> tuple[float, float]:
    rates = {row["impl"]: float(row["images_per_s"]) for row in rows if row["ms"] is not None}
    return rates[f"{impl}_graph"], rates[impl]


def plot_peers(content: dict[str, Any], path: Path) -> None:
    """Plot images/s of a step of 128 images, ours and each peer's, as a CUDA graph and without one, in bfloat16 and float32."""
    panels = [(mode, dtype) for dtype in ("bfloat16", "float32") for mode in ("train", "infer")]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "alexnet-triton"}):
        figure = Figure(figsize=(12, 7), layout="constrained")
        for axis, (mode, dtype) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            title = {"train": "training step", "infer": "inference"}[mode]
            rows = _steps(content, mode, dtype)[128]
            bars = {"alexnet-triton": _graph_and_eager(rows, OURS)}
            bars |= {name: _graph_and_eager(rows, impl) for impl, name in _PEERS.items()}
            for which, (label, ours, peer) in enumerate(
                (("CUDA graph", "tab:green", "dimgray"), ("without a graph", "lightgreen", "silver"))
            ):
                colours = [ours if name.startswith("alexnet") else peer for name in bars]
                places = [place + 0.4 * which for place in range(len(bars))]
                drawn = axis.barh(places, [rates[which] for rates in bars.values()], 0.4, color=colours, label=label)
                axis.bar_label(drawn, [f"{rates[which]:,.0f}" for rates in bars.values()], padding=3, fontsize=8)
            axis.set(title=f"{title}, batch 128, {dtype}" + " (TF32)" * (dtype == "float32"), xlabel="images/s")
            axis.set_yticks([place + 0.2 for place in range(len(bars))], list(bars))
            axis.invert_yaxis()
            axis.margins(x=0.22)
            axis.locator_params(axis="x", nbins=5)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(_title(content))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def claim(content: dict[str, Any], run: Run) -> str:
    """The README's sentences of numbers: training steps beside the best peer, and a training run."""

    def step(dtype: str) -> tuple[Row, str]:
        rows = _steps(content, "train", dtype)[128]
        ours, peer = best(rows, ours=True), best(rows, ours=False)
        assert ours is not None
        assert peer is not None
        return ours, f"{peer['ms'] / ours['ms']:.1f} times as fast as the best peer ({_named(peer)}, {peer['ms']:.2f} ms)"

    (half, half_text), (single, single_text) = step("bfloat16"), step("float32")
    return (
        f"On an {content['environment']['gpu']} a bfloat16 training step of 128 images takes {half['ms']:.2f} ms "
        f"(**{half['images_per_s']:,.0f} images/s**),\n{half_text}.\n"
        f"In float32 with TF32 it takes {single['ms']:.2f} ms, {single_text}.\n"
        f"{run.epochs} epochs of Fashion-MNIST at 224 x 224 take {run.seconds:.1f} s of training steps "
        f"and classify {run.last['test_acc']:.1%} of the test images correctly."
    )


def _named(row: Row) -> str:
    name = str(row["impl"])
    return _PEERS[name.removesuffix("_graph")] + " in a CUDA graph" * name.endswith("_graph")


def speed_table(first: dict[str, Any], newest: dict[str, Any], steps: dict[tuple[str, int, bool], tuple[float, float]]) -> str:
    """The README's table: images/s as a graph beside the best peer, and eagerly beside eager PyTorch.

    Batch 128 is of ``newest``; of the other batches the graphs are of ``first``, the eager steps of ``steps``. In float32 only
    batch 128 was measured.
    """
    lines = []
    for dtype, mode in itertools.product(("bfloat16", "float32"), ("train", "infer")):
        others = _steps(first, mode, dtype) if dtype == "bfloat16" else {}
        for batch, rows in sorted((others | {128: _steps(newest, mode, dtype)[128]}).items()):
            ours, peer = best((r for r in rows if r["impl"] == f"{OURS}_graph"), ours=True), best(rows, ours=False)
            assert ours is not None
            assert peer is not None
            times = {row["impl"]: row["ms"] for row in rows}
            eager = (times[OURS], times["eager_channels_last"]) if batch == 128 else steps[mode, batch, False]
            rates = (f"{ours['images_per_s']:,.0f}", f"{peer['images_per_s']:,.0f}", _ratio(peer, ours))
            eagerly = (f"{batch * 1e3 / time:,.0f}" for time in eager)
            lines.append((f"{mode}, {dtype}", batch, *rates, *eagerly, f"{eager[1] / eager[0]:.2f}"))
    header = ("step", "batch", "ours, graph", "best peer", "ratio", "ours, eager", "PyTorch, eager", "ratio")
    return markdown_table(header, lines)


def readme(text: str) -> str:
    """The README with its claim and its table rebuilt."""
    first, newest, host = (json.loads(path.read_text()) for path in (FIRST_REPORT, NEWEST_REPORT, FIRST_HOST))
    text = replace_between(text, "claim", claim(newest, training_run(FIRST_RUN)))
    return replace_between(text, "speed", speed_table(first, newest, host_steps(host)))


def stored_results() -> list[Path]:
    """Paths of the reports in the repository."""
    return sorted(RESULTS.glob("*.json"))


def main() -> None:
    """Render tables, plots and, with ``--pages``, the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, nargs="*", help="JSON files of the report; by default all stored ones")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pages", action="store_true", help="also rebuild the tables of README.md and docs/performance.md")
    arguments = parser.parse_args()
    paths = stored_results() if arguments.results is None else arguments.results
    for path in paths:
        for written in render_results(path, arguments.out):
            print(written)
    if arguments.pages:
        README.write_text(readme(README.read_text()))
        PERFORMANCE.write_text(performance(PERFORMANCE.read_text(), paths))
        plot_peers(json.loads(NEWEST_REPORT.read_text()), PICTURE)
        print(README, PERFORMANCE, PICTURE, sep="\n")


if __name__ == "__main__":
    main()
