"""What ``--resume`` of `train` and `compare` means: a folder or a file, and the options that are in it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import typer

from ..training.checkpoint import BEST, LAST, Checkpoint, CheckpointError, position, read_checkpoint
from ..training.recipe import Recipe, allowed_of
from .run import PARTS, RunOptions, plain, refused_values

#: What a resumed run may have otherwise: where and for how long it runs, and what helps one that diverged.
MAY_CHANGE = frozenset(
    name for kind in (Recipe, RunOptions) for name, allowed in allowed_of(kind).items() if allowed.may_change
)


def newest(*patterns: str) -> Path | None:
    """The file in ``runs/`` that was written last, of those that match; None if there is none."""
    files = (file for pattern in patterns for file in Path("runs").glob(pattern))
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in ``folder``, or where it would be: of a run that a crash ended before it had two, the best."""
    return folder / (BEST if (folder / BEST).exists() and not (folder / LAST).exists() else LAST)


def checkpoint_to_resume(resume: str, out: Path | None) -> Path:
    """The file that ``--resume`` means: a file, that of a folder, or for "" that of ``out`` or of the newest run."""
    if resume:
        path = Path(resume)
        path = last_checkpoint(path) if path.is_dir() else path
    elif out is not None:
        path = last_checkpoint(out)
    else:
        found = newest(*(f"{run}/{name}" for run in ("*", "*/*") for name in (LAST, BEST)))  # a comparison's are one deeper
        if found is None:
            raise typer.BadParameter("no folder in runs/ holds a checkpoint; give a path", param_hint="--resume")
        path = last_checkpoint(found.parent)
    if out is not None and os.path.dirname(os.path.realpath(path)) != os.path.realpath(out):  # of links in a circle, too
        raise typer.BadParameter(f"a resumed run goes on in its own folder, {path.parent}", param_hint="--out")
    return path


def check_nothing_is_lost(checkpoint: Checkpoint, path: Path) -> None:
    """That the run in the folder of ``path`` has not come further than ``checkpoint``, which is in that file.

    Raises:
        CheckpointError: it has, by its last checkpoint.
    """
    last = path.with_name(LAST)
    if path.name == LAST or not last.exists():
        return
    try:
        newer = read_checkpoint(last)
        further = position(newer) > position(checkpoint)
    except CheckpointError:  # there is nothing that could be lost
        return
    if further:
        raise CheckpointError(
            f"{path} has {len(checkpoint.metrics)} whole epoch(s), the run in {last} came further ({len(newer.metrics)}): that "
            f"would be lost; --resume {path.parent}, or copy {path.name} into a folder of its own, as {LAST}, and resume that"
        )


def resumed(
    context: typer.Context, recipe: Recipe, options: RunOptions, source: Path, may_change: Set[str] = MAY_CHANGE
) -> tuple[Recipe, RunOptions]:
    """The recipe and the options of a run, which are in the file ``source``, but for what is given on the command line.

    Raises:
        typer.BadParameter: given is another value than the run's of what must stay, or one that cannot be.
    """
    of_recipe: dict[str, Any] = {}
    of_options: dict[str, Any] = {}
    for name, value in _given(context).items():
        was, anew = (recipe, of_recipe) if name in allowed_of(Recipe) else (options, of_options)
        if name not in may_change and getattr(was, name) != value:
            hint = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"the run in {source} has {getattr(was, name)}, not {value}", param_hint=hint)
        anew[name] = value
    with refused_values():
        return dataclasses.replace(recipe, **of_recipe), dataclasses.replace(options, **of_options)


def _given(context: typer.Context) -> dict[str, Any]:
    """The parameters on the command line that are fields of a recipe or of its options, as those hold them."""
    parts = PARTS if context.params["augment"] else ()

    def said(name: str) -> bool:
        source = context.get_parameter_source(name)
        return name in parts or (source is not None and source.name == "COMMANDLINE")

    return {
        name: value
        for name, value in plain(context.params).items()
        if name in allowed_of(Recipe) | allowed_of(RunOptions) and said(name) and (name, value) != ("dtype", "auto")
    }
