"""The app: a page on which a model predicts, and the folder of a Hub Space that shows it."""

from pertstate.app.serving import serve
from pertstate.app.space import write_space


__all__ = ["serve", "write_space"]
