"""Makes PyTorch's cache of compiled graphs depend on this package's source code.

TorchInductor keeps compiled graphs on disk, for later processes. Its key contains an operator's name. It contains neither the
operator's signature nor the shapes and strides that its fake implementation promised, and the compiled graph relies on all of
them. After an upgrade of this package such a graph would still run, and fail or read an operator's result in the wrong order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch.compiler import config

from .gpu import INTERPRETED


def source_tag(package: Path) -> str:
    """A tag for the Python files of the folder ``package``, of their names and contents, and for the use of the interpreter."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if not path.is_file():  # an editor's lock is a link to nothing
            continue
        source = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(source)}\n".encode())
        digest.update(source)
    # The interpreter runs Hopper's kernels on any GPU; other kernels keep other tensors for the backward pass.
    return f"alexnet_triton-{digest.hexdigest()[:16]}" + "-interpreted" * INTERPRETED


def tag_compiled_graphs() -> None:
    """Add this package's tag to ``torch.compiler.config.cache_key_tag``, beside a tag that the user has set."""
    tag = source_tag(Path(__file__).parents[1])
    # In torch 2.14 an assigned value is of the assigning thread alone, and autograd compiles in threads of its own. The
    # value that the environment gave is of all threads; PyTorch has no public way to set it.
    entry = getattr(config, "_config", {}).get("cache_key_tag")
    if entry is not None and hasattr(entry, "env_value_default"):
        entry.env_value_default = _with(entry.env_value_default, tag)
    config.cache_key_tag = _with(config.cache_key_tag, tag)


def _with(tags: object, tag: str) -> str:
    """``tags`` and ``tag``. PyTorch reads 0 and 1 in the environment as bools; an unset value is an object of its own."""
    before = str(tags) if isinstance(tags, str | int) else ""
    return before if tag in before.split() else f"{before} {tag}".strip()
