"""Commands in a terminal of their own, as a person sees them.

A process with octavo and transformers imported is forked for every command, so that a test does not wait for imports.
``python terminal.py`` is that process: a request is a line of JSON, and so is the answer.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds that a command may be silent


@dataclass
class Session:
    """What became of a command.

    `lines` are what the screen shows at the end, from its first line to its last, `raw` all that was written.
    """

    code: int
    lines: list[str]
    raw: str

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Terminals:
    """The process that is forked."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"} | {
            "PYTHONPATH": os.pathsep.join(sys.path)
        }
        for name in ("COLUMNS", "NO_COLOR", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *arguments: object, keys: list[tuple[str, str]] | None = None, ordinary: bool = False) -> Session:
        """Run ``octavo ARGUMENTS`` in a terminal of 80 columns.

        Args:
            arguments: of the command.
            keys: what is typed, each as soon as a pattern is found in what was printed since the last; "INT" and "TERM"
                are signals.
            ordinary: modes of files count, also where root runs the tests.
        """
        request = {"arguments": [str(a) for a in arguments], "keys": keys or [], "ordinary": ordinary}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Session(answer["code"], shown(answer["raw"]), answer["raw"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def shown(raw: str, columns: int = 80) -> list[str]:
    """The lines that a terminal shows of what was written to it."""
    import pyte

    screen = pyte.Screen(columns, 400)
    pyte.Stream(screen).feed(raw)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


# ---- the process -----------------------------------------------------------------------------------------------------


def _serve() -> None:
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import octavo.cli
    import octavo.finetune
    import transformers

    for name in (
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "LlamaForCausalLM",
        "PreTrainedTokenizerFast",
        "TextStreamer",
    ):
        getattr(transformers, name)
    for line in sys.stdin:
        request = json.loads(line)
        child, terminal = pty.fork()
        if child == 0:
            _command(octavo.cli.main, request)
        code, raw = _watch(child, terminal, request["keys"])
        print(json.dumps({"code": code, "raw": raw}), flush=True)


def _command(main: Any, request: dict[str, Any]) -> None:
    code = 99
    try:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        # Of the process that was forked they are a pipe's, and closed to the terminal.
        for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
        if request["ordinary"]:
            _give_up_privileges()
        sys.argv = ["octavo", *request["arguments"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background ignores it
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _give_up_privileges() -> None:
    """Without capabilities root may do what the modes of its files say, as anybody."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capset(header, none):
        raise OSError("capset failed")


def _watch(child: int, terminal: int, keys: list[tuple[str, str]]) -> tuple[int, str]:
    raw, since, left, begin = "", 0, [*keys], time.monotonic()
    while True:
        silent = not select.select([terminal], [], [], PATIENCE)[0]
        if silent or time.monotonic() - begin > 5 * PATIENCE:  # an answer that no signal stops
            os.kill(child, signal.SIGKILL)
            raw += f"\n{'silent' if silent else 'not ended'} for {time.monotonic() - begin:.0f} s"
            break
        try:
            new = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not new:
            break
        raw += new.decode(errors="replace")
        while left and re.search(left[0][0], raw[since:]):
            since = len(raw)
            key = left.pop(0)[1]
            if key in ("INT", "TERM"):
                time.sleep(0.05)
                os.kill(child, getattr(signal, f"SIG{key}"))
            else:
                os.write(terminal, key.encode())
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), raw


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
    _serve()
