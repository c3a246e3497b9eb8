"""Code on the pages runs as printed and prints the output shown below it; the README is short."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch

from alexnet_triton import explain

ROOT = Path(__file__).parents[1]


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Line number and code of each fenced block of ``language`` in a page."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture
def _one_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_one_process_of_torchrun")
@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_snippets_run(name: str) -> None:
    torch._dynamo.reset()
    namespace: dict[str, object] = {}
    snippets = blocks(ROOT / name, "python")
    assert len(snippets) >= 2
    for line, code in snippets:
        # Empty lines before the code, so that a traceback shows the page's own line number.
        exec(compile("\n" * line + code, str(ROOT / name), "exec"), namespace)
        for explained in re.findall(r"print\((?:alexnet_triton\.)?explain\((\w+)\)\)", code):
            printed = next(text for text_line, text in blocks(ROOT / name, "text") if text_line > line)
            assert printed.rstrip("\n") == str(explain(namespace[explained]))  # type: ignore[arg-type]


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    for paragraph in re.split(r"\n{2,}|\n(?=- )", text):
        assert paragraph.startswith("|") or len(paragraph.split()) <= 120, paragraph
