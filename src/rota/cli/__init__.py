"""The command line: one file a verb. Data goes to stdout, talk to stderr."""
