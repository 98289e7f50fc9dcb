"""Sphinx builds the documentation: `make docs`."""

import importlib.metadata
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from docutils.utils.math.unichar2tex import uni2tex_table

HERE = Path(__file__).parent

project = "manifold_nets"
version = release = importlib.metadata.version("manifold_nets")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"manifold_nets {release}"
html_math_renderer = "mathml"
html_show_copyright = False
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False


def write_reports(app):
    """Copy the stored reports of experiments into the documentation."""
    reports = HERE / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    shutil.copytree(HERE.parent / "examples" / "results", reports)
    for report in reports.glob("*.md"):
        text = report.read_text(encoding="utf-8")
        if not text.startswith("# "):
            report.write_text(f"# {report.stem}\n\n{text}", encoding="utf-8")


def link_reports(app, page, source):
    """Let links to stored reports, as they stand in the repository, lead to their pages."""
    source[0] = source[0].replace("](../examples/results/", "](reports/")


def write_formula(self, node):
    """Write a formula as MathML, which browsers show without a script from elsewhere."""
    text = node.astext().replace(r"\Big", "").translate(uni2tex_table | {ord("·"): r"\cdot "})
    self.body.append(tex2mathml(text, as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app):
    """Register what is particular here."""
    app.connect("builder-inited", write_reports)
    app.connect("source-read", link_reports)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
