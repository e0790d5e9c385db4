"""What every domain needs and none owns: instants, chance, order, machines, journals, timelines, names and errors."""
