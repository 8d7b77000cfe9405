"""Damages every file that the programs read, in many ways, and counts how each ends; run by hand.

    python tests/try_bad_input.py

Prints one row for each kind of file. A run may end with exit status 2 and one sentence, with status 1 (what
`summary` found), or with 0 where the damage does no harm. Exit status 1 if one ends otherwise: with a
traceback, without that sentence, with a report in its output, or not within 60 seconds; or if a run on a
sound file does not end well.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import layouts
from conftest import TINY

import data
import evaluate
import train

DAMAGES = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: whole[:1],
    "half": lambda whole: whole[: len(whole) // 2],
    "last bytes lost": lambda whole: whole[:-7],
    "first bytes lost": lambda whole: whole[7:],
    "zeros in the middle": lambda whole: whole[: len(whole) // 3] + bytes(40) + whole[len(whole) // 3 + 40 :],
    "noise": lambda whole: random.Random(0).randbytes(len(whole)),
    "a byte changed": lambda whole: whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 + 1 :],
    "twice": lambda whole: whole + whole,
    "UTF-16": lambda whole: whole.decode("latin-1").encode("utf-16"),
    "Latin-1": lambda whole: whole.replace(b"a", b"\xe4"),
    "no first line": lambda whole: whole.partition(b"\n")[2],
    "first line alone": lambda whole: whole.partition(b"\n")[0] + b"\n",
    "no commas": lambda whole: whole.replace(b",", b";"),
    "a comma more": lambda whole: whole.replace(b"\n", b",\n"),
    "open quotation": lambda whole: whole.replace(b",", b',"', 3),
    "lone surrogate": lambda whole: whole.replace(b"e", b"\\ud800", 2),
    "deep brackets": lambda whole: b"[" * 10**5,
    "long line": lambda whole: b"a" * 2**25,
    "numbers": lambda whole: whole.replace(b"1", b"1e999"),
    "a ZIP file": lambda whole: b"PK\x03\x04" + whole,
    "HTML": lambda whole: b"<!DOCTYPE html><html><body>Please log in</body></html>",
}  # fmt: skip


def outcome(program, arguments):
    """How program.main(arguments) ends -> "refused", "found" (status 1), "accepted", or a fault."""
    shutil.rmtree("run-of-images", ignore_errors=True)
    output = io.StringIO()
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = program.main(arguments)
    except SystemExit as error:
        status = error.code
    except TimeoutError:
        return "hang"
    except BaseException as error:
        return f"traceback ({type(error).__name__}: {error})"
    finally:
        signal.alarm(0)
    if layouts.MARKER in output.getvalue():
        return "shows a report"
    last = "".join(output.getvalue().strip().splitlines()[-1:])
    if status == 2 and not last.startswith(f"{program.__name__}.py: "):
        return "no sentence"
    return {0: "accepted", 1: "found", 2: "refused"}.get(status, f"status {status}")


def late(*_):
    raise TimeoutError


def attempts(folder):
    """Yields (kind, path, program, arguments): a sound file, and a run that reads it."""
    for name in layouts.READERS:
        spec = layouts.build(name, folder / name)
        kinds = {".csv": "table", ".jsonl": "table", ".txt": "report or list", ".xml": "table"}
        seen = set(data.ENDINGS) if name == "pack" else set()  # its images are too small for the model
        for path in sorted(path for path in (folder / name).rglob("*") if path.is_file()):
            kind = "image" if path.suffix in data.ENDINGS else kinds.get(path.suffix, "archive")
            if kind != "image" or path.suffix not in seen:
                seen.add(path.suffix)
                run = [*TINY, "--data", spec, "--out", str(folder / "run-of-images")]
                yield kind, path, *((train, run) if kind == "image" else (data, ["summary", "--data", spec]))
    run = folder / "run"
    outcome(train, [*TINY, "--out", str(run)])
    Path(folder / "prompts.json").write_text(json.dumps({name: [name] for name in data.PHANTOM_FINDINGS}))
    Path(folder / "list.txt").write_text("test-0\ntest-1\n")
    asked = ["--checkpoint", str(run), "--limit", "16", "--task", "zero-shot"]
    yield "checkpoint", run / "best.pt", evaluate, asked
    yield "checkpoint", run / "last.pt", train, ["--resume", str(run)]
    yield "results", run / "results.json", evaluate, asked
    yield "prompts", folder / "prompts.json", evaluate, [*asked, "--prompts", str(folder / "prompts.json")]
    yield "report or list", folder / "list.txt", evaluate, [*asked, "--ids", str(folder / "list.txt")]


def main():
    signal.signal(signal.SIGALRM, late)
    counts, faults = {}, []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind, path, program, arguments in attempts(Path(folder)):
            if (end := outcome(program, arguments)) not in ("found", "accepted"):
                faults.append(f"{path.name}, sound: {end}")
            whole = path.read_bytes()
            for damage, change in DAMAGES.items():
                path.write_bytes(change(whole))
                end = outcome(program, arguments)
                counts.setdefault(kind, Counter())[end.partition(" (")[0]] += 1
                if end not in ("refused", "found", "accepted"):
                    faults.append(f"{path.name}, {damage}: {end}")
            path.write_bytes(whole)
    ends = ["refused", "found", "accepted", "traceback", "no sentence", "shows a report", "hang"]
    print(f"{'kind':16}" + "".join(f"{end:>16}" for end in ends))
    for kind, count in counts.items():
        print(f"{kind:16}" + "".join(f"{count[end]:16}" for end in ends))
    print("\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
