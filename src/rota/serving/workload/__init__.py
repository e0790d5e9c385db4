"""Work as it arrives: traces read from files, and synthetic ones drawn from named streams."""
