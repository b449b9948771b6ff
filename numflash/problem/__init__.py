"""The question: a checked problem, its class, 8-bit arrays, the layouts of tensor maps."""
