"""Sphinx: ``make docs`` builds the site into ``site/``, readable from disk and without a network."""

from __future__ import annotations

project = "megatron_oisd"
author = "the megatron_oisd authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
exclude_patterns = ["images/*"]
html_theme = "furo"
html_title = "megatron_oisd"
html_show_sourcelink = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
autodoc_mock_imports = ["vllm", "wandb"]
napoleon_numpy_docstring = False
nitpicky = False
suppress_warnings = ["myst.xref_missing", "ref.python", "docutils"]
