"""Which folder may import which, and a few rules for every line. Uses the standard library only."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # folder -> the folders that it may import
    "common": set(),
    "step1_gfdm": {"common"},
    "step2_gidm": {"common"},
    "step3_defi": {"common", "step1_gfdm", "step2_gidm", "envs"},
    "envs": {"common"},
}
FROM_COMMON = {  # what envs may use of common
    "common.errors",
    "common.files",
    "common.program",
    "common.progress",
    "common.video",
    "common.video_set",
    "common.workers",
}
# Programs, which nobody imports
LEAVES = {
    "train",
    "eval",
    "encode",
    "convert",
    "record",
    "compare",
    "diagnose",
    "report",
    "import_weights",
    "pack",
    "standins",
    "missing",
    "results",
    "ship",
}
SHARED = [room for room in ROOMS if room.startswith("step")]
Files = dict[str, str]


def sources() -> Files:
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path.read_text()
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    }


def edges(files: Files) -> dict[str, set[str]]:
    """module -> modules of ours that it imports, lazily or not, also under TYPE_CHECKING."""
    graph = {}
    for name, text in files.items():
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: a relative import hides the room"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {f if f in files else node.module for f in full}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = {module for module in found if room(module) in ROOMS and module != name}
    return graph


def room(module: str) -> str:
    return module.split(".")[0]


def pairs(files: Files) -> list[tuple[str, str]]:
    return [(a, b) for a, bs in edges(files).items() for b in bs]


def floors(files: Files) -> list[str]:
    return [f"{a} -> {b}" for a, b in pairs(files) if room(a) != room(b) and room(b) not in ROOMS[room(a)]]


def front_doors(files: Files) -> list[str]:
    """Other folders are imported as packages only, except the modules of common and the protocols of envs."""
    return [
        f"{a} -> {b}"
        for a, b in pairs(files)
        if room(a) != room(b) and room(b) != "common" and "." in b and b != "envs.protocol"
    ]


def models_stay_out_of_envs(files: Files) -> list[str]:
    """Environments use nothing of common that knows of models or training."""
    return [
        f"{a} -> {b}" for a, b in pairs(files) if room(a) == "envs" and room(b) == "common" and b not in FROM_COMMON
    ]


def folder(module: str, files: Files) -> str:
    """The folder of a module; the __init__ of a package belongs to the package."""
    return module if any(name.startswith(module + ".") for name in files) else module.rsplit(".", 1)[0]


def folder_cycles(files: Files) -> list[str]:
    """Folders import each other in one direction only. Programs and `__init__` files are exempt."""
    arrows: dict[str, set[str]] = {}
    for a, b in pairs(files):
        ends = folder(a, files), folder(b, files)
        if ends[0] != ends[1] and a.split(".")[-1] not in LEAVES and a != ends[0]:
            arrows.setdefault(ends[0], set()).add(ends[1])
    graph = {name: reachable(arrows, name) for name in arrows}
    return sorted(f"{a} <-> {b}" for a in graph for b in graph[a] if a < b and a in graph.get(b, ()))


def reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        new = arrows.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def leaves(files: Files) -> list[str]:
    return [f"{a} -> {b}" for a, b in pairs(files) if b.split(".")[-1] in LEAVES]


def data_meets_model_in_programs(files: Files) -> list[str]:
    return [
        f"{a} -> {b}"
        for a, b in pairs(files)
        if {a, b} & {f"{r}.{place}" for r in SHARED for place in ("dataset", "data.dataset")}
        and {a, b} & {f"{r}.model" for r in SHARED}
    ]


def cycles(files: Files) -> list[str]:
    graph, done, found = edges(files), set(), []

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append(" -> ".join([*path[path.index(node) :], node]))
        elif node not in done:
            for following in sorted(graph.get(node, ())):
                visit(following, [*path, node])
            done.add(node)

    for module in graph:
        visit(module, [])
    return found


PROMISED = {"common.rlds": "converting Bridge and Fractal (step 1) and finetuning on Fractal (step 3) read RLDS too"}


def admission(files: Files) -> list[str]:
    """common holds only what two steps need, by import or by the configs of several steps. Its programs are exempt."""
    graph = edges(files)
    texts = [config.read_text() for config in (ROOT / "configs").rglob("*.yaml")]
    named = {target.rsplit(".", 1)[0] for text in texts for target in re.findall(r"_target_: (common\.[\w.]+)", text)}

    def reach(module: str) -> set[str]:
        seen, waiting = set(), [module]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    configured = named.union(*map(reach, named))
    judged = [m for m in files if room(m) == "common" and m not in configured | PROMISED.keys() | {"common"}]
    users = {m: {room(a) for a in graph if room(a) != "common" and m in reach(a)} for m in judged}
    return [
        f"{m}: used by {sorted(u) or 'nobody'}"
        for m, u in users.items()
        if len(u) < 2 and m.split(".")[-1] not in LEAVES
    ]


def hygiene(files: Files) -> list[str]:
    out = []
    for module, text in files.items():
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            out.append(f"{module}: no module docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            ):
                out.append(f"{module}:{node.lineno} catches what it does not name")
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                out.append(f"{module}:{node.lineno} star import")
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                out.append(f"{module}:{node.lineno} print")
            if isinstance(node, ast.Attribute) and node.attr == "cuda" and not isinstance(node.value, ast.Name):
                out.append(f"{module}:{node.lineno} .cuda()")
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.match(r"/(home|mnt|work|data|root|tmp)/", node.value)
            ):
                out.append(f"{module}:{node.lineno} path of a machine")
    return out


def one_loop(files: Files) -> list[str]:
    """Only common.loop steps an optimizer."""
    return [
        f"{m}:{n.lineno}"
        for m, t in files.items()
        if m != "common.loop"
        for n in ast.walk(ast.parse(t))
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == "step"
        and "optim" in ast.unparse(n.func.value)
    ]


def no_tensorflow(files: Files) -> list[str]:
    """RLDS is read without TensorFlow. tests/common/test_rlds.py tests the same at run time."""
    imported = [
        (m, n.lineno, name)
        for m, t in files.items()
        for n in ast.walk(ast.parse(t))
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for name in ([n.module or ""] if isinstance(n, ast.ImportFrom) else [alias.name for alias in n.names])
    ]
    return [f"{m}:{line}" for m, line, name in imported if name.split(".")[0] == "tensorflow"]


RULES = [
    floors,
    front_doors,
    models_stay_out_of_envs,
    folder_cycles,
    leaves,
    data_meets_model_in_programs,
    cycles,
    admission,
    hygiene,
    one_loop,
    no_tensorflow,
]
BREACHES = {  # rule -> (module, line that breaks the rule)
    floors: ("step1_gfdm.model", "from step2_gidm import GIDM"),
    front_doors: ("step3_defi.model", "from step2_gidm.transformer import Block"),
    models_stay_out_of_envs: ("envs.tasks", "from common import artifact"),
    folder_cycles: ("step3_defi.model", "from step3_defi.data import features"),
    leaves: ("step3_defi.policy", "from step3_defi.train import main"),
    data_meets_model_in_programs: ("step2_gidm.model", "from step2_gidm.data import dataset"),
    cycles: ("common.attention", "from step2_gidm import transformer"),
    admission: ("common.lonely", "x = 1"),
    hygiene: ("common.optim", "try:\n    pass\nexcept Exception:\n    pass"),
    one_loop: ("step2_gidm.model", "optimizer.step()"),
    no_tensorflow: ("common.rlds", "def late():\n    import tensorflow.io"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[Files], list[str]]) -> None:
    assert rule(sources()) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_bites(rule: Callable[[Files], list[str]]) -> None:
    module, line = BREACHES[rule]
    files = sources()
    files[module] = files.get(module, '"""x"""\n') + "\n" + line + "\n"
    assert rule(files) != []
