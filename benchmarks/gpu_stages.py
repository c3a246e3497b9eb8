"""The stages of ``python -m benchmarks.gpu``, most valuable first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from alexnet_triton import tune as tuner

from . import stale
from .experiments import EXPERIMENTS, report, tune
from .kernelbench import PRECISIONS, PROBLEMS

#: The test files of one stage hold about this many bytes of text: tests for a minute or two.
_PIECE_BYTES = 90_000


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command that fits into a call and writes its result.

    Attributes:
        name: its first word is the stage's kind.
        argv: arguments after ``python -m``; ``{out}`` is the folder of the results, ``{gpu}`` the GPU's name in file names.
        seconds: upper estimate of its time, used until a call has recorded the time.
        writes: its files in the folder of the results.
        dry: a tiny command without a GPU; None if ``argv`` parses its options and then refuses to run without a GPU.
        needs_data: whether it reads Fashion-MNIST.
        cold: whether it starts with an empty compilation cache.
        prediction: the expected result, in a sentence.
        environment: variables that are set for the command.
        may_fail: whether a failure of the command counts as an outcome.
    """

    name: str
    argv: tuple[str, ...]
    seconds: float
    writes: tuple[str, ...] = ()
    dry: tuple[str, ...] | None = None
    needs_data: bool = False
    cold: bool = False
    prediction: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    may_fail: bool = False

    @property
    def kind(self) -> str:
        """First word of the name; stages of one kind have it in common."""
        return self.name.split()[0]

    @property
    def tunes(self) -> bool:
        """Whether the stage writes the table that the kernels read."""
        return self.argv[:2] == ("alexnet_triton", "tune") and "--out" not in self.argv


def _pieces(name: str, tests: Iterable[str]) -> list[Stage]:
    """Stages that run the test files ``tests``, a few files each."""
    pieces: list[list[str]] = []
    size = _PIECE_BYTES
    for test in tests:
        length = (stale.ROOT / test).stat().st_size
        if size + length > _PIECE_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(test)
        size += length
    pytest = ("pytest", "-q", "--timeout", "300")
    return [
        Stage(
            f"{name} {number}/{len(pieces)}: {files[0].removeprefix('tests/')} ...",
            (*pytest, "--numprocesses", "auto", *files),
            120,
            dry=(*pytest, "--collect-only", files[0]),
        )
        for number, files in enumerate(pieces, 1)
    ]


def _report(dtype: str, batch: int, part: str, seconds: float) -> Stage:
    argv = report(dtype, batch, part)
    written = argv[-1].removeprefix("{out}/")
    dry = ("benchmarks.report", "--dry", "--part", part, "--out", argv[-1])
    return Stage(f"report {dtype} {batch} {part}", argv, seconds, (f"{written}/{{gpu}}.json",), dry)


def _tuning() -> Iterator[Stage]:
    """A tuning stage for each dtype, batch size and layer."""
    layers = (*tuner.LAYERS, *tuner.LINEAR_LAYERS)
    for dtype, batch in (("bfloat16", 128), ("bfloat16", 1024), ("bfloat16", 1), ("float32", 128), ("tf32", 128)):
        # float32 convolutions use TF32 under both settings.
        for layer in tuner.LINEAR_LAYERS if dtype == "tf32" else layers:
            if not tuner.jobs((batch,), (layer,), tuner.PRECISIONS[dtype][0]):
                continue
            yield Stage(f"tune {dtype} {batch} {layer}", tune(dtype, layer, batch), 100 if batch > 128 else 70)
    for layer in layers:
        # float16 uses bfloat16's entries: its own table shows whether its best entries would differ.
        table = "float16/{gpu}.json"
        yield Stage(f"tune float16 128 {layer}", (*tune("float16", layer), "--out", f"{{out}}/{table}"), 70, (table,))


def _training(data: str | None) -> Iterator[Stage]:
    """Training runs: three seeds of each recipe, then a cold start."""

    def train(out: str, *options: str) -> tuple[str, ...]:
        return ("alexnet_triton", "train", *(("--data", data) if data else ()), *options, "--out", f"{{out}}/train/{out}")

    tiny = ("--data", "sample", "--limit", "4", "--batch-size", "4", "--epochs", "1", "--model", "lenet", "--out")
    dry = ("alexnet_triton", "train", "--backend", "torch", *tiny)
    fast = "Training takes at most 7.5 s, 85,000 images/s."
    cold = "From an empty cache the setup takes less than 15 s on 16 cores."
    modern = "The modern recipe reaches at least 94.4% of the test images, and its training takes at most 20 s."
    runs: list[tuple[str, str, tuple[str, ...], str]]
    runs = [(f"train seed {seed}", f"seed{seed}", ("--seed", str(seed)), fast) for seed in range(3)]
    runs += [
        (f"train modern seed {seed}", f"modern{seed}", ("--recipe", "modern", "--seed", str(seed)), modern) for seed in range(3)
    ]
    for name, out, options, prediction in [*runs, ("cold start", "cold", ("--epochs", "1"), cold)]:
        yield Stage(
            name,
            train(out, *options),
            75,
            (f"train/{out}/metrics.jsonl",),
            (*dry, f"{{out}}/train/{out}"),
            needs_data=True,
            cold=prediction == cold,
            prediction=prediction,
        )


