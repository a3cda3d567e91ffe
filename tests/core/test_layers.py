"""Nothing lower imports anything higher, and no module imports itself by way of others."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import fused_gopd

ROOT = Path(fused_gopd.__file__).parent
# A module imports from its own line and from the lines above it.
LAYERS = (
    "private",
    "checks dynamo hooks installing pictures printing records rules signatures token_stats values vocab_maps",
    "shards",
    "heads",
    "targets",
    "rowops objective options tokens",
    "agreement hints option_checks server_scores",
    "problem",
    "loop",
    "autograd",
    "nll output metrics models plan prepare scoring report",
    "loss compiled graphs reference distributed",
    "run_metrics",
    "html",
    "integrations",
    "cli",
)
ALONE = {"benchmarks"}  # in an installed package: the benchmarks use it as everyone does


def imports() -> dict[str, set[str]]:
    """Of each module (``loop.run``): the modules of the package that it imports, also inside functions."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}
    modules = {name: path for name, path in modules.items() if name.partition(".")[0] not in ALONE}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        package = path.relative_to(ROOT).parent.parts
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                for name in node.names:
                    long = ".".join(filter(None, [*base, name.name]))
                    found[module].add(long if long in modules else long.rpartition(".")[0])
        found[module] -= {"", module}
    return found


def test_nothing_lower_imports_anything_higher() -> None:
    layer = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
    graph = imports()
    assert {module.partition(".")[0] for module in graph} == set(layer), "each module is in one layer"
    for module, others in graph.items():
        for other in others:
            assert layer[other.partition(".")[0]] <= layer[module.partition(".")[0]], f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graphlib.TopologicalSorter(imports()).prepare()
