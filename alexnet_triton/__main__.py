"""``python -m alexnet_triton``: the same as the command ``alexnet-triton``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from .cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "matplotlib"):
            raise
        sys.exit(f"alexnet-triton: the command line needs {error.name}: pip install 'alexnet-triton[train]'")
    run()


if __name__ == "__main__":
    main()
