"""The machine code of numflash's kernels as figures, and two such files compared."""
