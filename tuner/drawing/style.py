"""Colours and layout of the pages, for light and dark screens and for paper.

Each scheme names the same tokens. Text on its background has a contrast of 4.5 at least, marks of
3 (WCAG 2.2, criteria 1.4.3 and 1.4.11); a test computes them. Marks differ in shape as well.
"""

from . import roles

HEAT_STEPS = 7
"""Colours of the heat map: heat0 is the fastest."""

LIGHT = {
    "page": "#f4f6f8",
    "card": "#ffffff",
    "text": "#1b2027",
    "muted": "#59626e",
    "line": "#d5dae1",
    "axis": "#7d8793",
    "accent": "#0b62c4",
    "second": "#a84b00",
    "failed": "#c0262d",
    "good": "#11703c",
    "heat0": "#08306b",
    "heat1": "#0b4a94",
    "heat2": "#1c68b8",
    "heat3": "#6fa9df",
    "heat4": "#9cc5ec",
    "heat5": "#c4dcf4",
    "heat6": "#e4eef9",
    **{f"on-heat{i}": "#ffffff" for i in range(3)},
    **{f"on-heat{i}": "#0f1722" for i in range(3, HEAT_STEPS)},
    **roles.tokens("light"),
}
DARK = {
    "page": "#12151a",
    "card": "#1b1f26",
    "text": "#e7eaef",
    "muted": "#a5aeba",
    "line": "#363d47",
    "axis": "#7f8a97",
    "accent": "#6cb0ff",
    "second": "#f0a35a",
    "failed": "#ff8080",
    "good": "#62cf90",
    "heat0": "#d9e9ff",
    "heat1": "#abd0fc",
    "heat2": "#7db4f3",
    "heat3": "#5296dd",
    "heat4": "#2b619c",
    "heat5": "#204a78",
    "heat6": "#1d3552",
    **{f"on-heat{i}": "#0b1017" for i in range(4)},
    **{f"on-heat{i}": "#ffffff" for i in range(4, HEAT_STEPS)},
    **roles.tokens("dark"),
}


