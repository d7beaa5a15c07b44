"""The house rules that no linter knows: sizes, names, randomness, and what never appears."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedkd

ROOT = Path(fedkd.__file__).parent.parent
PACKAGE = sorted((ROOT / "fedkd").rglob("*.py"))
SOURCES = [
    *PACKAGE,
    *(
        f
        for folder in ("tests", "benchmarks", "experiments")
        for f in (ROOT / folder).rglob("*.py")
    ),
]
TEXTS = [
    *SOURCES,
    *ROOT.glob("*.md"),
    *ROOT.glob("*.toml"),
    *ROOT.glob("*.cff"),
    *(
        file
        for folder in ("docs", "strategies", "clients", "privacy", "experiments")
        for kind in ("*.md", "*.toml")
        for file in (ROOT / folder).rglob(kind)
    ),
    ROOT / ".ci" / "run",
]
GENERATORS = {"Generator", "Philox", "SeedSequence", "BitGenerator"}
FLOWER_PRIVATE = ("flwr.supercore", "flwr.common", "flwr.supernode", "flwr.superlink")

# Unmodified Flower apps draw from the global generators: the engine seeds and puts them back.
FOR_OTHERS = {"fedkd/engine/simulate.py"}
FLOWER_ONLY = {"fedkd/engine/flower_private.py"}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every dotted name that is used, with its line: ``np.random.rand``, ``eval``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            parts, inner = [], node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield node.lineno, ".".join([inner.id, *reversed(parts)])


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def faults(source: str) -> list[str]:
    """What a module uses that it must not."""
    tree = ast.parse(source)
    found = []
    for line, used in calls(tree):
        head, _, last = used.rpartition(".")
        if head in ("np.random", "numpy.random") and last not in GENERATORS:
            found.append(f"line {line}: {used}: draw from fedkd.rng.Rng")
        if used in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all"):
            found.append(f"line {line}: {used}: give a generator as an argument")
        if used in ("torch.load", "torch.save", "eval", "exec"):
            found.append(f"line {line}: {used} runs or hides code")
    for line, module in imports(tree):
        if module.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve"):
            found.append(f"line {line}: {module} runs code when it reads")
        if module == "random":
            found.append(f"line {line}: the global generator of Python: draw from fedkd.rng.Rng")
    return found


@pytest.mark.parametrize("file", PACKAGE, ids=name)
def test_no_global_randomness_and_nothing_that_runs_stored_code(file):
    found = faults(file.read_text(encoding="utf-8"))
    assert not found or name(file) in FOR_OTHERS, "\n".join(found)


def test_what_is_forbidden_is_found():
    bad = "import pickle\nimport random\nnp.random.rand(3)\ntorch.manual_seed(0)\neval('1')\n"
    assert len(faults(bad)) == 5
    assert faults("generator = np.random.Generator(np.random.Philox(key=1))\nmodel.eval()\n") == []


@pytest.mark.parametrize("file", PACKAGE, ids=name)
def test_modules_and_functions_stay_small(file):
    source = file.read_text(encoding="utf-8")
    assert source.count("\n") <= 400, "one idea a module: divide it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            documented = (ast.get_docstring(node) or "").count("\n")
            assert length - documented <= 60, f"{node.name} has {length} lines"


def test_modules_are_named_after_what_they_hold():
    vague = {"utils", "util", "helpers", "common", "misc", "tools"}
    assert [name(f) for f in PACKAGE if f.stem in vague] == []


def test_flowers_private_names_are_in_one_file():
    private = [
        f"{name(file)}:{line} {module}"
        for file in PACKAGE
        if name(file) not in FLOWER_ONLY
        for line, module in imports(ast.parse(file.read_text(encoding="utf-8")))
        if module.startswith(FLOWER_PRIVATE)
    ]
    assert private == []


FOREIGN = re.compile(
    r"(?<![\w.])/(work|tmp|root|home|farm)/\w"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org"
    r"|\b(TO[D]O|FIX[M]E|XX[X])\b"
)


@pytest.mark.parametrize("file", TEXTS, ids=name)
def test_no_machine_no_registry_and_no_promise_is_written_down(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [f"{n}: {line}" for n, line in enumerate(lines, 1) if FOREIGN.search(line)] == []


def test_what_is_foreign_is_found():
    assert FOREIGN.search("see /" + "work/x") and FOREIGN.search("# TO" + "DO later")
    assert not FOREIGN.search("a/work/b and docs/tmp")


def test_importing_is_cheap_and_heavy_libraries_wait_until_they_are_needed():
    heavy = "{'matplotlib', 'sklearn', 'opacus', 'datasets', 'pyarrow', 'ray'}"
    script = (
        "import sys, fedkd; assert 'torch' not in sys.modules and 'flwr' not in sys.modules\n"
        f"fedkd.run_study; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
