"""A survey of an emulated device that takes seconds: probes of every kind of operator, tiny."""

from executor.calibrate.device_survey import Effort
from executor.calibrate.probes import Probe
from executor.calibrate.survey import LLAMA

GEMM_SIZE = 64
PROBES = (
    Probe(64, 16, 2, layers=1, head_dim=16),
    Probe(64, 32, 2, layers=1, head_dim=16, attention="blocked"),
    Probe(32, 16, 2, layers=1, head_dim=16, clip_norm=1e-3),
    Probe(64, 32, 2, layers=1, head_dim=16, sizes=LLAMA),
    Probe(128, 32, 1, layers=1, head_dim=32),
)
EFFORT = Effort(
    probes=PROBES,
    shares=(("float32", 0.3), ("bfloat16", 0.2), ("tf32", 0.1)),
    exchange_seconds=0.3,
    copy_sizes=(1 << 12, 1 << 16, 1 << 20),
    direct_sizes=(1 << 9, 1 << 12, 1 << 15),
    stall_bytes=1 << 20,
)
