"""Write the real output of its commands into the README: `make readme`, on an otherwise idle machine.

Each line `<!-- output: COMMAND -->` is followed by a fenced block, which gets what the command prints, run in a fresh
folder with this environment's programs first on PATH. Commands share the folder, so that one reads what another wrote.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
REPOSITORY = README.parent
BLOCK = re.compile(r"<!-- output: (?P<command>[^\n]*) -->\n```text\n.*?```", re.DOTALL)


def expanded(word: str) -> list[str]:
    """A word of a command line; the repository's own files are found from any folder."""
    if not word.startswith("tests/"):
        return [word]
    return sorted(str(path) for path in REPOSITORY.glob(word))


def output_of(command: str, folder: str) -> str:
    """What a command prints on stdout; of mpirun both streams, as its ranks' talk is what there is to see."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    talk = subprocess.STDOUT if command.startswith("mpirun") else None
    done = subprocess.run(
        [word for words in shlex.split(command) for word in expanded(words)],
        cwd=folder,
        env={**environment, "PATH": path, "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=talk,
        text=True,
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def main() -> None:
    """Run every command in order and rewrite the README."""
    with tempfile.TemporaryDirectory() as folder:

        def filled(match: re.Match[str]) -> str:
            command = match["command"]
            return f"<!-- output: {command} -->\n```text\n{output_of(command, folder)}\n```"

        README.write_text(BLOCK.sub(filled, README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
