"""Rota decides what runs next, where and when, for AI work on scarce accelerators."""

__version__ = "0.1.0"
