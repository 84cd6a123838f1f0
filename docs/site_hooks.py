"""MkDocs hooks: pages from outside of `docs/`, and links that work on the site and on a forge.

Documents link to each other and to source files by relative paths. On the site, documents of the repository's
root become pages, and links to files that are not on the site become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
#: Documents outside of `docs/` and their pages on the site.
MOUNTED = {
    "README.md": "index.md",
    "jobs/README.md": "project/jobs.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the documents of `MOUNTED`."""
    from mkdocs.structure.files import File  # tests rewrite links without MkDocs

    for source, page in MOUNTED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page's text with links relative to its place on the site."""
    sources = {site: source for source, site in MOUNTED.items()}
    name = page.file.src_uri
    return rewrite_links(markdown, source=sources.get(name, f"docs/{name}"), page=name)


def rewrite_links(markdown: str, *, source: str, page: str) -> str:
    """Return `markdown` with each relative link rewritten for the site.

    Args:
        markdown: the text of the document.
        source: path of the document in the repository.
        page: path of its page below the site's root.
    """

    def replace(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        if path.startswith("docs/"):
            site = path.removeprefix("docs/")
        elif path in MOUNTED:
            site = MOUNTED[path]
        else:
            return text
        relative = posixpath.relpath(site, posixpath.dirname(page) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return _LINK.sub(replace, markdown)
