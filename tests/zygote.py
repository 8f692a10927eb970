"""Starts medbridge processes quickly: imports everything once, then forks a child for each line of its input.

Not a test: the `processes` fixture runs it. A line is `{"argv": [...], "log": FILE}`, where argv is what would follow
`python -m` (`["medbridge.cli", "run", ...]`) or begins with a script's path; the answer is the child's process id. A
line `{"wait": PID}` is answered with that child's exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback

import medbridge.pipeline
import medbridge.report  # noqa: F401


def child(argv: list[str], log: str) -> int:
    """Run a module or script as the main program, with its output in `log`; its exit code."""
    with open(os.devnull) as nothing, open(log, "ab") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # a shell starts background jobs with Ctrl-C ignored, and that is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = argv
    try:
        if argv[0].endswith(".py"):
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            _, status = os.waitpid(task["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = child(task["argv"], task["log"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
