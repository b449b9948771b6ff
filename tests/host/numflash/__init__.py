"""Tests of numflash/ that need neither GPU nor simulator."""
