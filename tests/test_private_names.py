"""What a dependency or another module keeps private is named in `psa_fast/compat` alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = re.compile(r"_[A-Za-z0-9]\w*")
DUNDER = re.compile(r"__\w+__")
# of the language, or of every module and package
PUBLIC_DUNDERS = {*dir(object), "__name__", "__file__", "__version__", "__traceback__", "__dataclass_fields__"}
# of a NamedTuple, whose public methods begin so in order not to clash with its fields
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}


def is_private(name):
    if DUNDER.fullmatch(name):
        return name not in PUBLIC_DUNDERS
    return name not in OF_NAMED_TUPLES and PRIVATE.fullmatch(name) is not None


def own_names(tree):
    """Private names that a module defines: functions, classes, variables, fields, attributes it gives to self."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            found.add(node.attr)
    return found


def is_own(value):
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def foreign_names(code):
    """ "LINE: NAME" of every private name that is neither defined in this module nor asked of self or cls."""
    tree = ast.parse(code)
    own, found = own_names(tree), []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute) and not is_own(node.value):
            names = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (getattr(node, "module", None) or "").split(".")
            names = [name for name in names if name not in ("__future__", "__main__")]
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            told = node.args if called in BY_NAME else []
            names = [a.value for a in told if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        found += [f"{node.lineno}: {name}" for name in names if is_private(name) and (is_import or name not in own)]
    return found


def files():
    found = [*(ROOT / "psa_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    return sorted(file for file in found if file.parent != ROOT / "psa_fast" / "compat")


def test_no_room_but_compat_names_what_is_private_elsewhere():
    assert len(files()) > 100
    wrong = [f"{file.relative_to(ROOT)}:{name}" for file in files() for name in foreign_names(file.read_text())]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from torch._subclasses import FakeTensor", ["1: _subclasses"]),
        ("from psa_fast.safety.guard import _max_length", ["1: _max_length"]),
        ("import torch._dynamo", ["1: _dynamo"]),
        ("x = torch._C._autograd.f()", ["1: _autograd", "1: _C"]),
        ("guard._read([])", ["1: _read"]),
        ("self.guard._read([])", ["1: _read"]),
        ("model._flag = True", ["1: _flag"]),
        ("getattr(config, '_commit_hash', None)", ["1: _commit_hash"]),
        ("deepspeed.ops.__compatible_ops__", ["1: __compatible_ops__"]),
        ("class A:\n    _x = 1\n    def f(self, other): return self._x + other._x + self.__class__.__name__", []),
        ("def _f(): pass\nm._f", []),
        ("_cache[_N] = lambda _: super().__init__()", []),
    ],
)
def test_a_private_name_is_found(code, found):
    assert sorted(foreign_names(code)) == sorted(found)


def test_compat_stands_on_its_own():
    for file in sorted((ROOT / "psa_fast" / "compat").glob("*.py")):
        code = file.read_text()
        assert not re.search(r"^\s*(from|import) (psa_fast|\.)", code, re.MULTILINE), file.name
        assert file.stem == "__init__" or foreign_names(code), f"{file.name} names nothing that is private"
