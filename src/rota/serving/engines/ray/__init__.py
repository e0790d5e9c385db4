"""Engines on a Ray cluster. Ray places, supervises and restarts them; nothing here does that again."""
