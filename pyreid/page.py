"""The parts of a page that holds its pictures in itself, and needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape


def whole(title: str, date: str, tiles: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The page, of blocks of HTML by section. Sections without any are left out."""
    there = {name: "".join(blocks) for name, blocks in sections.items() if blocks}
    return _PAGE.format(
        style=_STYLE,
        title=escape(title),
        date=escape(date),
        tiles=tiles,
        links=" ".join(f'<a href="#{slug(name)}">{escape(name)}</a>' for name in there),
        sections="".join(
            f'<section id="{slug(name)}"><h2>{escape(name)}</h2>{blocks}</section>\n'
            for name, blocks in there.items()
        ),
    )


def figure(title: str, kind: str, content: str, width: int, caption: str = "") -> str:
    """A picture of a type ("png"), in base64, so many CSS pixels wide."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f"<h3>{escape(title)}</h3><figure>"
        f'<img alt="{escape(title)}" width="{width}" src="data:image/{kind};base64,{content}">'
        f"{below}</figure>"
    )


def tile(name: str, value: str, note: str = "") -> str:
    return (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
    )


class Html(str):
    """Text that is HTML already."""


def table(head: Sequence[str] | None, rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        texts = [cell if isinstance(cell, Html) else escape(cell) for cell in cells]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    body = "".join(line(row, "td") for row in rows)
    named = f' class="{kind}"' if kind else ""
    return f"<div class=wide><table{named}>{top}<tbody>{body}</tbody></table></div>"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)


_STYLE = """:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1f2430; --faint: #667085; --line: #e4e7ec; --blue: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --card: #1d2128; --ink: #e6e8ec; --faint: #98a1b0; --line: #313742; --blue: #56b4e9;
  }
  img { filter: brightness(0.93); }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
header, nav, main { max-width: 1040px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 14px; font-size: 19px; }
h3 { margin: 22px 0 8px; font-size: 15px; }
h2 + h3 { margin-top: 0; }
header p, .note, figcaption { color: var(--faint); margin: 6px 0 0; font-size: 13.5px; }
dl {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 20px 0 0;
}
dl div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
dl div { padding: 10px 16px 12px; }
dt { color: var(--faint); font-size: 13px; }
dd { margin: 0; font-size: 25px; font-weight: 600; line-height: 1.25; }
dd small { display: block; min-height: 1.25em; font-size: 13px; font-weight: 400; color: var(--faint); }
nav { padding-top: 16px; padding-bottom: 4px; }
nav a { margin-right: 16px; color: var(--blue); text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
section { padding: 20px 22px 22px; margin: 14px 0; }
main { padding-bottom: 40px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); }
th, td { text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: 13.5px; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .plain td { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
.plain td { overflow-wrap: anywhere; white-space: normal; vertical-align: top; font-size: 14px; }
.plain td { padding: 3px 16px 3px 0; }
.plain td:first-child { color: var(--faint); white-space: nowrap; }
.bench td { padding: 2px 12px 2px 0; font-size: 13.5px; }
.bench td:first-child { padding-left: 22px; white-space: normal; color: var(--faint); }
.bench td:first-child:has(b) { padding-left: 0; padding-top: 9px; color: var(--ink); }
.columns { columns: 2 360px; column-gap: 40px; }
.columns > div { break-inside: avoid; padding-bottom: 18px; }
.columns h3 { margin-top: 0; }
.bar {
  display: inline-block; width: 160px; height: 9px; margin-right: 10px; border-radius: 5px;
  background: var(--line);
}
.bar i { display: block; height: 100%; border-radius: 5px; background: var(--blue); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; padding: 8px; border-radius: 8px; background: white; }
@media (max-width: 600px) { .bar { width: 60px; } section { padding: 16px 14px; } }
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --card: #ffffff; --ink: #000000; --faint: #444444; --line: #cccccc; --blue: #0072b2;
  }
  body { font-size: 12px; }
  nav { display: none; }
  section, dl div { border: 0; padding-left: 0; padding-right: 0; }
  h2, h3 { break-after: avoid; }
  figure, table, .columns > div { break-inside: avoid; }
  img { padding: 0; filter: none; max-height: 90vh; width: auto; }
  .bar, .bar i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{date}</p>
<dl>{tiles}</dl>
</header>
<nav>{links}</nav>
<main>
{sections}</main>
</body>
</html>
"""
