"""A directive that lists all methods, from their declarations when the documentation is built.

```{methods-table}
```
"""

from dataclasses import asdict

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from whence.methods import METHODS
from whence.methods.listing import list_methods


class MethodsTable(SphinxDirective):
    """Make a table of what ``whence methods --json`` prints."""

    def run(self) -> list[nodes.Node]:
        """Give the table."""
        self.env.note_reread()  # the page depends on code that Sphinx does not see
        rows = [asdict(one) for one in list_methods(METHODS)]
        lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0])]
        lines += [[_cell(name, cell) for name, cell in row.items()] for row in rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return self.parse_text_to_nodes(text)


def _cell(name: str, value: str | int | None) -> str:
    if value is None:
        return "as steps" if name == "passes_per_query" else "as visits"
    return str(value)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("methods-table", MethodsTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
