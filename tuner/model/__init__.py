"""The offline model of a kernel's time.

`prediction` puts together what `counts` (instructions by formula), `machine_code` (instructions of
a disassembly), `grid` (blocks and tiles of a problem) and `numflash_tuner.machines` know.
"""

from numflash_tuner.model.prediction import Prediction, estimate, floor_ms, predict

__all__ = ["Prediction", "estimate", "floor_ms", "predict"]
