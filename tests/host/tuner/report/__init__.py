"""The tuner's presentation of its results."""
