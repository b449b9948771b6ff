"""How accurate FP8 attention is, and its tables and figure."""
