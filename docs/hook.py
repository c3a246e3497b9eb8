"""Adds files outside of docs/ to the built pages: README.md as the first page, and every file that a page links to.

So a relative link works both on GitHub and in the built pages. MkDocs calls these functions by their names.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FIRST = "README.md"

#: A fenced block or inline code, which has no links; or the beginning of a link and its target without the anchor.
_CODE_OR_LINK = re.compile(r"^```.*?^```$|`[^`\n]+`|(\]\(|src=\")([^)\s\"#:]+)(?=[)\"#])", re.MULTILINE | re.DOTALL)


def _source(path: str) -> str:
    """The path among MkDocs' sources of the repository's file ``path``."""
    return "index.md" if path == FIRST else path.removeprefix("docs/")


def _with_links(text: str, path: str, change: Callable[[str], str]) -> str:
    """``text`` of the file ``path`` with each relative link's target replaced; ``change`` gets it as a repository path."""

    def changed(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return match[1] + change(posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2])))

    return _CODE_OR_LINK.sub(changed, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page and, page by page, the linked files outside of docs/."""
    known = {f"docs/{file.src_uri}" for file in files}
    pages = [FIRST, *sorted(path for path in known if path.endswith(".md"))]
    wanted = [FIRST]

    def want(path: str) -> str:
        if path not in known and path not in wanted and (ROOT / path).is_file():
            wanted.append(path)
            pages.extend([path] * path.endswith(".md"))
        return path

    for page in pages:  # the list grows meanwhile
        _with_links((ROOT / page).read_text(encoding="utf-8"), page, want)
    for path in wanted:
        files.append(File.generated(config, _source(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point the page's links to their targets among MkDocs' sources."""
    assert page.file.abs_src_path is not None
    path = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    folder = posixpath.dirname(page.file.src_uri) or "."
    return _with_links(markdown, path, lambda target: posixpath.relpath(_source(target), folder))


def on_page_content(html: str, **_: object) -> str:
    """Remove Sphinx's roles from the names in docstrings."""
    return re.sub(r":(?:class|func|meth|mod|attr|data):(?=<code>)", "", html)
