"""The command line: it reads settings, calls the pipeline and prints.

The commands themselves are in the ``_cli_`` modules beside this one, by what they are for.
Errors that whence raises on purpose end with status 1, a wrong command line with 2.
Heavy imports stand inside the commands, so that ``--help`` answers at once.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from whence._cli_evaluation import diagnose, evaluate, retrain
from whence._cli_evidence import clean, prove
from whence._cli_show import show
from whence._cli_stores import index, merge, query, verify
from whence._cli_tracing import ensemble, methods, plan, report, self_, trace
from whence._cli_training import check, demo, sample, train
from whence.errors import WhenceError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with status 1 on an error that has a remedy, 2 on a wrong command line."""
    commands = {
        "demo": demo,
        "train": train,
        "sample": sample,
        "trace": trace,
        "plan": plan,
        "self": self_,
        "index": index,
        "query": query,
        "report": report,
        "check": check,
        "retrain": retrain,
        "evaluate": evaluate,
        "prove": prove,
        "clean": clean,
        "diagnose": diagnose,
        "methods": methods,
        "verify": verify,
        "merge": merge,
        "ensemble": ensemble,
        "show": show,
    }
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="whence",
            description="Which training images made this one? Data attribution for diffusion models.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except WhenceError as error:
        sys.exit(f"whence: {error}")
    except KeyboardInterrupt:
        print("\nwhence: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        sys.exit(
            f"whence: {error.strerror or error}{place}. What was finished is kept; once this is solved, the same "
            "command goes on from there."
        )


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"whence: note: {message}", file=sys.stderr)
