"""``python -m alexnet_triton``: the same as the command ``alexnet-triton``."""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path


def _can_be_made(folder: Path) -> bool:
    """Whether this process can write in ``folder``, or in its nearest existing parent."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _own_temporary_folder() -> Path:
    """A folder that only this user can write to, because its files are loaded as code; normally the same one every time."""
    folder = Path(tempfile.gettempdir(), f"alexnet-triton-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="alexnet-triton-"))  # another user has taken the name


def _place_caches() -> None:
    """Set cache folders for Triton and matplotlib if there is no usable home folder, and a user name for torch.

    In a container that runs as an arbitrary user id, /etc/passwd has no entry for the user, and HOME is unset or not writable.
    Triton would then create a folder called ~ here, or end with a traceback. Variables that are set already are kept.
    """
    home = Path(os.path.expanduser("~"))
    caches = {"TRITON_HOME": home / ".triton", "MPLCONFIGDIR": home / ".config/matplotlib"}
    try:
        for variable, folder in caches.items():
            if not os.environ.get(variable) and not (home.is_absolute() and _can_be_made(folder)):
                os.environ[variable] = str(_own_temporary_folder())
    except OSError:
        pass  # nothing is writable: whatever has to write will report it
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid_{os.getuid()}"


def main() -> None:
    """Run the command line, or name the package that it lacks."""
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
