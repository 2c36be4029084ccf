"""Methods that change attention inside the language model and drop nothing, one line each, in the order of tables."""

from .var import VAR as VAR
