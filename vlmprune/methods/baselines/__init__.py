"""Baselines that every published method must beat, one line each, in the order of tables."""

# ruff: noqa: I001
from .random import Random as Random
from .uniform import Uniform as Uniform
from .pool import Pool as Pool
