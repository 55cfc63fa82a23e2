"""The rooms and the one way imports may go."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> rooms it may import, besides itself and compat
ALLOWED = {
    "compat": set(),
    "taxonomy": {"files"},
    "files": set(),
    "made_once": {"files"},
    "threads": set(),
    "pictures": set(),
    "ops": {"taxonomy"},
    "models": {"taxonomy", "files", "pictures", "ops"},
    "data": {"taxonomy", "files", "made_once", "pictures"},
    "training": {"taxonomy", "files", "pictures", "ops", "models", "data"},
    "safety": {"taxonomy", "files", "pictures", "models", "data"},
    "evaluation": {"taxonomy", "files", "models", "data", "safety"},
    "sandbox": {"taxonomy", "files", "made_once", "data", "safety"},
    "attacks": {"taxonomy", "files", "models", "data", "safety", "evaluation"},
    "planning": {"files", "models", "training"},
    "serve": {"taxonomy", "files", "data", "safety"},
    "train": {"files", "made_once", "models", "data", "safety", "evaluation", "sandbox", "threads", "training"},
    "cli": {
        "taxonomy",
        "files",
        "threads",
        "models",
        "data",
        "training",
        "safety",
        "evaluation",
        "attacks",
        "sandbox",
        "planning",
        "serve",
        "train",
    },
}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of psa_fast that a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            names = [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("psa_fast.")}
    return found & set(ALLOWED)


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_go_one_way(room):
    place = ROOT / "psa_fast" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for file in files:
        wrong = rooms_imported(file) - ALLOWED[room] - {room, "compat"}
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_every_room_has_a_rule():
    rooms = {p.stem for p in (ROOT / "psa_fast").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(ALLOWED)


def test_tests_lie_beside_their_rooms():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/*.py")}
    assert folders <= {*ALLOWED, "builders", "kernels", "benchmarks", "examples", "fuzz"}


def test_contributing_tells_the_same_rooms():
    told = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and (name := cells[0].strip("`")) in ALLOWED:
            told[name] = set() if cells[2] == "-" else set(cells[2].split(", "))
    assert told == ALLOWED


def test_where_contributing_points_there_is_something():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    pointed = re.findall(r"^\| .* \| `(psa_fast/.*)` \|$", text, re.MULTILINE)
    assert len(pointed) >= 20
    assert [file for file in pointed if not (ROOT / file).is_file()] == []


def test_a_file_name_occurs_once():
    # an op has one name in every room
    ops = {path.name for path in (ROOT / "psa_fast" / "ops" / "reference").glob("*.py")}
    # an importer is called as the command line calls what it imports
    files = [path for path in (ROOT / "psa_fast").rglob("*.py") if path.parent.name != "importers"]
    names = Counter(path.name for path in files)
    assert {name for name, count in names.items() if count > 1} <= ops


def sources() -> list[Path]:
    folders = ("psa_fast", "kernels", "benchmarks", "tests", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def long_functions(code: str, most: int) -> list[str]:
    """Functions of more than `most` lines, from `def` to the end, what stands within them included."""
    nodes = ast.walk(ast.parse(code))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f.name for f in functions if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > most]


def test_files_are_short():
    assert len(sources()) > 250
    assert [str(path.relative_to(ROOT)) for path in sources() if len(path.read_text().splitlines()) > 400] == []


def test_functions_are_short():
    code = "def a():\n    x = 1\n    return x\n\nclass B:\n    async def c(self):\n        pass\n        pass\n"
    assert long_functions(code, 2) == ["a", "c"]
    assert long_functions(code, 3) == []
    found = {str(path.relative_to(ROOT)): long_functions(path.read_text(), 80) for path in sources()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("psa_fast.ops", ["triton", "transformers", "deepspeed"]),
        ("psa_fast.safety.policy", ["torch", "transformers"]),
        ("psa_fast.data.records", ["torch", "transformers"]),
        ("psa_fast.cli", ["torch", "transformers", "deepspeed"]),
        ("psa_fast.train", ["torch", "transformers", "deepspeed"]),
        ("psa_fast.training.config", ["torch", "transformers", "deepspeed"]),
    ],
)
def test_light_imports_stay_light(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_references_import_torch_only():
    """They stay independent of the ops that are held against them."""
    files = sorted((ROOT / "psa_fast" / "ops" / "reference").glob("[!_]*.py"))
    assert files
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
        assert names <= {"__future__", "collections.abc", "torch", "torch.nn.functional"}, file.name


def test_kernels_folder_does_not_shadow_hugging_faces_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_import_torch_and_triton_only():
    allowed = {"__future__", "collections", "dataclasses", "os", "typing", "torch", "triton", "psa_kernels"}
    files = sorted((ROOT / "kernels" / "psa_kernels").glob("*.py"))
    assert files
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= allowed, file.name
