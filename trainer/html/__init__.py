"""Write pages that need nothing but themselves: no network, no other file, and no markup out of anybody's text."""

from trainer.html.page import as_json, assemble, check_target
from trainer.html.text import text, visible

__all__ = ["as_json", "assemble", "check_target", "text", "visible"]
