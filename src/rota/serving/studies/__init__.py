"""Questions that take many simulations to answer: which stack, how large a fleet, what a parameter does."""
