"""The compiler and its cache."""
