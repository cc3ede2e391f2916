"""The rules of the source, read off it: who may import whom, how long files are, what is documented."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flatlora"
FILES = {  # the source files by the dotted name of their module; a package is named as its __init__
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

# A part is a file or a folder of flatlora/. It imports itself and parts of lower levels. A new part gets a line here.
LEVELS = {
    "checks": 0,
    "kernels": 0,
    "ranks": 0,
    "reference": 0,
    "streams": 0,
    "wrapper": 1,
    "metrics": 2,
    "layers": 2,
    "perturbation": 3,
    "bidora": 5,
    "bilora": 5,
    "ggpo": 5,
    "gralora": 5,
    "lorasam": 5,
    "checkpoint": 6,
    "sharpness": 6,
    "hf": 7,
    "lightning": 7,
    "__init__": 8,
}
CORE_IMPORTS = {
    "torch",
    *sys.stdlib_module_names,
}  # everything else is an extra, imported in the function that needs it
# Nobody imports these parts but the users of the library that each is for, which they may therefore import at the top.
GLUE = {"hf": {"transformers"}, "lightning": {"lightning", "pytorch_lightning"}}
# A kernel that is imported by who asks for it; torch brings Triton where there is a GPU that it is for.
TRITON = {"flatlora.kernels.triton_draw": {"triton"}}
MOST_LINES, MOST_BODY_LINES = 400, 40


def part(module: str) -> str:
    return module.split(".")[1]


def imports(module: str, tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in `tree`, with relative ones resolved; name is None for ``import module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield (inner, None) if inner in FILES else (source, alias.name)


def own_imports(module: str) -> set[tuple[str, str | None]]:
    """What a module takes from flatlora itself, inside functions too; sub-packages by their __init__."""
    found = (pair for pair in imports(module, TREES[module]) if pair[0].split(".")[0] == "flatlora")
    return {(source if source in FILES else f"{source}.__init__", name) for source, name in found}


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions and without what only type checkers read."""

    class Shallow(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...
        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Shallow().visit(ast.parse(ast.unparse(tree)))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    start = 1 if ast.get_docstring(function) is not None else 0
    body = function.body[start:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def upward(module: str) -> list[str]:
    """Imports of a part on the same level or a higher one: a part's own files aside."""
    here = part(module)
    return [
        source for source, _ in own_imports(module) if part(source) != here and LEVELS[part(source)] >= LEVELS[here]
    ]


def foreign(module: str) -> list[str]:
    """Imports at module level of anything but torch, the standard library and flatlora."""
    top = {source.split(".")[0] for source, _ in imports(module, at_module_level(TREES[module]))}
    return sorted(top - CORE_IMPORTS - GLUE.get(part(module), set()) - TRITON.get(module, set()) - {"flatlora"})


def private(module: str) -> list[str]:
    """Names or modules with an underscore that belong to another module of flatlora."""
    parts = [(source, name or source.split(".")[-1]) for source, name in own_imports(module)]
    return [f"{source}.{name}" for source, name in parts if name.startswith("_") and not name.startswith("__")]


def beyond_torch(module: str) -> list[str]:
    """What a kernel imports beside torch, the standard library and other kernels, inside functions too."""
    if part(module) != "kernels":
        return []
    sources = {source for source, _ in imports(module, TREES[module]) if not source.startswith("flatlora.kernels")}
    return [s for s in sources if s.split(".")[0] not in CORE_IMPORTS | TRITON.get(module, set())]


def long_functions(module: str) -> list[str]:
    return [f.name for f in functions(TREES[module]) if body_lines(f) > MOST_BODY_LINES]


def too_long(module: str) -> list[str]:
    lines = len(SOURCES[module].splitlines())
    return [f"{lines} lines"] if lines > MOST_LINES else []


def undocumented(module: str) -> list[str]:
    """The module itself and what it defines for others."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in TREES[module].body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [getattr(node, "name", module) for node in [TREES[module], *public] if not ast.get_docstring(node)]


# Each rule with a module and a source that break it; a rule that would not see that proves nothing.
RULES = [
    (upward, "flatlora.bilora.optimizer", "from ..ggpo.optimizer import GGPOOptimizer"),
    (foreign, "flatlora.wrapper", "try:\n    import peft\nexcept ImportError:\n    pass"),
    (private, "flatlora.bilora.optimizer", "def f():\n    from ..layers.view import _hidden"),
    (beyond_torch, "flatlora.kernels.draw", "def f():\n    from ..layers.base import full_tensor"),
    (too_long, "flatlora.wrapper", "\n" * (MOST_LINES + 1)),
    (long_functions, "flatlora.wrapper", "class C:\n    def f(self):\n" + "        pass\n" * (MOST_BODY_LINES + 1)),
    (undocumented, "flatlora.wrapper", '"""Has one."""\ndef f(): ...'),
]


@pytest.mark.parametrize("rule", [rule for rule, *_ in RULES], ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    broken = {module: found for module in FILES if (found := rule(module))}
    assert not broken


@pytest.mark.parametrize(("rule", "module", "source"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_sees_what_breaks_it(rule, module, source, monkeypatch):
    monkeypatch.setitem(SOURCES, module, source)
    monkeypatch.setitem(TREES, module, ast.parse(source))
    assert rule(module)


def test_no_part_needs_another_library_through_glue():
    assert not [module for module in FILES for source, _ in own_imports(module) if part(source) in GLUE]


def test_every_part_has_a_level():
    assert {part(module) for module in FILES} <= LEVELS.keys()


def test_no_file_imports_itself_by_a_detour():
    """Levels rule out cycles between parts; this rules them out between the files of one."""
    waiting = {module: {source for source, _ in own_imports(module)} & FILES.keys() for module in FILES}
    while free := [module for module, sources in waiting.items() if not sources]:
        waiting = {m: sources.difference(free) for m, sources in waiting.items() if m not in free}
    assert not waiting


def test_the_front_door_is_public_names_alone():
    tree = TREES["flatlora.__init__"]
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    listed = next(ast.literal_eval(node.value) for node in tree.body if ast.unparse(node).startswith("__all__"))
    assert sorted(names) == sorted(listed)
    assert not [name for name in names if name.startswith("_")]
    kinds = [type(node) for node in tree.body]
    assert set(kinds) == {ast.Expr, ast.ImportFrom, ast.Assign}  # docstring, imports, __all__ and __version__
