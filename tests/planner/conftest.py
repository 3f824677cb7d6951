"""Fixtures that start MPI."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.launch import find_launcher, is_root, launch_command, launch_environment
from planner.resolve import usable_cores

OUTSIDE = dict(os.environ)


@pytest.fixture
def launch_slow_rank():
    """Run mpi_program_slow_rank.py on two ranks for an axis; what rank 0 found."""

    def run(axis):
        program = [sys.executable, str(Path(__file__).with_name("mpi_program_slow_rank.py")), axis]
        command = launch_command(find_launcher(), 2, program, cores=usable_cores(), root=is_root())
        environment = launch_environment(1, OUTSIDE)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
