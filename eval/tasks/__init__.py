"""Embedded lmms-eval tasks: questions about procedural scenes, with local data."""
