"""The site: ``sphinx-build docs site``, or ``softlms gallery``. Notebooks are shown as committed, never executed."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import softlms
from softlms.workbook.gallery import write_pages

project = "softlms"
release = softlms.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]
default_role = "py:obj"

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would come from the net
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
add_module_names = False
numpydoc_show_class_members = False

ALONE = ("getting_started", "results", "figures", "workbook", "design")  # pages that have none below them

html_theme = "pydata_sphinx_theme"
html_title = "softlms"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_math_renderer = "mathml"
html_theme_options = {
    "navigation_with_keys": False,
    "header_links_before_dropdown": 6,
    # not on notebooks: their code is wide
    "secondary_sidebar_items": {page: ["page-toc"] for page in (*ALONE, "api", "methods/*", "modules/*")},
}
html_context = {"default_mode": "auto"}
html_sidebars = {page: [] for page in ("index", *ALONE)}


def show_math(translator, node):
    """Formulas as MathML: no script, no font from elsewhere."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    # browsers let only one of a norm's bars grow, and set a function's name against its argument: tanhu
    mathml = re.sub(r"<mo[^>]*>‖</mo>", '<mo stretchy="false">‖</mo>', mathml)
    mathml = re.sub(r"<mo>&ApplyFunction;</mo>(?=\s*<mi)", '<mspace width="0.167em" />', mathml)
    translator.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def keep_columns(app, what, name, thing, options, lines):
    """Columns in a module's docstring stay columns."""
    for i in range(len(lines) - 1, 0, -1):
        if what == "module" and re.match(r" {4}.*\S {2,}\S", lines[i]) and not lines[i - 1].startswith(" "):
            lines[i:i] = ["", "::", ""]


def setup(app):
    app.add_config_value("softlms_profile", "laptop", "env")
    app.connect("autodoc-process-docstring", keep_columns, priority=900)
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir), app.config.softlms_profile))
    app.add_html_math_renderer("mathml", inline_renderers=(show_math, None), block_renderers=(show_math, None))
