"""The command line on a disk so slow that a signal reaches each process while it saves.

``python slow_disk_worker.py FOLDER train ...``; each process writes its id to ``FOLDER/pid-RANK``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from alexnet_triton.__main__ import main
from alexnet_triton.training import files

if __name__ == "__main__":
    write = files.write

    def slow(path: Path, content: bytes) -> None:
        time.sleep(0.5)
        write(path, content)

    files.write = slow
    (Path(sys.argv.pop(1)) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    main()
