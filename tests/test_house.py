"""The structure of the package: imports point one way, no circles, arguments only in commands, a true map."""

from __future__ import annotations

import re

from tests.helpers.house import (
    EXCEPTIONS,
    MOST_LATE_IMPORTS,
    ORDER,
    PACKAGE,
    ROOT,
    argument_readers,
    circles,
    climbs,
    late_imports,
    read_house,
    room_of,
)


def test_imports_point_one_way() -> None:
    assert [str(one) for one in climbs(read_house())] == []


def test_no_circle_of_files() -> None:
    assert circles(read_house()) == []


def test_few_imports_inside_functions() -> None:
    found = late_imports(read_house())
    assert len(found) <= MOST_LATE_IMPORTS, found


def test_only_commands_read_arguments() -> None:
    assert argument_readers(read_house()) == []


def test_exceptions_are_in_use() -> None:
    assert EXCEPTIONS - {(one.file, one.target) for one in read_house().inside} == set()


def test_moved_paths_of_the_changelog_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    table = text.partition("### Moved Python paths")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| `")]
    named = {path for row in rows for path in re.findall(r"`(hdscale\.[\w.]+)`", row)}
    files = read_house().files
    assert len(named) > 40
    assert {path for path in named if path not in files and path.rpartition(".")[0] not in files} == set()


def test_contributing_names_every_room_and_the_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in {room_of(name) for name in read_house().files} - {"", "__main__"}:
        folder = (ROOT / PACKAGE / room).is_dir()
        assert f"`{PACKAGE}/{room}/`" in text if folder else f"`{PACKAGE}/{room}.py`" in text, room
    assert " ".join(ORDER.split()) in " ".join(text.split())


def test_test_modules_do_not_import_one_another() -> None:
    """What several of them need is in tests/helpers/, and what makes simulated GPUs beside their tests."""
    shared = r"(?!helpers\b|simulated_gpu\.(?!test_|conftest))"
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.match(rf"\s*(from|import) tests\.{shared}", line) or re.match(r"\s*from tests import", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
