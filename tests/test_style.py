"""The house rules that neither the linter nor the type checker can keep."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "src" / "perennial"
CODE = [p for top in ("src", "components", "pipelines") for p in sorted((ROOT / top).rglob("*.py"))]
# A with holds something, it does not branch: it is not counted.
BLOCKS = (ast.If, ast.For, ast.While, ast.Try, ast.Match, ast.AsyncFor)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Children inherit the environment with a few changes; the parent's own settings come from Settings.
READS_ENVIRONMENT = {"src/perennial/settings.py", "components/_image.py"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    for path in CODE:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(parsed(path)):
            if isinstance(node, FUNCTIONS):
                yield f"{name_of(path)}:{node.lineno} {node.name}", node, lines


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of code in a body: no blanks, comments or docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return 0
    inside = lines[body[0].lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in inside)


def nesting(node: ast.AST) -> int:
    """Deepest block in a body; an elif is as deep as its if, inner functions count apart."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        here = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, here + nesting(child))
    return deepest


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def clocks(path: Path) -> set[str]:
    """Calls that ask what time it is."""
    asked = {ast.unparse(n.func) for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)}
    return {
        c for c in asked if re.fullmatch(r"(datetime|date|time)\.(\w*now|today|time|mono\w*)", c)
    }


def test_no_function_is_longer_than_40_lines():
    long = [
        f"{name} ({n})" for name, node, lines in functions() if (n := body_lines(node, lines)) > 40
    ]

    assert long == []


def test_nine_functions_of_ten_fit_a_hand():
    sizes = [body_lines(node, lines) for _, node, lines in functions()]

    assert statistics.median(sizes) <= 5
    assert statistics.quantiles(sizes, n=10)[-1] <= 20


def test_no_function_is_nested_deeper_than_two_blocks():
    deep = [f"{name} ({n})" for name, node, _ in functions() if (n := nesting(node)) > 2]

    assert deep == []


def test_comments_are_few():
    lines = [
        line.strip() for path in CODE for line in path.read_text().splitlines() if line.strip()
    ]

    share = sum(line.startswith("#") for line in lines) / len(lines)

    assert share <= 0.08


def test_the_kserve_folder_holds_no_python_that_would_shadow_the_library():
    assert [name_of(p) for p in (ROOT / "kserve").rglob("*.py")] == []
    assert not (ROOT / "kserve.py").exists()


@pytest.mark.parametrize("name", ["kserve", "kfp", "feast", "mlflow", "types", "code", "nt"])
def test_no_module_or_test_folder_shadows(name):
    ours = [p for p in LIBRARY.rglob("*") if p.stem == name and p.suffix in ("", ".py")]

    assert ours == []
    assert not (ROOT / "tests" / name).exists()


def test_nothing_is_ever_unpickled():
    banned = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}

    guilty = [name_of(p) for p in CODE if imports(p) & banned]
    loose = [name_of(p) for p in CODE if "allow_pickle=True" in p.read_text(encoding="utf-8")]

    assert guilty == []
    assert loose == []


def test_only_the_settings_read_the_environment():
    def reads(path: Path) -> bool:
        text = path.read_text(encoding="utf-8").replace("os.environ.copy()", "")
        text = text.replace("**os.environ", "")
        return "os.environ" in text or "os.getenv" in text

    guilty = {name_of(p) for p in CODE if reads(p)} - READS_ENVIRONMENT

    assert guilty == set()


@pytest.mark.parametrize("path", ["rollout/judge.py", "rollout/plan.py", "retrain/policy.py"])
def test_a_decision_asks_no_clock_and_no_chance(path):
    assert clocks(LIBRARY / path) == set()
    assert not imports(LIBRARY / path) & {"time", "random", "secrets", "os"}


def test_components_import_the_library_only_inside_their_bodies():
    top = [
        f"{name_of(p)}: {ast.unparse(node)}"
        for p in sorted((ROOT / "components").glob("*.py"))
        for node in parsed(p).body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("perennial.")
    ]

    assert top == []


def test_no_lock_names_a_host_and_every_package_is_pinned_by_hash():
    for lock in sorted((ROOT / "locks").glob("*.txt")):
        text = lock.read_text()
        entries = text.replace("\\\n", " ").splitlines()

        assert "://" not in text, lock.name
        assert "nvidia" not in text, lock.name
        assert [e for e in entries if "==" in e and "--hash=sha256:" not in e] == [], lock.name


def test_both_environments_score_with_the_same_xgboost():
    pins = [
        next(
            line
            for line in (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
            if line.startswith("xgboost==")
        )
        for name in ("core", "runtime")
    ]

    assert pins[0] == pins[1]
