"""Tables of tuned configs for common GPUs, one JSON file each: see `numflash.selection.store`."""
