"""PyTorch in processes of its own, stepping on demand: the other side of the pairs that `bench.py` times."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Torch:
    """A PyTorch process (or a DDP group of them) that runs a step whenever it is told to."""

    def __init__(
        self, python: str, sizes: Iterable[int], *, compiled: bool = False, ranks: int = 1, **variables: str
    ) -> None:
        port = str(20000 + os.getpid() % 20000 + ranks)
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | variables
        command = [
            python,
            str(Path(__file__).with_name("torch_step.py")),
            *map(str, sizes),
            *(["--compile"] if compiled else []),
        ]
        self.processes = [
            subprocess.Popen(
                [*command, f"--ranks={ranks}", f"--rank={rank}"], env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        facts = [json.loads(self._line(p).removeprefix("ready ")) for p in self.processes]
        self.facts: dict[str, Any] = facts[0]

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the PyTorch process ended; run tests/torch_step.py by hand to see why")
        return line

    def step(self) -> float:
        """Seconds of one step, the slowest rank's."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return max(float(self._line(process)) for process in self.processes)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.communicate()
