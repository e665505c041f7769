"""Results as HTML figures in which nouns light their masks and masks their nouns."""

from gella.pictures.html_figure import SCRIPT, STYLE, grounding_html, page, panoptic_html

__all__ = ["SCRIPT", "STYLE", "grounding_html", "page", "panoptic_html"]
