"""Imports point one way: reads every file of the package, without importing it, and names the line that does not.

The table is DESIGN's "imports point one way" in full. A new module goes into LAYER_OF; a new direction is a decision
that wants a note in docs/design/.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "whence"

LAYER_OF = {
    "errors": "errors",
    "config": "leaf",
    "_files": "leaf",
    "_allocator": "leaf",
    "_array_files": "artifacts",
    # mathematics: tensors in, tensors out
    "diffusion": "diffusion",
    "projections": "linear algebra",
    "curvature": "linear algebra",
    "engine": "engine",
    # declarations: which gradients a method needs
    "methods": "methods",
    # artifacts: the form of what lies on disk
    "data": "artifacts",
    "_images": "artifacts",
    "_sources": "artifacts",
    "_columns": "artifacts",
    "_datasets": "artifacts",
    "_float_images": "artifacts",
    "record": "artifacts",
    "store": "artifacts",
    "shards": "artifacts",
    "_store_checks": "artifacts",
    "_tensor_file": "artifacts",
    "scores": "artifacts",
    "trajectories": "artifacts",
    "encoded": "artifacts",
    "regions": "artifacts",
    "encoding": "stages",
    "pipeline_encoder": "stages",
    "inversion_encoder": "stages",
    "ensembles": "artifacts",
    "ground_truth": "artifacts",
    "checkpoints": "checkpoints",
    "lora": "checkpoints",
    "textual_inversion": "checkpoints",
    "inverted_unet": "checkpoints",
    "_model_files": "checkpoints",
    "_networks": "checkpoints",
    # stages: loops that turn one artifact into the next
    "training": "stages",
    "recorder": "stages",
    "_recorder_checks": "stages",
    "_recorder_draws": "stages",
    "_recorder_folder": "stages",
    "_recorder_manifest": "stages",
    "_recorder_pass": "stages",
    "_script_flags": "stages",
    "_accelerated": "stages",
    "sampling": "stages",
    "generated": "stages",
    "replay_check": "stages",
    "subject": "stages",
    "model_making": "stages",
    "words": "stages",
    "precision": "stages",
    "workload": "stages",
    "memory": "stages",
    "streaming": "stages",
    "assembly": "stages",
    "store_spec": "stages",
    "indexing": "stages",
    "querying": "stages",
    "query_vectors": "stages",
    "row_products": "stages",
    "preconditioning": "stages",
    "second_order": "stages",
    "gauss_newton": "stages",
    "inverse_curvature": "stages",
    "self_influence": "stages",
    "progress": "stages",
    "event_table": "stages",
    "gradients": "stages",
    "grid_sums": "stages",
    "attribution": "stages",
    "encoders": "stages",
    "similarity": "stages",
    "plan": "stages",
    "plan_index": "stages",
    "subsets": "stages",
    "measuring": "stages",
    "many_models": "stages",
    "retraining": "stages",
    "_trainers": "stages",
    "_workers": "stages",
    "lds": "stages",
    "comparison": "stages",
    "datamodels": "stages",
    "evaluation": "stages",
    "contrasts": "stages",
    "counterfactual": "stages",
    "effects": "stages",
    "cleaning": "stages",
    "export": "stages",
    "retrieval": "stages",
    "duplicates": "stages",
    "bias": "stages",
    "diagnosis": "stages",
    "reliability": "stages",
    # views: read only
    "report": "views",
    "_plots": "views",
    "_bias_page": "views",
    "_page_text": "views",
    "_pictures": "views",
    "evidence": "views",
    "explorer": "views",
    # wiring
    "pipeline": "pipeline",
    "arguments": "pipeline",
    "_run_folder": "pipeline",
    "_run_config": "pipeline",
    "_run_scores": "pipeline",
    "_run_evaluation": "pipeline",
    "opening": "pipeline",
    "demo": "pipeline",
    "text_demo": "pipeline",
    "cli": "cli",
    "_cli_evaluation": "cli",
    "_cli_evidence": "cli",
    "_cli_options": "cli",
    "_cli_printing": "cli",
    "_cli_show": "cli",
    "_cli_stores": "cli",
    "_cli_tracing": "cli",
    "_cli_training": "cli",
    "__init__": "free",
    "__main__": "free",
}
"""Module, or package with everything in it, to layer."""

EVERYTHING = set(LAYER_OF.values())
BASICS = {"errors", "leaf"}
MATHEMATICS = {"diffusion", "linear algebra", "engine"}
ARTIFACTS = {"artifacts", "checkpoints"}

MAY_IMPORT = {
    "errors": set(),
    "leaf": {"errors"},
    "diffusion": BASICS | {"diffusion"},
    "linear algebra": BASICS | {"linear algebra"},
    "engine": BASICS | MATHEMATICS,
    "methods": BASICS | {"methods"},
    "artifacts": BASICS | {"artifacts"},
    "checkpoints": BASICS | ARTIFACTS,
    "stages": BASICS | MATHEMATICS | {"methods"} | ARTIFACTS | {"stages"},
    "views": BASICS | {"methods", "artifacts", "views"},
    "pipeline": EVERYTHING - {"cli", "free"},
    "cli": EVERYTHING - {"free"},
    "free": EVERYTHING,
}
"""Layer to the layers that it may import from."""

WITHOUT_TORCH = {"errors", "leaf", "methods", "artifacts", "views"}
"""Layers that must work where torch is not installed, whatever they import."""

BRINGS_TORCH = {"torch", "torchvision", "diffusers", "accelerate", "transformers", "safetensors.torch"}


@dataclass(frozen=True)
class Import:
    """One imported name; ``target`` is the longest part of it that is a module, such as ``whence.diffusion.noise``."""

    file: Path
    line: int
    target: str
    only_for_types: bool

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def read_modules(package: Path) -> dict[str, Path]:
    """Map the dotted name of every module to its file; a package has the name of its folder."""
    modules = {}
    for file in sorted(package.rglob("*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def read_imports(name: str, modules: dict[str, Path]) -> Iterator[Import]:
    """Give the imports of one module, also those inside functions."""
    file = modules[name]
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    type_lines = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in node.body
        for line in range(child.lineno, (child.end_lineno or child.lineno) + 1)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            start = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(file, node.lineno, _module_part(target, modules), node.lineno in type_lines)


def _module_part(target: str, modules: dict[str, Path]) -> str:
    """Cut ``whence.scores.Scores`` to ``whence.scores``; names from elsewhere stay whole."""
    root = next(iter(modules)).split(".")[0]
    if target.split(".")[0] != root:
        return target
    while target not in modules and target.rsplit(".", 1)[0] in modules and target.rsplit(".", 1)[0] != root:
        target = target.rsplit(".", 1)[0]
    return target


def layer_of(module: str) -> str | None:
    """Look up the layer of ``whence.a.b`` by its first part ``a``; None where the table has none."""
    parts = module.split(".")
    return LAYER_OF.get(parts[1] if len(parts) > 1 else "__init__")


def find_unknown(package: Path) -> list[str]:
    """List the modules that are in no layer."""
    return [
        f"{file}: the module {name} is in no layer. Add it to LAYER_OF in tests/test_layers.py."
        for name, file in read_modules(package).items()
        if layer_of(name) is None
    ]


def find_wrong_directions(package: Path) -> list[str]:
    """List the imports that go against MAY_IMPORT."""
    modules = read_modules(package)
    wrong = []
    for name in modules:
        layer = layer_of(name)
        if layer is None or layer == "free":
            continue
        for found in read_imports(name, modules):
            if found.target.split(".")[0] != package.name or found.target == f"{package.name}.__version__":
                continue
            target_layer = layer_of(found.target)
            if found.target not in modules or found.target == package.name:
                wrong.append(f"{found.place}: {name} imports {found.target}; import from the module that defines it")
            elif target_layer is not None and target_layer not in MAY_IMPORT[layer]:
                wrong.append(f"{found.place}: {name} ({layer}) must not import {found.target} ({target_layer})")
    return wrong


def find_torch(package: Path) -> list[str]:
    """List the modules of layers without torch from which a chain of imports leads to it."""
    modules = read_modules(package)
    needed = {name: [one for one in read_imports(name, modules) if not one.only_for_types] for name in modules}
    wrong = []
    for name in modules:
        if layer_of(name) not in WITHOUT_TORCH:
            continue
        seen, waiting = {name}, [(name, [])]
        while waiting:
            current, chain = waiting.pop()
            for found in needed[current]:
                path = [*chain, f"{found.place} imports {found.target}"]
                if any(f"{found.target}.".startswith(f"{brings}.") for brings in BRINGS_TORCH):
                    wrong.append(f"{name} ({layer_of(name)}) must work without torch: " + ", ".join(path))
                # Importing a.b.c runs the __init__ of a.b too; that of the root is tried for real below.
                parts = found.target.split(".")
                for module in (".".join(parts[:depth]) for depth in range(2, len(parts) + 1)):
                    if module in modules and module not in seen:
                        seen.add(module)
                        waiting.append((module, path))
    return wrong


def test_every_module_is_in_a_layer():
    assert read_modules(PACKAGE), f"no modules found in {PACKAGE}"
    problems = find_unknown(PACKAGE)
    assert not problems, "\n".join(problems)


def test_imports_point_one_way():
    problems = find_wrong_directions(PACKAGE)
    assert not problems, "\n".join(problems)


def test_torch_stays_out_of_artifacts_methods_and_views():
    problems = find_torch(PACKAGE)
    assert not problems, "\n".join(problems)


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "whence" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "whence"


class TestTheChecker:
    """It must find what it is there to find, or the tests above pass for nothing."""

    @pytest.mark.parametrize(
        ("file", "line", "forbidden"),
        [
            ("scores.py", "from whence.engine.capture import capture", "whence.engine.capture"),
            ("scores.py", "from .engine.capture import capture", "whence.engine.capture"),
            ("scores.py", "from whence.engine import capture", "whence.engine.capture"),
            ("scores.py", "def later():\n    import whence.engine.capture", "whence.engine.capture"),
            ("scores.py", "from whence import checkpoints", "whence.checkpoints"),
            ("diffusion/noise.py", "from ..engine.capture import capture", "whence.engine.capture"),
            ("diffusion/__init__.py", "from ..engine import capture", "whence.engine.capture"),
            ("methods/retrac.py", "from whence.scores import Scores", "whence.scores"),
            ("report.py", "from whence.checkpoints import load", "whence.checkpoints"),
            ("training.py", "from whence.report import write_report", "whence.report"),
            ("pipeline.py", "from whence.cli import main", "whence.cli"),
            ("config.py", "from whence.scores import Scores", "whence.scores"),
            ("errors.py", "from whence.config import Settings", "whence.config"),
            ("record.py", "from whence import trace", "whence.trace"),
            ("record.py", "from whence import *", "whence.*"),
        ],
    )
    def test_finds_a_wrong_direction(self, tmp_path: Path, file: str, line: str, forbidden: str):
        files = dict.fromkeys(
            ["__init__.py", "engine/__init__.py", "engine/capture.py", "diffusion/__init__.py", "scores.py"], ""
        )
        files |= dict.fromkeys(["checkpoints.py", "report.py", "cli.py", "config.py"], "")
        package = write_package(tmp_path, files | {file: f"import json\n{line}\n"})
        (problem,) = find_wrong_directions(package)
        assert problem.startswith(f"{package / file}:{2 + line.count(chr(10))}: ")
        assert f"{forbidden} " in f"{problem} ".replace(";", " ")

    def test_accepts_the_right_directions(self, tmp_path: Path):
        package = write_package(
            tmp_path,
            {
                "__init__.py": "from whence.pipeline import trace\n__version__ = '1'\n",
                "errors.py": "",
                "config.py": "from whence.errors import ConfigError\n",
                "engine/capture.py": "import torch\nfrom whence.diffusion.noise import normals\n",
                "diffusion/noise.py": "import numpy\nfrom whence.config import Settings\n",
                "scores.py": "from typing import TYPE_CHECKING\nfrom whence import __version__\n"
                "if TYPE_CHECKING:\n    from torch import Tensor\n",
                "methods/retrac.py": "from whence.methods._frame import Method\n",
                "methods/_frame.py": "",
                "report.py": "from whence.scores import Scores\nfrom whence.methods import retrac\n",
                "gradients.py": "from whence.engine import capture\nfrom whence.scores import Scores\n",
                "pipeline.py": "from whence import gradients, report\n",
                "cli.py": "from whence.pipeline import trace\nfrom whence import report\n",
            },
        )
        assert find_unknown(package) == []
        assert find_wrong_directions(package) == []
        assert find_torch(package) == []

    def test_finds_torch(self, tmp_path: Path):
        package = write_package(tmp_path, {"scores.py": "import numpy\n\ndef f():\n    from torch.nn import Module\n"})
        (problem,) = find_torch(package)
        assert f"{package / 'scores.py'}:4 imports torch.nn.Module" in problem

    def test_finds_torch_at_the_end_of_a_chain(self, tmp_path: Path):
        package = write_package(
            tmp_path,
            {
                "report.py": "from whence.scores import Scores\n",
                "scores.py": "from whence.methods.names import NAMES\n",
                "methods/__init__.py": "from safetensors.torch import save_file\n",
                "methods/names.py": "",
            },
        )
        problem = next(problem for problem in find_torch(package) if problem.startswith("whence.report "))
        assert problem.endswith(f"{package / 'methods/__init__.py'}:1 imports safetensors.torch.save_file")

    def test_names_an_unknown_module(self, tmp_path: Path):
        package = write_package(tmp_path, {"scores.py": "", "helpers.py": "", "tools/parts.py": ""})
        problems = find_unknown(package)
        assert [problem.split(":")[0] for problem in problems] == [
            str(package / "helpers.py"),
            str(package / "tools/parts.py"),
        ]
        assert "LAYER_OF" in problems[0]


def run_python(code: str) -> None:
    """Run code in a fresh interpreter, as an import here would find torch already loaded."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


REFUSE_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers"}:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize(
    "module",
    [
        "whence",
        "whence.scores",
        "whence.ground_truth",
        "whence.lds",
        "whence.data",
        "whence.record",
        "whence.report",
        "whence.store",
    ],
)
def test_imports_without_torch(module: str):
    run_python(f"{REFUSE_TORCH}\nimport {module}")


def test_help_is_printed_without_torch():
    run_python(
        f"{REFUSE_TORCH}\n"
        "from whence.cli import main\n"
        "sys.argv = ['whence', '--help']\n"
        "try:\n"
        "    status = main()\n"
        "except SystemExit as end:\n"
        "    status = end.code\n"
        "assert not status, status\n"
    )


def test_every_module_imports_without_a_warning():
    names = [name for name in read_modules(PACKAGE) if not name.endswith("__main__")]
    run_python(
        "import importlib, warnings\n"
        "import torch, diffusers\n"  # what these two warn of is theirs
        "warnings.simplefilter('error')\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