def _variables(scheme: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in scheme.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"
    + "".join(
        f".heat{i}{{fill:var(--heat{i})}}.on-heat{i}{{fill:var(--on-heat{i})}}"
        f"i.heat{i}{{background:var(--heat{i})}}\n"
        for i in range(HEAT_STEPS)
    )
    + roles.rules()
    + """
*{box-sizing:border-box}
body{margin:0;padding:16px;background:var(--page);color:var(--text);
  font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1240px;margin:0 auto}
h1{font-size:1.5em;margin:0 0 4px}
h2{font-size:1.15em;margin:0 0 2px;overflow-wrap:anywhere}
h3{font-size:.95em;margin:0 0 4px}
p{margin:0 0 8px}
a{color:var(--accent)}
code{font:.92em ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;overflow-wrap:anywhere}
td code{overflow-wrap:normal;white-space:nowrap}
.muted{color:var(--muted)}
.kernel{margin:0 0 14px}
.kernel p{margin:0 0 2px}
.good{color:var(--good)}
.failed{color:var(--failed)}
section{margin-top:28px;padding-top:16px;border-top:1px solid var(--line)}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:10px 0 12px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:6px 12px}
.facts dt{color:var(--muted);font-size:.8em}
.facts dd{margin:0;font-variant-numeric:tabular-nums}
.facts dd b{font-size:1.15em}
.charts{display:grid;align-items:start;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.few{grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
figure{margin:0;padding:10px 12px;background:var(--card);border:1px solid var(--line);
  border-radius:6px;break-inside:avoid;min-width:0}
figcaption{color:var(--muted);font-size:.82em;margin-top:4px}
svg.chart{display:block;width:100%;max-width:460px;height:auto;font-size:11px;
  font-variant-numeric:tabular-nums}
svg.strip{display:block;width:100%;min-width:840px;height:auto;font-size:12px;
  font-variant-numeric:tabular-nums}
.pan{overflow-x:auto}
.pan:focus-visible,.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--accent);
  outline-offset:2px}
.wide{margin-top:12px}
svg text{fill:var(--text)}
svg .small{font-size:.84em}
svg .bold{font-weight:600}
svg .muted{fill:var(--muted)}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--line)}
.axis{stroke:var(--axis)}
.step{fill:none;stroke:var(--accent);stroke-width:1.5}
.dot{fill:var(--accent);fill-opacity:.7}
.hollow{fill:var(--card);stroke:var(--accent)}
.beyond{fill:none;stroke:var(--accent);stroke-width:1.2}
.cross{fill:none;stroke:var(--failed);stroke-width:1.2}
.ring{fill:none;stroke:var(--text);stroke-width:2}
.ring-heat{fill:none;stroke:var(--on-heat0);stroke-width:2}
.default{stroke:var(--second);stroke-width:1.2;stroke-dasharray:5 3;fill:none}
.floor{stroke:var(--axis);stroke-dasharray:1 3;fill:none}
.curve{fill:none;stroke:var(--axis)}
.budget{fill:none;stroke:var(--second);stroke-width:1.5;stroke-dasharray:5 3}
.between{stroke:var(--card);stroke-width:.7}
.frame{fill:none;stroke:var(--axis);stroke-width:.8}
.outline{fill:none;stroke:var(--text);stroke-width:1.6}
.slash{fill:none;stroke:var(--on-edge);stroke-width:1}
.area{fill:var(--accent);fill-opacity:.16;stroke:var(--accent);stroke-width:1.3}
.bar{fill:var(--accent)}
.bar-floor{fill:var(--axis)}
svg .label-default{fill:var(--second)}
svg .label-best{fill:var(--accent);font-weight:600}
.hatch{stroke:var(--line);stroke-width:2}
.hatched{fill:url(#hatch);stroke:var(--line)}
.k-text{color:var(--text)}.k-accent{color:var(--accent)}.k-second{color:var(--second)}.k-axis{color:var(--axis)}
.swatch{display:inline-block;width:.9em;height:.9em;border-radius:2px;vertical-align:-.1em;
  margin-right:.3em;border:1px solid transparent}
i.none{border-color:var(--axis)}
.ramp i{display:inline-block;width:14px;height:9px;print-color-adjust:exact}
.key{display:inline-block;margin-right:.8em}
details{margin-top:10px}
figure details{margin-top:6px;font-size:.82em}
figure summary{color:var(--muted);font-weight:500}
summary{cursor:pointer;font-weight:600}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:6px;
  margin-top:6px}
table{border-collapse:collapse;width:100%;font-size:.86em;font-variant-numeric:tabular-nums}
th,td{padding:4px 9px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{white-space:nowrap;color:var(--muted);font-weight:600}
td:first-child .failed{white-space:nowrap}
.n{text-align:right;white-space:nowrap}
tr.best td{font-weight:600}
tr:last-child td{border-bottom:0}
.class{min-width:13em}
.reason{min-width:16em;overflow-wrap:anywhere}
.defs{position:absolute}
.ground{fill:var(--card)}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.prose{max-width:46em}
.prose h3{margin:16px 0 2px;font-size:1em}
.prose h3:first-child{margin-top:0}
.question{margin:6px 0 12px;font-size:1.12em;padding-left:10px;border-left:3px solid var(--accent)}
.origin{display:inline-block;font-weight:400;font-size:.78em;color:var(--muted);padding:0 4px;
  border:1px solid var(--line);border-radius:4px}
.caption{font-size:.86em;margin:6px 0 0}
pre{overflow-x:auto;margin:8px 0 0;padding:8px 12px;background:var(--card);
  border:1px solid var(--line);border-radius:6px}
pre code{overflow-wrap:normal}
.slips{margin:4px 0 0}
.slips dt{margin-top:6px}
.slips dd{margin:0 0 0 1.2em}
.lesson{display:grid;gap:12px 24px;margin-top:12px;grid-template-columns:minmax(0,1fr)}
.beside{display:grid;gap:12px;align-content:start;grid-template-columns:minmax(0,1fr)}
@media (min-width:1000px){.lesson{grid-template-columns:minmax(0,46em) minmax(340px,1fr)}}
@media print{body{background:none;padding:0;font-size:11px}
  svg,.ramp,.swatch{print-color-adjust:exact}
  svg.strip{min-width:0}
  .pan{overflow:visible}
  .scroll{overflow:visible}
  details::details-content{content-visibility:visible;display:block;height:auto}
  td code{white-space:normal;overflow-wrap:anywhere}
  th,td{padding:2px 5px}
  .charts{grid-template-columns:1fr 1fr}}
"""
)
