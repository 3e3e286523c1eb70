"""The command line: `polymamba <domain> <verb>`, `polymamba doctor`, `polymamba convert`.

A domain is a mapping from verb to (dataclass of its flags, "module:function" that takes one). Domains of other packages
are found through the entry-point group `polymamba.commands`; the function's module is imported only when its verb runs,
so help and usage errors do not wait for torch.
"""

import io
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import entry_points

import tyro

from polymamba.core import ahead
from polymamba.core.config import ComputeConfig
from polymamba.flags import Convert, Doctor

Command = tuple[type, str]

OTHERS_WAIT = 5  # seconds before another process than the first says what went wrong
CUT_OFF = 128 + 13  # what a shell reports of a tool that SIGPIPE ended

TOP_LEVEL: dict[str, Command] = {
    "doctor": (Doctor, "polymamba.doctor:run"),
    "convert": (Convert, "polymamba.conversion:run"),
}
DOMAINS = {
    "genomics": "polymamba.genomics.commands:COMMANDS",
    "bytes": "polymamba.bytes.commands:COMMANDS",
    "audio": "polymamba.audio.commands:COMMANDS",
    "vision": "polymamba.vision.commands:COMMANDS",
}


def main(argv: Sequence[str] | None = None, *, extra: Mapping[str, str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 (failed), 2 (bad usage), or CUT_OFF if nobody reads stdout any more.

    `extra`: domains beside the known ones.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return _run_and_tell(words, extra)
    # Of several processes, which a launcher has started, the first one speaks.
    said = io.StringIO()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(said):
        code = _run_and_tell(words, extra)
    if code:
        time.sleep(OTHERS_WAIT)  # what was wrong for all the first has told, and the launcher ends the others
        print(f"process {rank}: {' '.join(said.getvalue().splitlines()[-1:])}", file=sys.stderr)
    return code


def _run_and_tell(words: list[str], extra: Mapping[str, str] | None) -> int:
    # Between its own loops, torch's OpenMP threads spin for milliseconds on the cores that our CPU kernels want
    # (measured: a scan on two threads then takes as long as on one). With this count they spin some tens of
    # microseconds (a spin is a pause of 40 nanoseconds on a recent Xeon), in which torch's next loop still finds them
    # awake. Has to be said before torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = _run(words, _domains() | dict(extra or {}))
        sys.stdout.flush()  # here, where an error can still be told
        return code
    except KeyboardInterrupt as interrupt:
        print(": ".join(filter(None, ("interrupted", str(interrupt)))), file=sys.stderr)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return CUT_OFF
        if "--debug" in words:
            traceback.print_exc()
        elif _is_users(error):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            kind = type(error).__name__
            print(f"error: {kind}: {' '.join(str(error).split())} (--debug shows where)", file=sys.stderr)
    return 1


def _nobody_reads() -> bool:
    """Whether the reader of stdout has left, as `head` does; what is still to be written then goes nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # no file at all
        return False
    poll = select.poll()
    poll.register(stdout, 0)  # errors are told unasked
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _run(words: list[str], domains: Mapping[str, str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview(domains))
        return 0 if words else 2
    if words[0] == "--version":
        from polymamba import __version__

        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name in TOP_LEVEL:
        return _call(f"polymamba {name}", TOP_LEVEL[name], rest)
    if name not in domains:
        return _bad_usage(f"no command {name!r}; there are {', '.join([*domains, *TOP_LEVEL])}")
    verbs: Mapping[str, Command] = _load(domains[name])
    if not rest or rest[0] in ("-h", "--help"):
        print(_list(f"usage: polymamba {name} <verb> [-h]", {v: _summary(flags) for v, (flags, _) in verbs.items()}))
        return 0 if rest else 2
    if rest[0] not in verbs:
        return _bad_usage(f"no verb {rest[0]!r} in {name}; there are {', '.join(verbs)}")
    return _call(f"polymamba {name} {rest[0]}", verbs[rest[0]], rest[1:])


def _call(program: str, command: Command, words: list[str]) -> int:
    flags, target = command
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args = tyro.cli(flags, prog=program, args=words)
    except SystemExit as stop:  # tyro has printed its help, or says what was wrong with the words
        if said.getvalue():
            print(_one_line(said.getvalue()), file=sys.stderr, end="")
        return int(stop.code or 0)
    if isinstance(compute := getattr(args, "compute", None), ComputeConfig):
        ahead.begin(compute)
    _load(target)(args)
    return 0


def _paragraphs(text: str) -> str:
    """A text of several lines, those of each paragraph joined."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


# tyro's own keeps the end of each line of the source that an indented one follows, as in the texts of most flags. Its
# module is private: where another version of tyro lacks it, help is broken into lines at odd places, no more.
if (_strings := getattr(tyro, "_strings", None)) is not None:
    _strings.remove_single_line_breaks = _paragraphs


def _one_line(box: str) -> str:
    """What tyro says in a box of a value that a flag refuses, in one line; other boxes as they are."""
    found = re.search(r"Error parsing (.*?)[│|\s]*[─-]{5}", box, re.DOTALL)
    if "Value error" not in box or found is None:
        return box
    words = " ".join(re.sub("[│|]", " ", found[1]).split())
    return f"error: {words if words.startswith('--') else words.partition(': ')[2]}\n"  # or the group of the flag


def _domains() -> dict[str, str]:
    """Domain -> "module:mapping": our own, then those of installed packages."""
    return DOMAINS | {e.name: e.value for e in entry_points(group="polymamba.commands") if e.name not in DOMAINS}


def _load(target: str):
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)


def _is_users(error: Exception) -> bool:
    """Whether the message alone tells the user what to do: bad input, or the system refusing a file."""
    return isinstance(error, OSError) or type(error).__name__ == "InputError"


def _bad_usage(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _overview(domains: Mapping[str, str]) -> str:
    commands = {name: "verbs: " + ", ".join(_load(target)) for name, target in domains.items()}
    commands |= {name: _summary(flags) for name, (flags, _) in TOP_LEVEL.items()}
    return _list("usage: polymamba <command> [-h] [--version]", commands)


def _list(usage: str, entries: dict[str, str]) -> str:
    width = max(map(len, entries))
    return "\n".join([usage, "", *(f"  {name:<{width}}  {text}" for name, text in entries.items())])


def _summary(flags: type) -> str:
    return (flags.__doc__ or "").split("\n", 1)[0]
