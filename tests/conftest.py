"""What holds for every test."""

import signal

from hypothesis import settings

# A machine that others use may stop for a second at any moment, so that no example has a deadline.
settings.register_profile("rota", deadline=None)
settings.load_profile("rota")

# Whoever starts the tests in the background has SIGINT ignored, by them and by all that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
