"""Tiny multimodal models that are really trained, on procedural scenes, and the five tasks they are measured on."""
