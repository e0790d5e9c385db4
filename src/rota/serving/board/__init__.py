"""What goes on now, for people to look at: instances, tenants, classes, the last refusals."""
