"""The space of a search: configs, budgets, GPUs, and the class that is tuned."""
