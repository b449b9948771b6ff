"""What the tuner shows of its results."""
