"""Finds kernels and configurations that have changed since they were measured, and the tests that a change touches.

``python -m benchmarks.stale`` compares the working tree with the commit at which each result in ``benchmarks/results`` and each
table in ``kernels/configs`` was measured. If a file does not name its commit, the last commit that changed the file is used. A
kernel has changed if its own code has, or a jitted function or a constant that it reaches; comments and docstrings do not
count. A table's entry is stale if its kernel or the rule that reads it has changed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kernels.configs.tables import TABLES

from .report import RESULTS, printed_by

ROOT = Path(__file__).parents[1]

Node = ast.FunctionDef | ast.Assign | ast.AnnAssign

#: A table's operation -> the functions that read its entries, and the kernels that run them.
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "conv2d_fprop": (
        ("conv2d_tile", "conv2d_images_config", "conv2d_box_config", "conv2d_by_taps", "conv2d_taps_config"),
        ("_conv2d_images_kernel", "_conv2d_box_kernel", "_conv2d_taps_kernel"),
    ),
    "conv2d_dgrad": (
        ("conv2d_tile", "conv2d_images_config", "conv2d_box_config"),
        ("_conv2d_images_kernel", "_conv2d_box_kernel", "_by_batch_kernel"),
    ),
    "conv2d_wgrad": (
        (
            *("conv2d_images_wgrad_config", "conv2d_by_batch_wgrad_config"),
            *("conv2d_wgrad_streams", "conv2d_stream_k_wgrad_config"),
        ),
        ("_conv2d_images_wgrad_kernel", "_sum_parts_kernel", "_conv2d_stream_k_wgrad_kernel", "_sum_stream_k_kernel"),
    ),
    "conv2d_stem_fprop": (("conv2d_stem_config",), ("_conv2d_stem_kernel", "_space_to_depth_kernel", "_fold_filter_kernel")),
    "conv2d_stem_pool_fprop": (
        ("conv2d_stem_pool_config", "conv2d_stem_pool_fused"),
        ("_conv2d_stem_pool_kernel", "_space_to_depth_kernel", "_fold_filter_kernel"),
    ),
    "conv2d_stem_wgrad": (("conv2d_stem_wgrad_config",), ("_conv2d_stem_wgrad_kernel", "_unfold_filter_kernel")),
    "conv2d_stem_pool_wgrad": (
        ("conv2d_stem_pool_wgrad_config", "conv2d_stem_pool_wgrad_fused"),
        ("_conv2d_stem_pool_wgrad_kernel", "_unfold_filter_kernel"),
    ),
    "conv2d_rows_fprop": (("conv2d_rows_config",), ("_conv2d_rows_kernel", "_fold_filter_kernel")),
    "conv2d_rows_wgrad": (
        ("conv2d_rows_wgrad_config",),
        ("_conv2d_rows_wgrad_kernel", "_by_batch_kernel", "_cells_by_batch_kernel", "_unfold_filter_kernel"),
    ),
    "linear_narrow_fprop": (("linear_narrow_config",), ("_linear_narrow_fprop_kernel",)),
    "linear_narrow_backward": (("linear_narrow_config",), ("_linear_narrow_backward_kernel",)),
    **dict.fromkeys(
        ("linear_fprop", "linear_dgrad", "linear_wgrad"),
        (
            ("linear_config",),
            (
                *("_matmul_kernel", "_matmul_descriptor_kernel", "_matmul_finish_kernel"),
                *("_matmul_shares_kernel", "_matmul_shares_finish_kernel"),
            ),
        ),
    ),
}


def _names(node: Node) -> list[str]:
    """The names that a definition binds."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _jitted(node: Node) -> bool:
    return isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)


def _code(node: Node) -> str:
    """The source of a definition without its docstring."""
    if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
        return ast.unparse(node)
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "body": node.body[1:] or [ast.Pass()]})
    return ast.unparse(ast.copy_location(bare, node))