def _imagenet() -> Iterator[Stage]:
    """One epoch of AlexNet by the paper's recipe on generated images of many classes."""
    make = ("tests.made_images", "--out", "{out}/made")
    train = ("alexnet_triton", "train", "--data", "{out}/made", "--recipe", "paper", "--epochs", "1", "--out")
    tiny = ("--model", "lenet", "--backend", "torch", "--limit", "12", "--batch-size", "4")
    yield Stage(
        "made images", (*make, "--images", "6400", "--classes", "100"), 30, dry=(*make, "--images", "24", "--classes", "12")
    )
    yield Stage(
        "imagenet",
        (*train, "{out}/train/imagenet", "--channels", "3"),
        60,
        ("train/imagenet/metrics.jsonl",),
        (*train, "{out}/train/imagenet", *tiny),
        prediction="After an epoch of 50 steps the true class is among five more often than one in twenty.",
    )


def stages(data: str | None = None, since: str | None = None) -> list[Stage]:
    """All stages in order.

    Args:
        data: folder of Fashion-MNIST's files, if not in the usual places.
        since: the commit of the last run on a GPU; None if unknown, then all tests come first.
    """
    first = stale.tests_of(stale.changed_files(since))
    found = _pieces("tests", first) + _pieces("suite", [t for t in stale.all_tests() if t not in first])
    found += [Stage(f"sanitize {t}", ("tests.sanitize", "--tool", t), 150) for t in ("memcheck", "racecheck", "initcheck")]
    found += _tuning()
    combinations = [
        ("bfloat16", 128),
        ("float32", 128),
        ("bfloat16", 1024),
        ("float32", 1024),
        ("float16", 128),
        ("float16", 1024),
    ]
    for dtype, batch in combinations:
        found += [_report(dtype, batch, "steps", 100), _report(dtype, batch, "operations", 120)]
        if (dtype, batch) == ("float32", 128):
            found += [_report(each, 1, "steps", 90) for each in ("bfloat16", "float32")]
    found += [_report("bfloat16", 128, "compiled_operations", 200)]
    found += [_report(dtype, batch, "tuned", 240) for dtype, batch in combinations[:4]]
    host = ("benchmarks.host", "--json", "{out}/host/{gpu}.json")
    one_case = (*host, "--case", "linear", "--rounds", "1", "--batch", "1")
    found.append(Stage("host", host, 180, ("host/{gpu}.json",), one_case))
    streaming = ("benchmarks.stream", "--cuda", "--json", "{out}/stream/{gpu}.json")
    tiny = (*streaming, "--dry", "--backend", "torch")
    feeding = "Sixteen workers and the GPU's JPEG decoder together feed more than 20,000 images/s of 256 x 256."
    found.append(Stage("stream", streaming, 90, ("stream/{gpu}.json",), tiny, prediction=feeding))
    for options in (("bfloat16", "train"), ("bfloat16", "infer"), ("float32", "train")):
        argv = ("benchmarks.profile", "--dtype", options[0], "--mode", options[1], "--out", "{out}")
        found.append(Stage(f"profile {' '.join(options)}", argv, 45, ("profile/{gpu}.json",)))
    for precision in ("bfloat16", *(p for p in PRECISIONS if p != "bfloat16")):
        for problem in PROBLEMS:
            path = f"kernelbench/{problem.name}-{precision}/{{gpu}}.json"
            argv = ("benchmarks.kernelbench", "--network", problem.name, "--precision", precision, "--json", f"{{out}}/{path}")
            small = ("benchmarks.kernelbench", "--network", "level3-4-lenet5", "--precision", "float32", *argv[-2:])
            found.append(Stage(f"kernelbench {problem.name} {precision}", (*argv, "--minutes", "60"), 90, (path,), small))
    found += _training(data)
    found += _imagenet()
    for e in EXPERIMENTS:
        dry = (*e.argv, "--collect-only") if e.argv[0] == "pytest" else None
        stage = Stage(f"experiment {e.name}", e.argv, e.seconds, dry=dry, prediction=e.prediction, may_fail=e.may_fail)
        found.append(dataclasses.replace(stage, environment=e.environment))
    return found
