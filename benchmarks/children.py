"""Networks examined in child processes, each under a time and a memory limit."""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.1


def child(name: str, path: str, onnx: bool) -> None:
    """Examine one network and keep the row in the file at `path`, also where it fails."""
    import torch

    from benchmarks.exactness import examine, make, source_line
    from derc.errors import DercError

    torch.set_num_threads(1)
    known: dict[str, Any] = {}

    def tell(row: dict[str, Any]) -> None:
        known.update(row, peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        temporary = Path(f"{path}.new")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(path)

    try:
        tell(examine(lambda: make(name), onnx=onnx, tell=tell))
    except Exception as error:  # noqa: BLE001  any library may raise anything, and the reason is the result
        step = "onnx_reason" if "train_exact" in known else "reason"
        known.setdefault(step, str(error) if isinstance(error, DercError) else source_line(error))
        tell({"onnx_parity": False} if step == "onnx_reason" else {})


class Job:
    """One child process, watched."""

    def __init__(self, name: str, folder: Path, onnx: bool) -> None:
        self.name, self.path, self.start = name, folder / f"{name.replace('/', '_')}.json", time.monotonic()
        context = multiprocessing.get_context("forkserver")
        self.process: BaseProcess = context.Process(target=child, args=(name, str(self.path), onnx))
        self.process.start()
        self.killed = ""

    def done(self, limit_s: float, limit_mb: float) -> bool:
        """Whether it has ended; it is killed where it is over a limit."""
        if not self.process.is_alive():
            return True
        seconds = time.monotonic() - self.start
        try:
            memory = psutil.Process(self.process.pid).memory_info().rss / 1e6
        except psutil.Error:
            return False
        if seconds > limit_s:
            self.killed = f"over the time limit of {limit_s:.0f} s"
        elif memory > limit_mb:
            self.killed = f"over the memory limit of {limit_mb:.0f} MB"
        if self.killed:
            self.process.kill()
            self.process.join()
        return bool(self.killed)

    def row(self) -> dict[str, Any]:
        """What is known of the network, with a reason where it did not come to its end."""
        row = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.process.join()
        problem = self.killed or (f"ended with signal or code {self.process.exitcode}" if self.process.exitcode else "")
        if problem:
            row.setdefault("onnx_reason" if "train_exact" in row else "reason", problem)
            if "train_exact" in row:
                row["onnx_parity"] = False
        return {"name": self.name, **row, "seconds": round(time.monotonic() - self.start, 1)}


def run(names: list[str], state: Path, *, jobs: int, onnx: bool, limit_s: float, limit_mb: float) -> None:
    """Examine `names`, `jobs` at a time, and append their rows to `state`."""
    waiting, running = list(names), list[Job]()
    with tempfile.TemporaryDirectory() as folder, state.open("a", encoding="utf-8") as file:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Job(waiting.pop(0), Path(folder), onnx))
            time.sleep(POLL_S)
            for job in [job for job in running if job.done(limit_s, limit_mb)]:
                running.remove(job)
                row = job.row()
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{len(waiting) + len(running):>5} left  {_brief(row)}", file=sys.stderr)


def _brief(row: dict[str, Any]) -> str:
    reason = row.get("reason") or row.get("onnx_reason") or "ok"
    return f"{row['name']:<44} {row['seconds']:>7.1f} s  {reason}"
