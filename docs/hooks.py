"""Files of the repository that the site shows, too: each stays where it is, and its links work in both places."""

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
PAGES = "docs/pages/"
# By their paths in the repository, the names they have in the site.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
    ".github/CONTRIBUTING.md": "contributing.md",
    "benchmarks/NOTES.md": "notes.md",
    "benchmarks/results/numerics.md": "numerics.md",
    "benchmarks/accuracy/RESULTS.md": "accuracy.md",
    **{f"benchmarks/accuracy/{image.name}": image.name for image in (ROOT / "benchmarks/accuracy").glob("*.png")},
    **{f"benchmarks/results/{image.name}": image.name for image in (ROOT / "benchmarks/results").glob("*.png")},
}
LINK = re.compile(r"(?<=\]\()[^)#:\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, name in SHOWN.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Relative links, which are those of the repository, to what the site calls it."""
    own = next((path for path, name in SHOWN.items() if name == page.file.src_uri), PAGES + page.file.src_uri)

    def in_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), link.group()))
        return SHOWN.get(path, path.removeprefix(PAGES) if path.startswith(PAGES) else link.group())

    return LINK.sub(in_site, markdown)
