"""The public functions and the two commands that report."""
