"""numflash-tune: finds, proves and remembers the best config of each kernel on each GPU.

Installed as the package `numflash_tuner`. `numflash` never imports it.
"""

SAMPLERS = ("tpe", "grid", "random", "cmaes")
"""Ways to search, by name."""
