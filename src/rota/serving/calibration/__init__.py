"""Fits a step-time profile from what a live engine's steps were made of, and says what the profile is worth."""
