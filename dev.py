"""Set up this checkout and run its tools: one file, standard library only, Python 3.11 or newer.

    python3 dev.py demo      the demo, with any options of `whence demo`
    python3 dev.py test      the tests, with any options of pytest
    python3 dev.py check     what must pass before a commit: lint, types, docs, test
    python3 dev.py lint      formatting and ruff
    python3 dev.py types     pyright
    python3 dev.py docs      the documentation, into docs/_build/html
    python3 dev.py format    rewrite files as lint wants them
    python3 dev.py setup     only install

Everything runs in the virtual environment .venv beside this file. It is made, filled from pyproject.toml and
constraints.txt, and filled again when one of the two changes; nothing is installed anywhere else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "whence-installed.txt"
OLDEST_PYTHON = (3, 11)

DEMO, DEV = "demo", "dev"
"""What an environment holds: whence alone, or whence with the tools of development."""

TOOLS: dict[str, list[list[str]]] = {
    "setup": [],
    "demo": [["-m", "whence", "demo"]],
    "lint": [["-m", "ruff", "format", "--check", "."], ["-m", "ruff", "check", "."]],
    "types": [["-m", "pyright", "--pythonpath", str(PYTHON)]],
    "docs": [
        ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
        + ["--doctree-dir", "docs/_build/doctrees", "docs", "docs/_build/html"]
    ],
    "test": [["-m", "pytest", "--numprocesses=auto", "--dist=loadfile"]],
    "format": [["-m", "ruff", "check", "--fix-only", "."], ["-m", "ruff", "format", "."]],
}
"""The arguments of the environment's Python, one list for each program that a command runs."""

CHECKS = ["lint", "types", "docs", "test"]
TAKES_OPTIONS = ["demo", "test"]
"""Commands that hand further arguments to their one program."""


class SetupError(Exception):
    """The environment cannot be made or used; the message says what to do."""


def main(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    command, options = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if command in ("help", "-h", "--help"):
        print(__doc__)
        return 0
    if command != "check" and command not in TOOLS:
        print(f"dev.py has no command {command!r}. It has: {', '.join([*TOOLS, 'check'])}.", file=sys.stderr)
        return 2
    if options and command not in TAKES_OPTIONS:
        print(f"dev.py {command} takes no options, got: {' '.join(options)}", file=sys.stderr)
        return 2
    try:
        install(DEMO if command == "demo" else DEV)
        check_torchvision()
        if command == "check":
            return check()
        return run(command, options)
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def check() -> int:
    """Run every check, also after one has failed, and name those that did."""
    failed = []
    for name in CHECKS:
        print(f"== {name}", flush=True)
        if run(name, []) != 0:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def run(command: str, options: list[str]) -> int:
    """Run every program of one command and return the first exit status that is not 0."""
    # A user's own PYTHONPATH or PYTHONHOME would put foreign packages before those of the environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if command == "test":  # as many processes as cores: threads of each would only wait for one another
        environment.setdefault("OMP_NUM_THREADS", "1")
    first_failure = 0
    for program in TOOLS[command]:
        done = subprocess.run([str(PYTHON), *program, *options], cwd=ROOT, env=environment, check=False)
        first_failure = first_failure or done.returncode
    return first_failure


def install(wanted: str) -> None:
    """Make and fill the environment unless the stamp says that it holds what is wanted.

    Raises:
        SetupError: If there is no environment and none can be made, or pip fails.
    """
    stamps = {DEMO: f"{DEMO} {fingerprint()}", DEV: f"{DEV} {fingerprint()}"}
    good_enough = [stamps[DEV], stamps[DEMO]] if wanted == DEMO else [stamps[DEV]]
    if PYTHON.exists() and STAMP.exists():
        found = STAMP.read_text(encoding="utf-8").strip()
        if found in good_enough:
            return
        if found.startswith(DEV):  # never take tools away: pyproject changed, and this is a developer's checkout
            wanted = DEV
    if not PYTHON.exists():
        make_environment()
    STAMP.unlink(missing_ok=True)
    what = "." if wanted == DEMO else ".[dev]"
    print(
        f"Installing whence ({wanted}) into .venv; the first time this takes some minutes. PyTorch is a large\n"
        "download, 200 MB as CPU build and 3 GB as CUDA build; CONTRIBUTING.md says how to choose.",
        flush=True,
    )
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *quiet]
    if subprocess.run([*pip, "-c", "constraints.txt", "-e", what], cwd=ROOT, check=False).returncode != 0:
        raise SetupError(
            "pip could not install the packages, see its message above. Once that is solved run the same command "
            "again; if .venv itself is broken, delete the folder first."
        )
    STAMP.write_text(stamps[wanted] + "\n", encoding="utf-8")


def make_environment() -> None:
    """Make an empty virtual environment, in place of a broken one.

    Raises:
        SetupError: If this Python is too old or cannot make environments.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"whence needs Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer; this is {sys.version.split()[0]}. "
            "Run dev.py with a newer one, for example: python3.12 dev.py test"
        )
    if importlib.util.find_spec("ensurepip") is None:  # what Debian leaves out of its python3
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            "this Python cannot make virtual environments: its module ensurepip is missing. On Debian and Ubuntu "
            f"install the package python3-venv (or python{version}-venv), then run the same command again."
        )
    print(f"Making .venv with Python {sys.version.split()[0]}", flush=True)
    clear = ["--clear"] if VENV.exists() else []
    if subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)], check=False).returncode != 0:
        raise SetupError(f"the virtual environment could not be made in {VENV}, see the message above.")


def check_torchvision() -> None:
    """Refuse a torchvision that does not fit torch: diffusers would fail at import with an unclear message.

    Raises:
        SetupError: If torchvision is installed and cannot be imported.
    """
    places = [*VENV.glob("lib/python3*/site-packages/torchvision"), *VENV.glob("Lib/site-packages/torchvision")]
    if not places:
        return
    attempt = subprocess.run([str(PYTHON), "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if attempt.returncode != 0:
        lines = attempt.stderr.strip().splitlines() or ["no message"]
        raise SetupError(
            f"torchvision is installed in .venv but cannot be imported ({lines[-1]}); diffusers then fails too. whence "
            f"does not need it. Remove it with: {PYTHON} -m pip uninstall torchvision"
        )


def fingerprint() -> str:
    """Hash what decides the content of the environment: the two lists of packages, and where this checkout lies."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
