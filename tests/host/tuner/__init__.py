"""Tests of tuner/ that need neither GPU nor simulator."""
