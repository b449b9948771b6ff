"""A call: its arguments, the kernels it needs, and their launches."""
