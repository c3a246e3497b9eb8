"""``python -m alexnet_triton``: the same as the command ``alexnet-triton``."""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path


def _can_be_made(folder: Path) -> bool:
    """Whether this process can write in ``folder``, or in the nearest folder above it that is there."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _own_temporary_folder() -> Path:
    """A folder for this user alone, the same one every time: what lies in it is loaded as code."""
    folder = Path(tempfile.gettempdir(), f"alexnet-triton-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="alexnet-triton-"))  # somebody else has taken the name


def _place_caches() -> None:
    """Give Triton and matplotlib folders for their caches where there is no home folder, and torch a name for the user.

    A container whose user is any number has no entry for it in /etc/passwd, and no HOME or one that it cannot write: Triton
    would make a folder called ~ here, or end with a traceback. What the environment names already stays.
    """
    home = Path(os.path.expanduser("~"))
    caches = {"TRITON_HOME": home / ".triton", "MPLCONFIGDIR": home / ".config/matplotlib"}
    try:
        for variable, folder in caches.items():
            if not os.environ.get(variable) and not (home.is_absolute() and _can_be_made(folder)):
                os.environ[variable] = str(_own_temporary_folder())
    except OSError:
        pass  # nothing can be written anywhere: what has to be will say so
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid_{os.getuid()}"


def main() -> None:
    """Run the command line, or say what to install for it."""
    _place_caches()
    try:
        from .cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "matplotlib"):
            raise
        sys.exit(f"alexnet-triton: the command line needs {error.name}: pip install 'alexnet-triton[train]'")
    run()


if __name__ == "__main__":
    main()
