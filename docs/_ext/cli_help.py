"""A directive that shows what a command's ``--help`` prints, taken when the documentation is built.

    ```{cli-help} trace
    ```

A command that does not exist, or whose help fails, fails the build: the page cannot go stale.
"""

import os
import subprocess
import sys

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

COLUMNS = "100"


class CliHelp(SphinxDirective):
    """Run ``whence COMMAND --help`` and put its output in a literal block; no argument: ``whence --help``."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Give one literal block.

        Returns:
            The block.

        Raises:
            ExtensionError: If the command's help fails, is empty, or calls the program by its path.
        """
        self.env.note_reread()  # the page depends on code that Sphinx does not see
        command = ["whence", *self.arguments, "--help"]
        environment = {**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
        environment.pop("FORCE_COLOR", None)
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, encoding="utf-8", env=environment, check=False
        )
        if done.returncode != 0 or not done.stdout.strip():
            raise ExtensionError(f"`{' '.join(command)}` failed with status {done.returncode}: {done.stderr[-2000:]}")
        if "__main__" in done.stdout:
            raise ExtensionError(f"The usage line of `{' '.join(command)}` names a file; give tyro prog='whence'.")
        text = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
        block = nodes.literal_block(text, text)
        block["language"] = "none"
        return [block]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("cli-help", CliHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
