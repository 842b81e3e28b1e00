"""The process in which contenders run: ``python -m benchmarks.worker``, told what to do by lines of JSON on stdin.

Runs in every environment, so only the standard library is imported here; a contender's class brings what it needs.
The answers go to what was stdout; whatever the contenders' libraries print goes to stderr.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

from benchmarks.work import Work


class Contenders:
    """The contenders of this process, by name."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do one of: load, warm, run, values, close."""
        verb, name = question["verb"], question["name"]
        if verb == "load":
            work = getattr(importlib.import_module(question["module"]), question["work"])(**question["settings"])
            work.prepare()
            self._works[name] = work
            return {}
        work = self._works[name]
        if verb == "warm":
            work.warm()
        elif verb == "run":
            return self._run(work, question["round"])
        elif verb == "values":
            return {"arrays": self._save(work, question["path"])}
        elif verb == "close":
            self._works.pop(name).close()
        else:
            raise ValueError(f"no such verb: {verb!r}")
        return {}

    def _run(self, work: Work, round_: int) -> dict[str, Any]:
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        extra = work.run(round_)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        own = dict(extra or {})
        return {"wall_s": own.pop("wall_s", wall), "cpu_s": own.pop("cpu_s", cpu), "extra": own}

    def _save(self, work: Work, path: str) -> list[str]:
        values = work.values()
        if values:
            import numpy as np

            np.savez(path, **{name: np.asarray(value) for name, value in values.items()})
        return list(values)

    def close(self) -> None:
        """Close every contender that is left."""
        for work in self._works.values():
            work.close()


def main() -> None:
    """Answer questions until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    contenders = Contenders()
    try:
        for line in sys.stdin:
            try:
                answer = contenders.answer(json.loads(line))
            except Exception as error:  # noqa: BLE001 - told to the harness, which goes on without this contender
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        contenders.close()


if __name__ == "__main__":
    main()
