"""The simulator beside others, on one machine, in one run: `python -m benchmarks.peers`."""
