"""What the site needs beside its pages: figures from `results/`, and the examples of docstrings as code."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every figure as `results/NAME`."""
    for figure in sorted((Path(config.docs_dir).parent / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links of the pages in `docs/` to the figures' place in the site."""
    return markdown.replace("](../results/", "](results/") if "/" not in page.file.src_uri else markdown


class Examples(griffe.Extension):
    """Fences the doctests of a docstring, whose `>>>` would be a quotation in Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```python\n\g<0>\n```", obj.docstring.value)
