"""A report: one HTML file with everything in it, which opens anywhere and fetches nothing.

Every string is escaped; the page's own policy forbids scripts and outside resources, so a hostile token stays text.
Readable on light and dark screens and on paper.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from patchbay.plots.base import Plot

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5b6470; --line: #d9dde3; --card: #f5f6f8;
  --good: #12703a; --bad: #b3261e; --accent: #0f5fb8; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --ink: #e6e8eb; --soft: #a3abb6; --line: #363b42;
  --card: #212429; --good: #6fd79a; --bad: #ff8f86; --accent: #8ab8f0; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem } h2 { font-size: 1.3rem; margin: 0 0 .6rem }
.lead { color: var(--soft); margin: 0 0 1.6rem; max-width: 46rem }
section { border-top: 1px solid var(--line); padding-top: 1.6rem; margin-top: 2.2rem }
p { margin: .6rem 0; max-width: 46rem }
ol.findings { padding: 1rem 1rem 1rem 2.4rem; background: var(--card); border-radius: 10px; margin: 0 }
ol.findings li { margin: .35rem 0 } ol.findings a { color: var(--accent); text-decoration: none; font-weight: 600 }
ol.findings b { color: var(--bad) } ol.findings a:hover { text-decoration: underline }
.finding { border-left: 4px solid var(--good); padding: .5rem .9rem; background: var(--card);
  border-radius: 0 8px 8px 0 }
.finding.failed { border-color: var(--bad) } .finding b { color: var(--good) } .finding.failed b { color: var(--bad) }
figure { margin: 1.2rem 0 } figure img { max-width: 100%; height: auto; display: block }
figcaption, caption { color: var(--soft); font-size: .9rem; text-align: left; padding: .3rem 0 }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: separate; border-spacing: 2px; font-size: .86rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; padding: .25rem .6rem; white-space: nowrap } tbody th { color: var(--soft) }
td { padding: .25rem .6rem; white-space: nowrap } table.tokens td { border-radius: 4px; min-width: 4.5rem }
table.tokens td small { opacity: .8; margin-left: .2rem }
table.tokens td.mark { outline: 3px solid #ff2d87; outline-offset: -2px; font-weight: 700 }
table.plain td, table.plain th { border-bottom: 1px solid var(--line) }
.strip span { padding: .15rem .35rem; border-radius: 4px; line-height: 2 }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; overflow-x: auto;
  font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
dl.facts { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 0 }
dl.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .3rem .7rem }
dl.facts dt { color: var(--soft); font-size: .74rem } dl.facts dd { margin: 0; font-weight: 600; font-size: .9rem }
details summary { cursor: pointer; color: var(--soft); font-size: .9rem }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem }
@media print { body { max-width: none; padding: 0 } section { break-inside: avoid } }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Section:
    """One part of a report; made by `Report.section`. Every method adds to its end and returns the section."""

    def __init__(self, title: str, anchor: str) -> None:
        self.title = title
        self.anchor = anchor
        self._parts: list[str] = []

    def text(self, *paragraphs: str) -> Section:
        """Paragraphs of plain text."""
        self._parts += [f"<p>{html.escape(p)}</p>" for p in paragraphs]
        return self

    def finding(self, sentence: str, *, passed: bool = True) -> Section:
        """A sentence that states a result, and whether the numbers bore it out."""
        kind, word = ("finding", "Found") if passed else ("finding failed", "Not found")
        self._parts.append(f'<p class="{kind}"><b>{word}.</b> {html.escape(sentence)}</p>')
        return self

    def plot(self, plot: Plot) -> Section:
        """A plot, with its description for readers who cannot see it."""
        self._parts.append(plot.html())
        return self

    def code(self, text: str) -> Section:
        """Text as it is, in a fixed-width face."""
        self._parts.append(f"<pre><code>{html.escape(text)}</code></pre>")
        return self

    def table(self, header: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "") -> Section:
        """A plain table."""
        head = "".join(f'<th scope="col">{html.escape(str(h))}</th>' for h in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        words = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="scroll"><table class="plain">{words}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
        return self

    def facts(self, facts: Mapping[str, object]) -> Section:
        """Short facts side by side, such as bytes and milliseconds."""
        pairs = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in facts.items())
        self._parts.append(f'<dl class="facts">{pairs}</dl>')
        return self

    def details(self, summary: str, text: str) -> Section:
        """Fixed-width text that is folded away until it is asked for."""
        self._parts.append(
            f"<details><summary>{html.escape(summary)}</summary><pre><code>{html.escape(text)}</code></pre></details>"
        )
        return self

    def html(self) -> str:
        """The section as HTML."""
        return f'<section id="{self.anchor}"><h2>{html.escape(self.title)}</h2>{"".join(self._parts)}</section>'


class Report:
    """Builds one self-contained HTML page.

    ::

        report = Report("Where the fact lives", lead="One trace, 40 runs.")
        report.section("Causal tracing").text("...").plot(picture).finding("...")
        report.write("report.html")
    """

    def __init__(self, title: str, *, lead: str = "", footer: str = "") -> None:
        self.title = title
        self.lead = lead
        self.footer = footer
        self._sections: list[Section] = []
        self._findings: list[tuple[str, str, bool]] = []

    def section(self, title: str, *, finding: str = "") -> Section:
        """A new section at the end; with `finding`, also a line that links to it at the top of the page."""
        section = Section(title, f"s{len(self._sections) + 1}")
        self._sections.append(section)
        if finding:
            self.summarize(section, finding)
        return section

    def summarize(self, section: Section, finding: str, *, passed: bool = True) -> None:
        """Add `finding` to the list at the top of the page, as a link to `section`; one that failed is marked."""
        self._findings.append((section.anchor, finding, passed))

    def html(self) -> str:
        """The whole page."""
        titles = {s.anchor: s.title for s in self._sections}
        found = "".join(
            f'<li><a href="#{anchor}">{html.escape(titles[anchor])}</a>: '
            f"{'' if passed else '<b>not found.</b> '}{html.escape(text)}</li>"
            for anchor, text, passed in self._findings
        )
        return "".join(
            (
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY, quote=True)}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body><main>",
                f"<h1>{html.escape(self.title)}</h1>",
                f'<p class="lead">{html.escape(self.lead)}</p>' if self.lead else "",
                f'<ol class="findings">{found}</ol>' if found else "",
                *(s.html() for s in self._sections),
                "</main>",
                f"<footer>{html.escape(self.footer)}</footer>" if self.footer else "",
                "</body></html>\n",
            )
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to `path` (UTF-8) and return its absolute path."""
        where = Path(path)
        where.write_text(self.html(), encoding="utf-8")
        return where.resolve()

    def _repr_html_(self) -> str:
        return "".join(s.html() for s in self._sections)
