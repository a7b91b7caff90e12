"""The site of these pages: Sphinx reads their Markdown by MyST, and every link that leads nowhere ends the build.

`make docs` builds it in `build/site`. The navigation is the lists of index.md, so that their order stands once.
"""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

project = "dualign"
author = "The dualign authors"
project_copyright = "The dualign authors. Apache-2.0"
release = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser"]
exclude_patterns = ["*.py"]
nitpicky = True
suppress_warnings = ["myst.header"]  # examples and reference pages skip a level where a level would be empty

myst_heading_anchors = 4  # links to headings are as in the repository: #the-heading
myst_links_external_new_tab = False

html_theme = "furo"  # system fonts, no script or font from elsewhere
html_title = "dualign"
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"


def setup(app: Sphinx) -> None:
    """The navigation, from the lists of the index."""
    app.connect("source-read", _add_navigation)


def _add_navigation(_: Sphinx, name: str, source: list[str]) -> None:
    if name != "index":
        return
    parts = re.split(r"^## (.+)$", source[0], flags=re.MULTILINE)
    for caption, body in zip(parts[1::2], parts[2::2], strict=True):
        pages = dict.fromkeys(re.findall(r"\]\(([^)#]+)\.md\)", body))
        source[0] += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"
