"""Which kernel runs, with which config and geometry, and why."""
