"""The parity report as one self-contained page."""

from pathlib import Path

from jinja2 import Environment

from .report import CaseReport

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>twin-ssm parity</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d5d7db, #3a3d42); --bad: light-dark(#b3261e, #ff8a80);
        --good: light-dark(#1b6e3c, #7bd69b); --dim: light-dark(#5f6368, #9aa0a6); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } code, td.n { font-family: ui-monospace, monospace; font-size: .85em; }
.verdict { font-weight: 600; } .ok { color: var(--good); } .bad { color: var(--bad); } .dim { color: var(--dim); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .3rem 0 1.2rem; }
td, th { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
h2 { font-size: 1.05rem; margin: 1.4rem 0 .2rem; }
</style></head><body>
<h1>twin-ssm parity</h1>
<p>Ran on <strong>{{ ran_on }}</strong>. {% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.</p>
<p class="verdict {{ 'ok' if not failed else 'bad' }}">{{ reports|length - failed }} of {{ reports|length }} cases agree{{ "." if not failed else ", " ~ failed ~ " fail." }}</p>
<p class="dim">Error is ‖got − ref‖₂ / ‖ref‖₂; “worst” is max |got − ref| / max |ref|. The reference is the float64 recurrence
in NumPy, or, in rows “twin against twin”, the Triton result.</p>
{% for report in reports %}
<h2><span class="{{ 'ok' if report.ok else 'bad' }}">{{ "✓" if report.ok else "✗" }}</span> {{ report.case.op }}: {{ report.case.name }}</h2>
<div class="dim"><code>{% for key, value in report.case.dims.items() %}{{ key }}={{ value }} {% endfor %}{{ report.case.dtype }}, state {{ report.case.state_dtype }}</code></div>
<div class="wide"><table><tr><th>implementation</th><th>output</th><th>error</th><th>worst</th><th>tolerance</th><th>launched with</th></tr>
{% for name, comparisons in report.oracle.items() %}{% for c in comparisons %}
<tr><td>{{ name if loop.first }}</td><td>{{ c.output }}</td><td class="n {{ '' if c.ok else 'bad' }}">{{ "%.1e"|format(c.error.relative) }}</td><td class="n">{{ "%.1e"|format(c.error.worst) }}</td><td class="n">{{ "%.1e"|format(c.relative) }}</td><td>{% if loop.first %}<code>{{ report.rows.get(name, "") }}</code>{% endif %}</td></tr>
{% endfor %}{% endfor %}{% for c in report.between %}
<tr><td>{{ "twin against twin" if loop.first }}</td><td>{{ c.output }}</td><td class="n {{ '' if c.ok else 'bad' }}">{{ "%.1e"|format(c.error.relative) }}</td><td class="n">{{ "%.1e"|format(c.error.worst) }}</td><td class="n">{{ "%.1e"|format(c.relative) }}</td><td></td></tr>
{% endfor %}</table></div>
{% for note in report.notes %}<p class="dim">not run: {{ note }}</p>{% endfor %}
{% for failure in report.failures %}<p class="bad">{{ failure }}</p>{% endfor %}
{% endfor %}
</body></html>
"""  # noqa: E501


def write(path: Path, reports: list[CaseReport], ran_on: str, versions: dict[str, str]) -> None:
    template = Environment(autoescape=True).from_string(_PAGE)
    failed = sum(not report.ok for report in reports)
    path.write_text(template.render(reports=reports, ran_on=ran_on, versions=versions, failed=failed), "utf-8")
