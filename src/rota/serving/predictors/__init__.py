"""Guesses that policies and worlds may ask for. They see the policy API and the base, nothing else."""
