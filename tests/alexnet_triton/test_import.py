"""Importing needs few packages, has no side effects and reports a foreign package ``kernels``. Calls that no code may make."""

from __future__ import annotations

import ast
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


def test_no_module_opens_a_socket_or_starts_a_process_when_it_is_imported() -> None:
    """A command that needs neither does not do it either. An audit hook of Python sees each attempt, in any module."""
    code = (
        "import importlib, pkgutil\n"
        "def refuse(event, arguments):\n"
        "    if event.startswith(('socket.', 'subprocess.', 'os.system', 'os.posix_spawn', 'os.exec', 'os.fork', 'urllib.')):\n"
        "        raise AssertionError(f'{event} {arguments}')\n"
        "import torch, triton, torchvision\n"  # imported before the hook: their own imports are not tested
        "sys.addaudithook(refuse)\n"
        "import alexnet_triton, kernels\n"
        "for package in (kernels, alexnet_triton):\n"
        "    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):\n"
        "        importlib.import_module(module.name)\n"
        "sys.argv = ['alexnet-triton', 'summary', '--json']\n"
        "try: alexnet_triton.cli.app.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "import socket\n"
        "try: socket.socket()\n"
        "except AssertionError: print('refused')\n"
    )
    result = _python(code, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "refused"  # the hook does notice a socket


#: Calls that execute data as code, and calls that start programs. (``alexnet-triton explain`` imports a module that the user
#: names; that is its purpose.)
_RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "yaml.load", "runpy.run_path", "subprocess.run"),
    *("subprocess.Popen", "subprocess.call", "subprocess.check_output", "numpy.load", "np.load", "torch.jit.load"),
}


def _calls(source: str) -> set[str]:
    """The dotted names of all calls; ``torch.load`` without ``weights_only=True`` gets a question mark."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            careful = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            found.add(name + "?" * (name == "torch.load" and not careful))
    return found


def test_nothing_that_is_read_can_run() -> None:
    for path in (*(ROOT / "kernels").rglob("*.py"), *(ROOT / "alexnet_triton").rglob("*.py")):
        assert not _calls(path.read_text()) & (_RUNS_CODE | {"torch.load?"}), path
    assert _calls("torch.load(p, weights_only=False); np.load(q)(3)") >= {"torch.load?", "np.load"}


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
