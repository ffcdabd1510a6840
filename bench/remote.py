"""A worker seen from outside: a process that runs while it is asked something and is stopped otherwise."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1800  # seconds for an answer; a conversion of a large model takes minutes


class Remote:
    """A process of `bench.worker`. Its answers are dicts; one with "error" or "skipped" tells why there is none.

    Between questions the process has SIGSTOP: threads of an idle engine may spin, and would take the others' time.
    """

    def __init__(self, engine: str, variant: str, threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", engine, variant],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                start_new_session=True,  # a process that ends may wake what is stopped in its group
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            )
        self.log = log
        self.warm: set[str] = set()  # metrics that ran once
        self.hello = self._answer()
        self._signal("SIGSTOP")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Wakes the process, has it call a method of `Worker`, and stops it again."""
        assert self.process.stdin is not None
        self._signal("SIGCONT")
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        found = self._answer()
        self._signal("SIGSTOP")
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self._signal("SIGCONT")
        try:
            self.process.communicate(timeout=30)  # no more questions: it returns
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self.process.kill()
            return {"error": f"no answer within {TIMEOUT} seconds; see {self.log.name}"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._ended()

    def _ended(self) -> dict[str, Any]:
        return {"error": f"its process ended with code {self.process.wait()}; see {self.log.name}"}

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self.process.poll() is None:
            self.process.send_signal(getattr(signal, name))
