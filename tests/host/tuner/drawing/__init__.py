"""The drawing of the tuner's pages."""
