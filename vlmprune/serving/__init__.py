"""Servers whose model is pruned, one engine a file."""
