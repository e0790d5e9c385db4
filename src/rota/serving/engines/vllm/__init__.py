"""vLLM as an engine: the scheduler plug-in, the real scheduler under a virtual clock, and the server's command line.

Importing this package imports no vLLM; `plugin` and `virtual` do.
"""
