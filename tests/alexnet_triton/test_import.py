"""Importing: light, and clear about a foreign package called ``kernels``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path[:0] = {[str(p) for p in paths]}\n{code}"
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, cwd="/")


def test_import_needs_only_torch_triton_and_numpy() -> None:
    code = (
        "for name in ('typer', 'rich', 'matplotlib', 'torchvision'): sys.modules[name] = None\n"
        "import alexnet_triton, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(alexnet_triton.__version__)"
    )
    result = _python(code, ROOT)
    assert result.returncode == 0, result.stderr


def test_the_command_line_without_its_extras_says_what_to_install() -> None:
    code = "sys.modules['typer'] = None\nfrom alexnet_triton.__main__ import main; main()"
    result = _python(code, ROOT)
    assert result.returncode == 1
    assert "pip install 'alexnet-triton[train]'" in result.stderr


def test_a_foreign_kernels_package_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(repo): ...\n")
    result = _python("import alexnet_triton", tmp_path, ROOT)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "alexnet-triton" in last
    assert "Hugging Face's distribution `kernels`" in last
    assert str(tmp_path) in last
