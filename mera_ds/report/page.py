"""A report as one HTML page that needs no other file: tables, figures, samples, provenance."""

import base64
import html
from collections.abc import Sequence

from mera_ds.report.figures import Picture
from mera_ds.report.render import Table, to_html
from mera_ds.report.samples import samples_html
from mera_ds.report.summary import Section
from mera_ds.shards.preview import SCRIPT, STYLE


def page_html(
    parts: Sequence[tuple[Section, Sequence[Table], Sequence[str], Table]],
    figures: Sequence[tuple[str, Picture]],
) -> str:
    """Return the page.

    Args:
        parts: each section with its tables, remarks and provenance.
        figures: each with its caption.
    """
    drawn = "".join(_figure(caption, picture) for caption, picture in figures)
    sections = "".join(_section(*part) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mera-ds report</title>
<style>{STYLE}{_STYLE}</style>
</head>
<body>
<h1>Report</h1>
<h2>Figures</h2>
<div class="figures">{drawn}</div>
{sections}
<script>{SCRIPT}</script>
</body>
</html>
"""


def _figure(caption: str, picture: Picture) -> str:
    url = f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
    text = html.escape(caption)
    return (
        f'<figure class="drawn" style="width: {8 * picture.inches:g}rem">'
        f'<img src="{url}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    )


def _section(
    section: Section, tables: Sequence[Table], remarks: Sequence[str], provenance: Table
) -> str:
    listed = "".join(f"<li>{html.escape(remark)}</li>" for remark in remarks)
    warnings = f'<ul class="remarks">{listed}</ul>' if listed else ""
    return f"""<section>
<h2>Profile {html.escape(section.profile)}</h2>
<p>Limits: {html.escape(section.limits or "the profile states none")}</p>
{warnings}
{"".join(to_html(table) for table in tables)}
<h3>What the models say</h3>
{samples_html(section) or "<p>No predictions are stored.</p>"}
<details><summary>Provenance of every score</summary>
{to_html(provenance)}
</details>
</section>"""


_STYLE = """
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
h4 { font-size: .9rem; margin: 1.2rem 0 .4rem; }
figure { margin: 1.5rem 0; }
.figures { align-items: start; display: flex; flex-wrap: wrap; gap: 0 2rem; }
figure.drawn { max-width: 100%; }
figure.drawn img { background: #fff; box-sizing: border-box; height: auto; image-rendering: auto;
  margin: 0; padding: .5rem; width: 100%; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figure.drawn figcaption { font-size: .85rem; font-weight: 400; margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
thead { border-bottom: 1px solid; border-top: 2px solid; }
tbody { border-bottom: 2px solid; }
th, td { padding: .2rem .6rem; text-align: right; vertical-align: bottom; white-space: nowrap; }
th.label { text-align: left; }
th[scope=row] { font-weight: 400; }
.best { font-weight: 700; }
.second { text-decoration: underline; }
.notes { color: var(--soft); font-size: .75rem; margin: .4rem 0; padding-left: 1rem; }
.remarks { background: #fa01; border-left: 3px solid #fa0; font-size: .85rem;
  padding: .6rem 1rem .6rem 2rem; }
.question { font-size: .9rem; font-weight: 600; margin: .3rem 0; }
.said { font-size: .9rem; }
.speaker { display: flex; gap: .5rem; justify-content: space-between; }
.mark { white-space: nowrap; }
.cards { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
summary { cursor: pointer; margin: 2rem 0 1rem; }
"""
