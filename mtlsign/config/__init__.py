"""Settings classes and the command line."""
