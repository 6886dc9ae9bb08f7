"""How Sphinx builds these pages into a site: `make docs`.

The pages are Markdown, read by MyST. Pages that begin with a `kernelspec` are notebooks: their `{code-cell}` blocks run
while the site is built, and run again only after the page or the library has changed.

The build uses no network, and neither does the site: fonts are the system's, formulas are MathML. With
MASKHOOKS_DOCS_INTERSPHINX=1 the build fetches the indexes of Python, PyTorch and others, and links to their pages.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from nbclient import NotebookClient
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.roles import XRefRole
from sphinx.util.docutils import SphinxTranslator

from maskhooks import errors

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_extensions"))

project = "maskhooks"
release = version = metadata.version(project)
copyright = "the maskhooks developers, MIT licence"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "settings_tables",
]
exclude_patterns = ["_build"]
nitpicky = True
default_role = "name"  # single backticks in docstrings: a link where the name is documented here
smartquotes = False

# Pages

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "mathml"


def _patient(client: NotebookClient, *args: Any, **settings: Any) -> None:
    """Gives a kernel five minutes to start, which a busy machine needs; MyST-NB has no setting for it."""
    _make(client, *args, **{"startup_timeout": 300, **settings})


_make, NotebookClient.__init__ = NotebookClient.__init__, _patient


def _library() -> str:
    """A digest of all our code, so that notebooks run again after it has changed."""
    digest = hashlib.sha256()
    for folder in ("maskhooks", "adapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


nb_execution_in_temp = True
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "docs" / "notebooks" / _library())
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of other libraries as they are imported

# The reference

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = napoleon_attr_annotations = False
napoleon_custom_sections = [("Options of wrap", "params_style")]
copybutton_prompt_text = r"^\$ "

suppress_warnings = ["ref.python"]  # a kind in an annotation, such as metric, is also the name of attributes
nitpick_ignore_regex = [("py:.*", r"maskhooks.*\.(_\w+|[A-Z])")]  # private names and type variables in signatures
if os.environ.get("MASKHOOKS_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "pandas": ("https://pandas.pydata.org/docs", None),
        "matplotlib": ("https://matplotlib.org/stable", None),
    }

# The site

html_theme = "pydata_sphinx_theme"
html_title = "maskhooks"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "logo": {"text": "maskhooks"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
}


# Files of the repository that are pages of the site too

COPIES = {"project/contributing": "CONTRIBUTING.md", "project/changelog": "CHANGELOG.md"}


def copied(app: Sphinx, docname: str, source: list[str]) -> None:
    """The text of a file at the root in place of the page that stands for it, with links as they are from there."""
    if docname not in COPIES:
        return
    path = ROOT / COPIES[docname]
    app.env.note_dependency(str(path))
    text = path.read_text(encoding="utf-8").replace("](docs/", "](../")
    for page, name in COPIES.items():
        text = text.replace(f"]({name})", f"]({Path(page).name}.md)")
    source[0] = text


# Names in docstrings


class Name(XRefRole):
    """`a name` in single backticks: a link where it is documented here, and code otherwise."""

    def process_link(
        self, env: BuildEnvironment, refnode: nodes.Element, has_explicit_title: bool, title: str, target: str
    ) -> tuple[str, str]:
        for key in ("py:module", "py:class"):
            refnode[key] = env.ref_context.get(key)
        return title, target


def resolved(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Where a name leads: as it stands, as one of maskhooks, or nowhere, where it belongs to another library."""
    python = env.get_domain("py")
    target, kind = node.get("reftarget", ""), node["reftype"]
    if kind == "name" or node.get("refdomain") == "py":
        for name in (target, f"maskhooks.{target}", f"maskhooks.errors.{target}"):
            found = python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
            if found is not None:
                return found
    if kind == "name" or (node.get("refdomain") == "py" and not target.startswith("maskhooks")):
        return contnode
    return None


def told(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An error's entry leads to its page."""
    if isinstance(obj, type) and obj.__module__ == errors.__name__:
        page = re.sub(r"(?<!^)(?=[A-Z])", "-", obj.__name__).lower()
        lines += ["", f":doc:`Symptom, cause and fix </reference/errors/{page}>`"]


# Formulas


def inline(self: SphinxTranslator, node: nodes.math) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def displayed(self: SphinxTranslator, node: nodes.math_block) -> None:
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_role("name", Name(innernodeclass=nodes.literal))
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    app.connect("source-read", copied)
    app.connect("missing-reference", resolved)
    app.connect("autodoc-process-docstring", told)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
