"""Commands of kdstore in forked processes, which begin with its libraries imported and are there to be killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kdstore import cli


def start(arguments: list[str], log: Path) -> int:
    """Begin `kdstore ARGUMENTS` in a forked process, its output added to a file; returns its number."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            with open(log, "ab") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
            sys.argv = ["kdstore", *arguments]
            cli.main()
            status = 0
        except SystemExit as e:
            status = int(e.code or 0)
        finally:
            os._exit(status)
    return pid


def finish(pid: int) -> int:
    """Wait for a process; returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
