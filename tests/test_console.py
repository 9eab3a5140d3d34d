"""Progress is for terminals; messages go to stderr."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios

from derc.console import Console

SCRIPT = """
import time
from derc.console import Console
c = Console()
assert c.interactive
assert list(c.track(range(5), 'counting', 5)) == list(range(5))
with c.status('thinking'):
    time.sleep(3)
"""


def test_no_bars_where_there_is_no_terminal(capsys):
    console = Console()
    assert list(console.track(range(3), "x")) == [0, 1, 2]
    with console.status("x"):
        console.say("hello")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")
    Console(quiet=True).say("nothing")
    assert capsys.readouterr().err == ""


def test_a_swallowed_interrupt_is_raised_at_the_next_step():
    script = (
        "import os, signal\nfrom derc.console import Console\nc = Console()\nc.listen()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
        "try:\n    list(c.track([1], 'x'))\nexcept KeyboardInterrupt:\n    print('raised')\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "raised\n"


def test_bars_and_clock_on_a_terminal():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    run = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    assert run.wait() == 0
    assert b"counting" in seen
    assert b"thinking \xe2\x80\xa6 2 s" in seen, seen
