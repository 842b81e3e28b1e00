"""Plots as matplotlib figures, PNG bytes and HTML; and what happens without the packages that draw them."""

from __future__ import annotations

import html.parser
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from patchbay import plots
from patchbay.errors import MissingExtraError
from patchbay.plots import extras

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;", "$x^2$", "</style>", "'quoted'"]


def all_plots() -> list[plots.Plot]:
    values = np.linspace(-1, 1, 36).reshape(6, 6)
    return [
        plots.heatmap(values, HOSTILE, HOSTILE, HOSTILE[0], x_title=HOSTILE[1], y_title="$y$", scale_title=HOSTILE[0]),
        plots.head_grid(values, HOSTILE[0]),
        plots.attention(np.abs(values), HOSTILE, HOSTILE[1]),
        plots.token_table([HOSTILE] * 6, np.abs(values), HOSTILE, HOSTILE, HOSTILE[0], highlight=HOSTILE[:1]),
        plots.token_strip(HOSTILE, values[0], HOSTILE[0], scale_title=HOSTILE[1]),
    ]


def pixels(data: bytes) -> np.ndarray:
    import matplotlib.image

    return np.asarray(matplotlib.image.imread(io.BytesIO(data), format="png"))


class Tags(html.parser.HTMLParser):
    """Collects a page's tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("dark", [False, True])
def test_png_is_a_picture_of_the_right_size(index: int, dark: bool) -> None:
    """PNG bytes hold as many pixels as the figure's inches times the resolution, and many colours."""
    plot = all_plots()[index]
    image = pixels(plot.png(dpi=50, dark=dark))
    width, height = plot.figure(dark=dark).get_size_inches()
    assert abs(image.shape[1] - width * 50) <= 1
    assert abs(image.shape[0] - height * 50) <= 1
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20
    assert image[0, 0, :3].mean() < 0.2 if dark else image[0, 0, :3].mean() > 0.9


def test_png_is_written_where_asked(tmp_path: Path) -> None:
    """`png(path)` writes the bytes that it returns."""
    data = plots.heatmap(np.eye(3)).png(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == data
    assert data.startswith(b"\x89PNG")


def test_a_figure_shows_the_values_in_the_scale_s_colours() -> None:
    """The highest value's cell is viridis yellow and the lowest's is its purple."""
    image = pixels(plots.heatmap([[0.0, 1.0]], number=" ").png(dpi=100))[..., :3]
    for rgb in ((68, 1, 84), (253, 231, 37)):
        assert np.isclose(image, np.array(rgb) / 255, atol=0.02).all(-1).mean() > 0.05


def test_figures_leave_pyplot_alone() -> None:
    """Drawing registers nothing with pyplot, whose figures live until they are closed."""
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.heatmap(np.eye(3)).png()
    assert plt.get_fignums() == before


@pytest.mark.parametrize("index", range(5))
def test_html_of_a_plot_escapes_every_label(index: int) -> None:
    """Hostile tokens appear as text: no tag, attribute or style comes out of them."""
    fragment = all_plots()[index].html()
    tags = Tags()
    tags.feed(fragment)
    assert "script" not in tags.tags
    assert not [a for a, _ in tags.attributes if a.startswith("on")]
    images = [v for a, v in tags.attributes if a in ("src", "srcset")]
    assert all(v is not None and v.startswith("data:image/png;base64,") for v in images)
    assert "<script" not in fragment
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in fragment


def test_every_picture_has_a_description() -> None:
    """Each image's alt text names the title and where the extreme values are."""
    plot = plots.heatmap([[0.0, 0.25], [0.75, 0.5]], ["a", "b"], ["first", "second"], "Where it is")
    assert plot.alt == "Heat map 2 by 2: Where it is. Highest 0.75 at second, a; lowest 0.00 at first, a."
    assert 'alt="Heat map 2 by 2: Where it is.' in plot.html()


def test_a_report_is_one_page_without_outside_resources(tmp_path: Path) -> None:
    """The page escapes everything, holds its pictures inline, has one h1, and names nothing outside itself."""
    report = plots.Report(HOSTILE[0], lead=HOSTILE[1], footer=HOSTILE[2])
    for plot in all_plots():
        part = report.section(HOSTILE[0], finding=HOSTILE[1])
        part.text(HOSTILE[0]).plot(plot).code(HOSTILE[4]).finding(HOSTILE[0], passed=False)
        part.facts({HOSTILE[0]: HOSTILE[1]}).table(HOSTILE, [HOSTILE], caption=HOSTILE[0]).details(*HOSTILE[:2])
    path = report.write(tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert page.startswith("<!doctype html>")
    assert tags.tags.count("h1") == 1
    assert tags.tags.count("section") == 5
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(tags.tags)
    assert "default-src 'none'" in dict(tags.attributes).get("content", "") or "default-src" in page
    assert "http" not in page.replace("http-equiv", "")
    assert not [a for a, _ in tags.attributes if a.startswith("on")]
    links = {v for a, v in tags.attributes if a == "href" and v is not None}
    assert links == {f"#s{i}" for i in range(1, 6)}


def test_a_report_follows_the_reader_s_theme() -> None:
    """The page and its pictures come in a light and a dark form."""
    report = plots.Report("x")
    report.section("y").plot(plots.heatmap(np.eye(2)))
    page = report.html()
    assert "color-scheme: light dark" in page
    assert page.count("(prefers-color-scheme: dark)") == 2


def test_notebooks_get_html() -> None:
    """A notebook shows plots and reports as HTML."""
    plot = plots.token_strip(["a", "b"], [0.0, 1.0])
    report = plots.Report("x")
    report.section("y").plot(plot)
    assert plot._repr_html_() == plot.html()
    assert plot.html() in report._repr_html_()


@pytest.mark.parametrize(("module", "draw"), [("rich", "text"), ("matplotlib", "png")])
def test_a_missing_package_names_the_extra(module: str, draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rich or matplotlib the error says which extra to install, and is an ImportError."""

    def absent(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=module)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    plot = plots.heatmap([[1.0]])
    with pytest.raises(MissingExtraError, match=rf"{module}.*patchbay\[plots\]") as caught:
        getattr(plot, draw)()
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == module


def test_a_broken_package_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When an installed package cannot import something of its own, that error is shown as it is."""

    def broken(name: str) -> object:
        raise ModuleNotFoundError("No module named 'kiwisolver'", name="kiwisolver")

    monkeypatch.setattr(extras.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="kiwisolver") as caught:
        plots.heatmap([[1.0]]).png()
    assert not isinstance(caught.value, MissingExtraError)


def test_drawing_packages_are_imported_when_something_is_drawn() -> None:
    """Importing patchbay.plots and making a plot imports neither rich nor matplotlib."""
    code = (
        "import sys; from patchbay import plots; plots.heatmap([[1.0]]); "
        "print(sorted({'rich', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    """Every name in __all__ resolves, dir lists them, and an unknown name is an AttributeError."""
    assert all(getattr(plots, name) is not None for name in plots.__all__)
    assert dir(plots) == sorted(plots.__all__)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        plots.nothing_of_that_name  # noqa: B018
