"""The house has floors: a room imports from floors below its own, and from no neighbour."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"errors"},
    {"console", "flow", "statistics"},
    {"machine", "distributed", "settings"},
    {"runs"},
    {"data"},
    {"models"},
    {"text"},
    {"engines"},
    {"reward_models"},
    {"answering"},
    {"training", "serving", "evaluation", "control"},
    {"commands"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = {  # commands that stay where `python -m` finds them
    "reward_models.train",
    "reward_models.train_value",
    "reward_models.train_secant",
    "reward_models.train_direction",
    "reward_models.check",
    "reward_models.import_reward",
    "reward_models.export_reward",
    "vgf_llm.control.train",
    "vgf_llm.control.report",
    "vgf_llm.control.collect",
}
OLD_NAMES = "vgf_llm.sampling"
TOP_FILES = 10


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("vgf_llm", "reward_models"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _room(module: str) -> str | None:
    """Return a module's room; a face of a package and the old names have none."""
    top, _, rest = module.partition(".")
    if module in COMMANDS:
        return "commands"
    if top == "reward_models":
        return "reward_models"
    if not rest or module.startswith(OLD_NAMES):
        return None
    return name if (name := rest.split(".")[0]) in FLOOR else "commands"


def _imported(path: Path) -> set[str]:
    """Return every module of ours that a file imports, anywhere in it, under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found & set(MODULES)


IMPORTS = {module: _imported(path) for module, path in MODULES.items()}


def test_imports_lead_down():
    upward = [
        f"{module} -> {other}"
        for module, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if (room := _room(module)) and (lower := _room(other)) and room != lower and FLOOR[lower] >= FLOOR[room]
    ]
    assert upward == []


def test_no_circle_of_modules():
    """Tarjan's components by two walks: modules that reach each other."""
    reaches: dict[str, set[str]] = {}
    for start in IMPORTS:
        seen, left = set(), [start]
        while left:
            for other in IMPORTS[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        reaches[start] = seen
    circles: dict[frozenset[str], bool] = defaultdict(bool)
    for module, seen in reaches.items():
        if module in seen:
            circles[frozenset(other for other in seen if module in reaches[other])] = True
    assert [sorted(circle) for circle in circles] == []


def test_the_top_floor_holds_commands_alone():
    top = sorted(path.name for path in (ROOT / "vgf_llm").glob("*.py"))
    assert len(top) <= TOP_FILES, top
