"""The emulated CuPy under CuPy's own name, for processes that import it: put this folder and `tests` on PYTHONPATH.

Sizes at which a GPU is measured are made small as well.
"""

import sys

import emulated_cupy
import small_survey
import widened_kernels

from executor import measure
from executor.calibrate import device_survey as survey

sys.modules["cupy"] = emulated_cupy
sys.modules["executor.cuda"] = widened_kernels.table()
measure.DEVICE_GEMM_SIZE = small_survey.GEMM_SIZE
survey.QUICK = small_survey.EFFORT
