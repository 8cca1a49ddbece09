"""Experiments: one function each, returning a frozen record."""
