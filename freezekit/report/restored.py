"""What a restore did, as text."""

from __future__ import annotations

from freezekit.audit.checkpoint.container import printable
from freezekit.audit.restoring import RestoreReport

__all__ = ["render"]

_MOST = 20


def render(report: RestoreReport) -> str:
    """Return the report as text: what was put back, how far it had moved, and what was verified.

    Args:
        report: the report.
    """
    before = report.before
    out, source, base = (printable(path or "", 200) for path in (report.out, before.source, before.against))
    layers = sum(layer.changed for layer in before.layers)
    norms = f"{len(before.layers)} layer{'' if len(before.layers) == 1 else 's'} with running statistics"
    of = f" ({layers} of {norms})" if before.layers else ""
    head = f"RESTORED: {len(report.restored)} of {before.compared} frozen tensors{of}"
    made = f"{out} is {source} with them as in {base}"
    if not report.restored:
        head = f"NOTHING HAD MOVED: {before.compared} frozen tensors are as in {base}"
        made = f"{out} is a copy of {source}"
    lines = [head, made, f"frozen: {printable(before.scope, 400)}"]
    moved = [finding for finding in before.findings if finding.code.startswith("FK1")]
    if moved:
        lines += ["", "until then:"]
        lines += [f"  {printable(f.name) or '(model)'}: {printable(f.message, 1000)}" for f in moved[:_MOST]]
    if len(moved) > _MOST:
        lines.append(f"  and {len(moved) - _MOST} more")
    verdict = "clean"
    if report.findings:
        codes = ", ".join(sorted({finding.code for finding in report.findings}))
        verdict = f"{codes} are left, first {printable(str(report.findings[0]), 400)}"
    lines += ["", f"verified: read again and compared bit for bit; an audit of it against {base}: {verdict}"]
    return "\n".join([*lines, *(f"note: {printable(note, 400)}" for note in report.notes)])
