"""The command `fqcompile`: each subcommand is a module of `fqcompile.commands`, loaded on demand.

The demo imports transformers, which takes seconds; `fqcompile doctor` should not wait for that.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module

from fqcompile.errors import FineQuantError, nearest
from fqcompile.report import installed_version

COMMANDS = {
    "demo": "compile a real model, show what was done to it, what it cost and what it saved",
    "explain": "show what would be quantized in a model, how, and why the rest would not",
    "quantize": "quantize a Hugging Face checkpoint, tensor by tensor, into a directory to load",
    "export": "write a quantized model as a checkpoint for vLLM, SGLang and transformers",
    "check": "show what vLLM, SGLang or transformers would not load of a checkpoint, and why",
    "estimate": "estimate memory, throughput and cost of a model on GPUs that you do not have",
    "tune": "measure kernel configurations on this machine's GPU and keep the fastest",
    "doctor": "show versions, devices, compilers, and which kernels are available and why not",
}
_RENAMED = {"plan": "estimate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit status of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fqcompile",
        description="FineQuant weight-only quantization as a torch.compile backend.",
    )
    own = f"fqcompile {installed_version('fqcompile')}"
    parser.add_argument("--version", action="version", version=own)
    chosen = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if chosen is not None and chosen not in COMMANDS:
        print(f"fqcompile: {_unknown(chosen)}", file=sys.stderr)
        return 2
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        if name == chosen:
            import_module(f"fqcompile.commands.{name}").add_arguments(subparser)
    parsed, rest = parser.parse_known_args(arguments)
    if rest:
        help_text = subparsers.choices[parsed.command].format_help()
        parser.exit(2, f"fqcompile {parsed.command}: {_superfluous(rest[0], help_text)}\n")
    try:
        import_module(f"fqcompile.commands.{parsed.command}").run(parsed)
    except FineQuantError as error:
        print(f"fqcompile {parsed.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        remedy = "give a path that can be made, that you may use, and that has room"
        print(f"fqcompile {parsed.command}: {error}; {remedy}", file=sys.stderr)
        return 2
    return 0


def _unknown(command: str) -> str:
    """The message for an unknown command, with the command to use instead."""
    if command in _RENAMED:
        return f"{command!r} was renamed; give: fqcompile {_RENAMED[command]}"
    return f"no command is called {command!r}; there are {', '.join(COMMANDS)}" + nearest(
        command, COMMANDS
    )


def _superfluous(argument: str, help_text: str) -> str:
    """The message for an argument that a command does not take, with the flag that was meant."""
    flag = argument.partition("=")[0]
    if not flag.startswith("--"):
        return f"{argument!r} is one argument too many; --help shows which it takes"
    flags = sorted(set(re.findall(r"--[a-z][a-z-]+", help_text)))
    return f"no option is called {flag!r}; there are {', '.join(flags)}{nearest(flag, flags)}"
