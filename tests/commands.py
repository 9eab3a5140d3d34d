"""The command line in this process: no package is imported anew, and the store is the session's."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from derc.cli import main


def command(*words: object, cwd: Path | None = None, **environ: object) -> subprocess.CompletedProcess[str]:
    """Run `derc` with these words, in a directory and with environment variables of its own, as its script does."""
    said, told, code = io.StringIO(), io.StringIO(), 0
    given = ["derc", *map(str, words)]
    handler = signal.getsignal(signal.SIGINT)
    with (
        mock.patch.dict(os.environ, {name: str(value) for name, value in environ.items()}),
        mock.patch.object(sys, "argv", given),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(said),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            signal.signal(signal.SIGINT, handler)
    return subprocess.CompletedProcess(given, code, told.getvalue(), said.getvalue())
