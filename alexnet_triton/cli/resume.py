"""``--resume`` of `train` and `compare`: finding the checkpoint, and the recipe and options of the resumed run."""

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

#: Fields that may be given anew to a resumed run: where and how long it runs, and what helps a run that diverged.
MAY_CHANGE = frozenset(
    name for kind in (Recipe, RunOptions) for name, allowed in allowed_of(kind).items() if allowed.may_change
)


def newest(*patterns: str) -> Path | None:
    """The most recently written file in ``runs/`` that matches one of ``patterns``; None if no file does."""
    files = (file for pattern in patterns for file in Path("runs").glob(pattern))
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def last_checkpoint(folder: Path) -> Path:
    """Path of the newest checkpoint in ``folder``; the best one if it is the only one, as after an early crash."""
    return folder / (BEST if (folder / BEST).exists() and not (folder / LAST).exists() else LAST)


def checkpoint_to_resume(resume: str, out: Path | None) -> Path:
    """The checkpoint file that ``--resume`` names: a file, or that of a folder; for "" that of ``out`` or of the newest run."""
    if resume:
        path = Path(resume)
        path = last_checkpoint(path) if path.is_dir() else path
    elif out is not None:
        path = last_checkpoint(out)
    else:
        found = newest(*(f"{run}/{name}" for run in ("*", "*/*") for name in (LAST, BEST)))  # compare nests runs once more
        if found is None:
            raise typer.BadParameter("no folder in runs/ holds a checkpoint; give a path", param_hint="--resume")
        path = last_checkpoint(found.parent)
    if out is not None and os.path.dirname(os.path.realpath(path)) != os.path.realpath(out):  # of links in a circle, too
        raise typer.BadParameter(f"a run is resumed in its own folder, {path.parent}: leave --out away", param_hint="--out")
    return path


def check_nothing_is_lost(checkpoint: Checkpoint, path: Path) -> None:
    """Check that resuming ``checkpoint``, read from ``path``, discards no later progress of the run in that folder.

    Raises:
        CheckpointError: the folder's last checkpoint is further than ``checkpoint``.
    """
    last = path.with_name(LAST)
    if path.name == LAST or not last.exists():
        return
    try:
        newer = read_checkpoint(last)
        further = position(newer) > position(checkpoint)
    except CheckpointError:  # an unreadable checkpoint cannot be lost
        return
    if further:
        raise CheckpointError(
            f"{path} has {len(checkpoint.metrics)} whole epoch(s), but {last} is further ({len(newer.metrics)}) and would be "
            f"lost: give --resume {path.parent}, or copy {path.name} into another folder as {LAST} and resume that folder"
        )


def resumed(
    context: typer.Context, recipe: Recipe, options: RunOptions, source: Path, may_change: Set[str] = MAY_CHANGE
) -> tuple[Recipe, RunOptions]:
    """The recipe and options of the run saved in the file ``source``, changed by what the command line gives.

    Raises:
        typer.BadParameter: the command line changes a field that is not in ``may_change``, or gives an invalid value.
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
    """The parameters given on the command line that are fields of :class:`Recipe` or :class:`RunOptions`, by name."""
    parts = PARTS if context.params["augment"] else ()

    def said(name: str) -> bool:
        source = context.get_parameter_source(name)
        return name in parts or (source is not None and source.name == "COMMANDLINE")

    return {
        name: value
        for name, value in plain(context.params).items()
        if name in allowed_of(Recipe) | allowed_of(RunOptions) and said(name) and (name, value) != ("dtype", "auto")
    }
