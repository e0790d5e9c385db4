"""What the simulator says beside what is true: `python -m benchmarks.truth`, or `make truth`."""
