"""What holds for every test."""

from hypothesis import settings

# A machine that others use may stop for a second at any moment, so that no example has a deadline.
settings.register_profile("rota", deadline=None)
settings.load_profile("rota")