def _imported(path: str, body: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    """A module's imports from its own package: name -> (path, name there)."""
    found: dict[str, tuple[str, str]] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            origin = "/".join((*path.split("/")[: -node.level], *node.module.split("."))) + ".py"
            found |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
    return found


class Code:
    """The functions and constants of the package ``kernels``, parsed from its sources (path -> text)."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.modules: dict[str, dict[str, Node]] = {}
        self.imported: dict[str, dict[str, tuple[str, str]]] = {}
        self.jitted: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        for path, text in sources.items():
            body = ast.parse(text).body
            nodes = [node for node in body if isinstance(node, Node)]
            self.imported[path] = _imported(path, body)
            self.modules[path] = {name: node for node in nodes for name in _names(node)}
            self.jitted |= {name: path for name, node in self.modules[path].items() if _jitted(node)}
            self.constants |= {n: path for n, node in self.modules[path].items() if not isinstance(node, ast.FunctionDef)}

    @property
    def kernels(self) -> dict[str, str]:
        """Every kernel and the path of its file."""
        return {name: path for name, path in self.jitted.items() if name.endswith("_kernel")}

    def meaning(self, name: str) -> frozenset[str]:
        """The code that decides what a function does; empty if there is no such function.

        This is the code of the function and of everything that it reaches in its own module and in imported modules of rules,
        and of jitted functions and constants that it reaches in other modules. The code that reads and checks tables is left
        out, since it decides no configuration.
        """
        path = self.jitted.get(name) or next((path for path, nodes in self.modules.items() if name in nodes), None)
        reached: dict[tuple[str, str], str] = {}
        waiting = [] if path is None else [(path, name)]
        while waiting:
            path, name = waiting.pop()
            node = self.modules[path][name]
            reached[path, name] = _code(node)
            for used in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
                where = path if used in self.modules[path] else self.jitted.get(used) or self.constants.get(used)
                origin, original = self.imported[path].get(used, ("", ""))
                if origin.endswith("rules.py") and original in self.modules.get(origin, {}):
                    where, used = origin, original
                if where is not None and (where, used) not in reached:
                    waiting.append((where, used))
        return frozenset(reached.values())


@functools.cache
def code_at(commit: str | None) -> Code:
    """The package ``kernels`` at a commit of this repository; None means the working tree."""
    if commit is None:
        return Code({str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "kernels").rglob("*.py"))})
    paths = (printed_by("git", "ls-tree", "-r", "--full-tree", "--name-only", commit, "kernels") or "").splitlines()
    return Code({p: printed_by("git", "show", f"{commit}:{p}") or "" for p in paths if p.endswith(".py")})


def changed(before: Code, after: Code, names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose :meth:`Code.meaning` differs between ``before`` and ``after``."""
    return [name for name in names if before.meaning(name) != after.meaning(name)]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A stored measurement.

    Attributes:
        what: the file, and the part of it.
        commit: of the measured code; None if neither the file nor its history names one.
        said: whether the file itself names the commit.
        keys: the entries, if it is a table.
    """

    what: str
    commit: str | None
    said: bool
    keys: tuple[str, ...] = ()


def _measured(path: Path, part: str, commit: str | None, keys: Collection[str] = ()) -> Measured:
    what = f"{path.relative_to(ROOT)}{part}"
    of_file = None if commit else printed_by("git", "log", "-1", "--format=%H", "--", str(path))
    return Measured(what, commit or of_file or None, bool(commit), tuple(keys))


def everything_measured() -> list[Measured]:
    """All stored results and tables of the repository."""
    found = []
    for path in sorted(RESULTS.rglob("*.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        if path.parent.name == "profile":
            found += [_measured(path, f" {name}", entry.get("commit")) for name, entry in content.items()]
        elif path.parent.name != "before":
            found.append(_measured(path, "", content["environment"].get("commit")))
    for path in sorted(TABLES.glob("*.json")):
        by_commit: dict[str | None, list[str]] = {}
        for key, entry in json.loads(path.read_text())["measured"].items():
            by_commit.setdefault(entry.get("commit"), []).append(key)
        found += [_measured(path, "", commit, keys) for commit, keys in by_commit.items()]
    return found


def is_here(commit: str | None) -> bool:
    """Whether this repository has the commit."""
    return commit is not None and printed_by("git", "cat-file", "-e", f"{commit}^{{commit}}") is not None


def describe(measured: Measured) -> str:
    """The kernels, or the table's entries, that have changed since the measurement, as text."""
    commit = measured.commit
    if commit is None or not is_here(commit):
        return f"{measured.what}: measured at commit {commit or 'unknown'}, which is not here: its changes are unknown"
    before, after = code_at(commit), code_at(None)
    stale = changed(before, after, after.kernels)
    source = "" if measured.said else ", the file's last commit: the file names none"
    lines = [f"{measured.what} (commit {commit[:10]}{source}): {len(stale)} of {len(after.kernels)} kernels have changed"]
    if not measured.keys:
        by_file: dict[str, list[str]] = {}
        for name in stale:
            by_file.setdefault(after.kernels[name], []).append(name)
        return "\n".join(lines + [f"  {path}: {', '.join(names)}" for path, names in by_file.items()])
    for key in measured.keys:
        rules, kernels = OPERATIONS[key.split()[0]]
        if reasons := changed(before, after, (*rules, *kernels)):
            lines.append(f"  {key}: {', '.join(reasons)}")
    return "\n".join(lines)


def last_commit() -> str | None:
    """Commit of the newest report in the repository. If the report names none: the last one up to its date."""
    dated: list[tuple[str, str | None]] = []
    for path in sorted(RESULTS.rglob("*.json")):
        environment = json.loads(path.read_text()).get("environment", {})
        named = re.search(r"\d{4}-\d{2}-\d{2}", path.stem)
        date = environment.get("date") or (named and named[0])
        if date:
            commit = environment.get("commit") or printed_by("git", "rev-list", "-1", f"--before={date}", "HEAD")
            dated.append((date, commit))
    return max(dated)[1] if dated else None


def changed_files(commit: str | None) -> list[str] | None:
    """Files of the working tree that differ from a commit's; None if the commit is not known here."""
    if commit is None or not is_here(commit):
        return None
    tracked = printed_by("git", "diff", "--name-only", "--diff-filter=d", commit)
    untracked = printed_by("git", "ls-files", "--others", "--exclude-standard", "--full-name", ":/")
    return None if tracked is None or untracked is None else [*tracked.splitlines(), *untracked.splitlines()]


def all_tests() -> list[str]:
    """Paths of all test files, those of the kernels first, those of the benchmarks last."""
    paths = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py")]
    order = ["tests/kernels", "tests", "tests/alexnet_triton", "tests/benchmarks"]
    return sorted(paths, key=lambda p: (order.index("/".join(p.split("/")[:-1][:2])), p))


def tests_of(files: Collection[str] | None) -> list[str]:
    """The test files that a change of ``files`` may break; all if ``files`` is None.

    A module touches the tests in the folder that mirrors its own, and every test that names it. A helper of tests touches
    every test that names it.
    """
    tests = all_tests()
    if files is None:
        return tests
    texts = {test: (ROOT / test).read_text() for test in tests}
    if "tests/conftest.py" in files:
        return tests
    chosen = set(files) & texts.keys()
    for path in map(Path, set(files) - chosen):
        if path.suffix == ".py" or path.parent == TABLES.relative_to(ROOT):
            # A folder's __init__.py and its tables are looked up by the folder's name.
            name = path.stem if path.suffix == ".py" and path.stem != "__init__" else path.parent.name
            mirror = f"tests/{path.parent}/"
            chosen |= {test for test, text in texts.items() if test.startswith(mirror) or re.search(rf"\b{name}\b", text)}
    return [test for test in tests if test in chosen]


def main() -> None:
    """Print the changes since each stored measurement."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    for measured in everything_measured():
        print(describe(measured))


if __name__ == "__main__":
    main()
