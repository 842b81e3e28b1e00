"""Where in the user's program something happened: cheap to note, exact when it is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from patchbay.places import show_place


def _both() -> tuple[str, str]:
    """The caller's line as a place shows it, and as the frame itself says it."""
    frame = sys._getframe(1)
    shown = show_place((frame.f_code, frame.f_lasti))
    assert shown is not None
    return shown.rpartition(":")[2], str(frame.f_lineno)


def _spread(several: Callable[[], tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for _ in range(2):
        yield (
            several()
            if _
            else _both()
        )  # fmt: skip
    yield from [
        _both()

        for _ in range(2)
    ]  # fmt: skip


class _Body:
    found = (

        _both()
    )  # fmt: skip


def test_a_place_is_the_line_that_the_interpreter_itself_names() -> None:
    """In calls over several lines, comprehensions, generators, lambdas and class bodies."""
    found = [_both(), *_spread(lambda: _both()), _Body.found]
    assert len(found) == 6
    for shown, said in found:
        assert shown == said


def test_functions_that_differ_in_their_lines_alone_are_told_apart() -> None:
    """Two functions with the same instructions that begin at the same line of two files."""
    for gap in range(3):
        namespace = {"both": _both}
        exec(compile("def f():\n" + "\n" * gap + "    return both()\n", f"<file {gap}>", "exec"), namespace)
        shown, said = namespace["f"]()
        assert shown == said == str(2 + gap)
