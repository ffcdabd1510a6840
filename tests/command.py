"""Runs the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

COMMAND = [sys.executable, "-m", "pyengine"]


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This one's, with UTF-8 pipes as on any system, no settings of ours and no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYENGINE_")}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | dict(changes)


def run(*arguments: str, stdin: bytes = b"", **changes: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that isn't on a terminal."""
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, env=environment(changes), timeout=60, check=False
    )
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8").replace("\r\n", "\n")


def the_line(err: str) -> str:
    """The error in a stderr that has nothing else."""
    assert err.startswith("pyengine: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("pyengine: ").rstrip("\n")
