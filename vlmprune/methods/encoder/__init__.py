"""Methods that reduce tokens inside the vision tower, one line each, in the order of tables."""

from .tome import ToMe as ToMe
