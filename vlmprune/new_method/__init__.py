"""The start of a method of one's own."""
