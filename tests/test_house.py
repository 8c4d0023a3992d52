"""The structure of the package: imports point one way, no circles, arguments only in commands, a true map."""

from __future__ import annotations

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


def test_contributing_names_every_room_and_the_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in {room_of(name) for name in read_house().files} - {"", "__main__"}:
        folder = (ROOT / PACKAGE / room).is_dir()
        assert f"`{PACKAGE}/{room}/`" in text if folder else f"`{PACKAGE}/{room}.py`" in text, room
    assert " ".join(ORDER.split()) in " ".join(text.split())
