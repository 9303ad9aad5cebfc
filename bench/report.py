"""The report: a table per case, one line per case at the end, every bar with its verdict; also JSON and a plot.

Losses are shown like gains and marked. "even" means that the difference lies inside the noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from .harness import MAX_DISTURBED, OURS, Measurement, Outcome
from .jobs import Group, Result
from .machine import Machine, Peak

HEADER = ("", "median", "quartiles", "p95", "GFLOP/s", "of peak", "ours is", "dropped")


def seconds_text(seconds: float) -> str:
    """Three significant digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def bytes_text(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _percent(noise: float) -> str:
    return f"{noise * 100:.1f} %" if math.isfinite(noise) else "unknown"


def comparison(measurement: Measurement, name: str) -> str:
    """How ours stands to a variant: a factor, "even" inside the noise, or "?" where too many samples were disturbed."""
    if name == OURS or OURS not in measurement.timings:
        return ""
    ratio = measurement.ratio(OURS, name)
    if name.startswith(OURS):
        return f"takes {1 / ratio.value:.2f}x of ours"
    factor = f"{1 / ratio.value:.2f}x faster" if ratio.value < 1 else f"{ratio.value:.2f}x slower"
    if not ratio.trusted:
        return f"{factor} ? (disturbed)"
    if not ratio.differs_from(1.0):
        return f"even ({factor})"
    return factor if ratio.value < 1 else f"{factor} LOSS"


def _rows(group: Group, peak: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, timing in group.measurement.timings.items():
        rate = group.flops / timing.median / 1e9 if group.flops and "alone" not in name else None
        rows.append(
            (
                name,
                seconds_text(timing.median),
                f"{seconds_text(timing.quantile(0.25))} .. {seconds_text(timing.quantile(0.75))}",
                seconds_text(timing.quantile(0.95)),
                f"{rate:.0f}" if rate else "",
                f"{100 * rate / peak:.0f} %" if rate else "",
                comparison(group.measurement, name),
                f"{timing.dropped} of {len(timing.seconds)}",
            )
        )
    return rows


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    # Names and remarks to the left, numbers to the right.
    left = {0, len(widths) - 2}
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("    " + "  ".join(cells).rstrip())
    return lines


def outcome_text(outcome: Outcome) -> str:
    bar, noise = outcome.bar, _percent(outcome.noise)
    if bar.against is None:
        relation = f"takes {seconds_text(outcome.value)} (bar <= {seconds_text(bar.limit)}, noise {noise})"
    else:
        relation = f"takes {outcome.value:.2f}x the time of {bar.against} (bar <= {bar.limit:.2f}x, noise {noise})"
    verdict = f"NO VERDICT, {outcome.reason}" if outcome.verdict == "no verdict" else outcome.verdict.upper()
    return f"{bar.variant} {relation}: {verdict}"


def case_text(result: Result, peaks: Mapping[str, Peak]) -> str:
    """The full table of one case."""
    lines = [f"{result.operator}  {result.dtype}  {result.case}"]
    if result.failure:
        return "\n".join([*lines, f"    FAILED, not timed: {result.failure}", ""])
    for group in result.groups:
        noise = _percent(group.measurement.noise)
        lines.append(f"  {group.title}  (A/A noise {noise})")
        lines += _columns([HEADER, *_rows(group, peaks[result.dtype].gflops)])
        lines += [f"    bar  {outcome_text(outcome)}" for outcome in group.outcomes]
    if result.saved_bytes:
        kept = "; ".join(f"{name} {bytes_text(count)}" for name, count in result.saved_bytes.items())
        lines.append(f"  saved for backward: {kept}")
    for name, stages in result.stages.items():
        lines.append(f"  {name}: " + ", ".join(f"{stage} {seconds_text(value)}" for stage, value in stages.items()))
    lines += [f"  note: {note}" for note in result.notes]
    return "\n".join([*lines, ""])


def _speed(group: Group | None, name: str) -> str:
    if group is None or name not in group.measurement.timings:
        return "-"
    ratio = group.measurement.ratio(OURS, name)
    mark = "?" if not ratio.trusted else "" if ratio.differs_from(1.0) else "~"
    text = f"{mark}{1 / ratio.value:.2f}x"
    return f"**{text}**" if ratio.trusted and ratio.differs_from(1.0) and ratio.value > 1 else text


# In the order of the columns; an operator's table has those that were measured for it.
BASELINES = (
    "eager", "eager, bmm", "shifted matmul", "frozen linear", "PEFT", "torch.compile", "bare GEMM", "AdamW fused",
    "AdamW foreach", "bernoulli + AdamW fused", "original, eager", "original, torch.compile", "reference",
)  # fmt: skip


def summary_text(results: Sequence[Result]) -> str:
    """A Markdown table for each operator, one line per case and group: our time, and how many times as fast as each
    baseline ours is."""
    lines = ["Ours is so many times as fast as: (**bold**: a loss; ~: inside the noise; ?: too many samples disturbed)"]
    for operator in dict.fromkeys(result.operator for result in results):
        lines += ["", *_summary([result for result in results if result.operator == operator])]
    return "\n".join([*lines, ""])


def _summary(results: Sequence[Result]) -> list[str]:
    measured = {name for result in results for group in result.groups for name in group.measurement.timings}
    titles = [name for name in BASELINES if name in measured]
    columns = ["operator", "dtype", "case", "", "ours", *titles, "saved for backward, ours / eager"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in results:
        head = f"| {result.operator} | {result.dtype} | {result.case} |"
        if result.failure:
            lines.append(f"{head} FAILED |" + " |" * (2 + len(titles)))
            continue
        for group in result.groups:
            kept = result.saved_bytes if "backward" in group.title else {}
            saved = f"{bytes_text(kept[OURS])} / {bytes_text(kept['eager'])}" if {OURS, "eager"} <= kept.keys() else ""
            cells = [group.title, seconds_text(group.measurement.timings[OURS].median)]
            cells += [_speed(group, name) for name in titles]
            lines.append(f"{head} {' | '.join(cells)} | {saved} |")
    return lines


def bars_text(results: Sequence[Result]) -> str:
    """Every bar that was measured, the missed ones first, and the count of each verdict."""
    order = {"missed": 0, "no verdict": 1, "held": 2}
    found = [(f"{r.operator} {r.dtype} {r.case}, {g.title}", o) for r in results for g in r.groups for o in g.outcomes]
    found.sort(key=lambda pair: order[pair[1].verdict])
    lines = ["Bars", *(f"  {where}: {outcome_text(outcome)}" for where, outcome in found)]
    counts = [sum(o.verdict == verdict for _, o in found) for verdict in ("held", "missed", "no verdict")]
    lines.append(f"{counts[0]} held, {counts[1]} missed, {counts[2]} without a verdict")
    timings = [t for r in results for g in r.groups for t in g.measurement.timings.values()]
    dropped, taken = sum(t.dropped for t in timings), sum(len(t.seconds) for t in timings)
    if dropped > MAX_DISTURBED * taken:
        lines.append(f"{dropped} of {taken} samples were disturbed: measure again while nothing else runs here")
    failed = sum(r.failure is not None for r in results)
    if failed:
        lines.append(f"{failed} of {len(results)} cases FAILED the correctness gate or raised")
    return "\n".join(lines)


def _group_json(group: Group) -> dict[str, object]:
    m = group.measurement
    return {
        "title": group.title,
        "flops": group.flops,
        "aa_noise": m.noise if math.isfinite(m.noise) else None,
        "variants": {
            name: {
                "median_s": t.median,
                "quartiles_s": [t.quantile(0.25), t.quantile(0.75)],
                "p95_s": t.quantile(0.95),
                "gflops": group.flops / t.median / 1e9 if group.flops else None,
                "calls_a_sample": t.inner,
                "kept": len(t.kept),
                "dropped": t.dropped,
                "ours_over_this": m.ratio(OURS, name).value if OURS in m.timings else None,
            }
            for name, t in m.timings.items()
        },
        "bars": [{**asdict(o.bar), "value": o.value, "verdict": o.verdict, "reason": o.reason} for o in group.outcomes],
    }


def write_json(path: Path, head: Mapping[str, object], results: Sequence[Result]) -> None:
    """All numbers, times in seconds, after the entries of ``head``."""
    cases = [
        {
            "operator": r.operator,
            "case": r.case,
            "dtype": r.dtype,
            "sweep": r.sweep,
            "failure": r.failure,
            "saved_bytes": r.saved_bytes,
            "stages_s": r.stages,
            "notes": r.notes,
            "groups": [_group_json(g) for g in r.groups],
        }
        for r in results
    ]
    path.write_text(json.dumps({**head, "cases": cases}, indent=1) + "\n")


def write_plot(path: Path, machine: Machine, results: Sequence[Result]) -> None:
    """Speed-ups of the cases as bars (1 = the baseline), and time against each sweep's axis, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in results if not r.failure and r.groups]
    cases = [(r, g) for r in timed if r.sweep is None for g in r.groups if OURS in g.measurement.timings]
    axes_names = sorted({r.sweep[0] for r in timed if r.sweep})
    panels = (1 if cases else 0) + len(axes_names)
    height = max(4.0, 0.42 * len(cases))
    figure, axes = plt.subplots(1, max(1, panels), figsize=(8 * max(1, panels), height), squeeze=False)
    remaining = list(axes[0])
    if cases:
        axis = remaining.pop(0)
        for offset, name in enumerate(("eager", "bare GEMM")):
            for row, (_, group) in enumerate(cases):
                if name in group.measurement.timings:
                    speed = 1 / group.measurement.ratio(OURS, name).value
                    axis.barh(row + 0.4 * offset, speed - 1, left=1, height=0.38, color=f"C{offset}")
            axis.barh(0, 0, left=1, color=f"C{offset}", label=f"against {name}")
        axis.set_yticks(range(len(cases)), [f"{r.dtype} {r.case}, {g.title}" for r, g in cases], fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel("ours is so many times as fast (left of the line: a loss)")
        axis.invert_yaxis()
        axis.legend(fontsize=7)
    for name in axes_names:
        axis = remaining.pop(0)
        swept = [(r, r.sweep[1]) for r in timed if r.sweep and r.sweep[0] == name]
        points = [(r.dtype, at, r.groups[0].measurement.timings) for r, at in swept]
        for dtype in dict.fromkeys(dtype for dtype, _, _ in points):
            for variant, style in ((OURS, "-o"), ("eager", "--s"), ("bare GEMM", ":x")):
                line = sorted((at, t[variant].median * 1e3) for d, at, t in points if d == dtype and variant in t)
                if line:
                    axis.plot(*zip(*line, strict=True), style, label=f"{variant}, {dtype}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_ylabel("ms")
        axis.legend(fontsize=7)
    figure.suptitle(machine.title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
