"""Draws docs/floors.svg from the imports: every room stands above all that it imports. `make docs` runs it.

A room is a folder of a house with all that is below it. What stands beside the rooms is drawn as two: the base, which
rooms import, and the commands, which none does.
Raises ValueError where rooms import each other in a circle.
"""

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTPUT = Path(__file__).with_name("floors.svg")
# In this order from left to right.
HOUSES = ("clients", "server", "learner")
BOX, GAP, FLOOR, LEFT = (118, 44), 10, 74, 20


def room_of(module: str) -> str:
    """`server.rpc` for `server.rpc.services.chat`; of what stands beside the rooms, the module itself."""
    return ".".join(module.split(".")[:2])


def rooms() -> dict[str, set[str]]:
    """Every room with those that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (path for house in HOUSES for path in (ROOT / house).rglob("*.py")):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found[room] |= {room_of(name) for name in names if name.split(".")[0] in HOUSES and "." in name}
        found[room].discard(room)
    return _joined(found)


def _joined(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Modules beside the rooms as two rooms: the base, which rooms import, and the commands, which none does."""
    folders = {room for room in found if (ROOT / room.replace(".", "/")).is_dir()}
    based = {below for room in folders for below in found[room]} - folders
    while more := {below for module in based for below in found.get(module, ())} - folders - based:
        based |= more

    def name(room: str) -> str:
        return room if room in folders else f"{room.split('.')[0]}.{'base' if room in based else 'commands'}"

    joined: dict[str, set[str]] = defaultdict(set)
    for room, imported in found.items():
        joined[name(room)] |= {name(below) for below in imported} - {name(room)}
    return dict(joined)


def floors(found: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room, 0 for those that import none."""
    level: dict[str, int] = {}
    try:
        for room in TopologicalSorter(found).static_order():
            level[room] = 1 + max((level[below] for below in found[room]), default=-1)
    except CycleError as error:
        raise ValueError(f"rooms import each other: {' -> '.join(error.args[1])}") from error
    return level


def _direct(found: dict[str, set[str]], room: str) -> set[str]:
    """What a room imports, but for what it reaches through another one: fewer lines."""

    def reached(start: str) -> set[str]:
        return found[start] | {deep for below in found[start] for deep in reached(below)}

    return found[room] - {deep for below in found[room] for deep in reached(below)}


def draw(found: dict[str, set[str]]) -> str:
    """The picture, as SVG."""
    level = floors(found)
    places: dict[str, tuple[int, int]] = {}
    left, titles, highest = LEFT, [], max(level.values())
    for house in HOUSES:
        stories: dict[int, list[str]] = defaultdict(list)
        for room in sorted(room for room in level if room.split(".")[0] == house):
            stories[level[room]].append(room)
        width = max(map(len, stories.values())) * (BOX[0] + GAP) - GAP
        titles.append((left + width // 2, house))
        for story, there in stories.items():
            start = left + (width - len(there) * (BOX[0] + GAP) + GAP) // 2
            for number, room in enumerate(there):
                places[room] = (start + number * (BOX[0] + GAP), 40 + (highest - story) * FLOOR)
        left += width + 4 * GAP
    size = left - 2 * GAP, 40 + (highest + 1) * FLOOR
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" '
        'aria-label="The rooms of the code, each above all it imports.">',
        "<style>.room{fill:#f6f8fa;stroke:#8b949e}.line{stroke:#8b949e;stroke-width:.7;opacity:.55}text{fill:#1f2328}"
        ".house{font-weight:600}</style>",
        f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>',
    ]
    for room in sorted(found):
        for below in sorted(_direct(found, room)):
            (x1, y1), (x2, y2) = places[room], places[below]
            middle = BOX[0] // 2
            lines.append(
                f'<line class="line" x1="{x1 + middle}" y1="{y1 + BOX[1]}" x2="{x2 + middle}" y2="{y2}">'
                f"<title>{room} imports {below}</title></line>"
            )
    for room, (x, y) in sorted(places.items()):
        name = room.partition(".")[2]
        lines.append(f'<rect class="room" x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>')
        lines.append(f'<text x="{x + BOX[0] // 2}" y="{y + 27}" text-anchor="middle">{escape(name)}</text>')
    lines += [f'<text class="house" x="{x}" y="24" text-anchor="middle">{house}</text>' for x, house in titles]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    output.write_text(draw(rooms()), encoding="utf-8")


if __name__ == "__main__":
    main()
