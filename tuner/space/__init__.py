"""What can be chosen: configs, budgets, GPUs, and the class that is tuned."""
