"""Pictures and tables for eyes and other programs: made from timelines and rows of values, and from nothing else."""
