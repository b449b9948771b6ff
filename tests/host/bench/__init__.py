"""Tests of bench/ that need neither GPU nor simulator."""
