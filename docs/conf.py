"""The site of the documentation: make docs."""

from megatron_skyladder import __version__

project = "megatron-skyladder"
release = version = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"megatron-skyladder {__version__}"
html_show_copyright = False
html_show_sphinx = False
exclude_patterns = ["_build", "measured"]
myst_heading_anchors = 3
myst_enable_extensions = ["smartquotes"]
smartquotes = False  # Sphinx's own, which would make a dash of the -- of a flag
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]  # <Megatron's flags> is no shell
