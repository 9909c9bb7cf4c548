"""Declarative search spaces, and the loader that explains what is wrong with one."""
