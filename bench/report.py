"""results.json of a comparison → a Markdown table for each metric, and a picture.

    python -m bench.report build/bench/results/results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Variant = dict[str, Any]

OURS = "pyengine"
# What a width is compared with where ours hasn't got it: the next one that it has.
NEXT = {"float32": ["float32"], "bfloat16": ["bfloat16", "float32"], "int8": ["int8"], "int4": ["int4", "int8"]}
# Metric → unit, and what it has of seconds or bytes.
LESS_IS_BETTER = dict.fromkeys(("load", "load_with_import", "from_checkpoint"), ("s", 1.0)) | {"memory": ("MB", 1e6)}
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
NOT_TIMED = {"skipped": "skipped", "error": "failed"}


@dataclass(frozen=True)
class Row:
    """A variant in a metric, over the rounds that have a sample."""

    variant: Variant
    median: float
    least: float
    most: float
    ratio: float | None  # how many times as good ours is: the median of the rounds' ratios
    ratio_to: str  # the variant of ours that this is
    share: float | None  # of the roofline: the median of the rounds' shares
    roofline: float | None

    @property
    def name(self) -> str:
        return f"{self.variant['engine']} {self.variant['variant']}"


def rows(results: Results, metric: str) -> list[Row]:
    """The variants that have samples of a metric."""
    found = []
    for variant in results["variants"]:
        values = samples(variant, metric)
        present = [value for value in values if value is not None]
        if not present:
            continue
        ratio, ratio_to = ratio_of_ours(results, variant, metric)
        lines = [line[variant["width"]].get(metric) for line in results["rooflines"]]
        pairs = [(v, line) for v, line in zip(values, lines, strict=True) if v is not None and line]
        found.append(
            Row(
                variant=variant,
                median=statistics.median(present),
                least=min(present),
                most=max(present),
                ratio=ratio,
                ratio_to=ratio_to,
                share=statistics.median(v / line for v, line in pairs) if pairs else None,
                roofline=statistics.median(line for _, line in pairs) if pairs else None,
            )
        )
    return found


def samples(variant: Variant, metric: str) -> list[float | None]:
    """A value, or None, for each round."""
    return list(variant["metrics"].get(metric, {}).get("samples", []))


def ratio_of_ours(results: Results, variant: Variant, metric: str) -> tuple[float | None, str]:
    """How many times as good ours of the same width is, and which one that is; see `Row`."""
    if variant["engine"] == OURS:
        return None, ""
    ours = {v["width"]: v for v in reversed(results["variants"]) if v["engine"] == OURS}  # the first of each width
    for width in NEXT[variant["width"]]:
        pairs = zip(samples(ours.get(width, {"metrics": {}}), metric), samples(variant, metric), strict=False)
        both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        if both:
            less = metric in LESS_IS_BETTER
            return statistics.median(t / m if less else m / t for m, t in both), ours[width]["variant"]
    return None, ""


def markdown(results: Results) -> str:
    """The whole report."""
    machine, about = results["machine"], results["model"]
    lines = [
        f"{about['type']} {about['name']}, {about['parameters'] / 1e6:.0f} M parameters, {results['threads']} threads, "
        f"{len(results['limits'])} rounds. {machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}, Python "
        f"{machine['python']}, {machine['date']}.",
        "",
        f"Limits in the same rounds, median (lowest{DASH}highest): {limits_line(results['limits'])}.",
        "",
        f"Figures are the median (lowest{DASH}highest) of the rounds. *ours is*: how many times as fast, or as small, "
        "pyengine is in the same width or the one named; above 1 is better; the median of the rounds' ratios. *share*: "
        "of what the measured limits allow to weights of that width: reading them once a step, and the products with "
        "them, of a prompt those that all tokens need. Memory is the largest resident set, files that are mapped "
        "included; loading is from the system's file cache, in a process that has just started; a conversion was timed "
        "once, when it was made.",
    ]
    for metric, title in results["metrics"].items():
        lines += ["", f"### {title[0].upper()}{title[1:]}", "", *table(results, metric)]
    return "\n".join([*lines, "", "### Agreement with our float32", "", *checks(results), "", *notes(results), ""])


def table(results: Results, metric: str) -> list[str]:
    """The lines of a metric's table, and why variants are missing."""
    unit, scale = LESS_IS_BETTER.get(metric, ("tokens/s", 1.0))
    lines = [f"| engine | {unit} | ours is | share |", "|---|---|---|---|"]
    for row in rows(results, metric):
        value = spread(row.median / scale, row.least / scale, row.most / scale)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} {TIMES}"
        if row.ratio is not None and row.ratio_to != row.variant["width"]:
            ratio += f" ({row.ratio_to})"
        share = "" if row.share is None else f"{row.share:.0%}"
        lines.append(f"| {row.name} | {value} | {ratio} | {share} |")
    for variant in results["variants"]:
        known = variant["metrics"].get(metric, {})
        for kind, word in NOT_TIMED.items():
            if kind in known:
                lines += ["", f"{variant['engine']} {variant['variant']}: {word}: {known[kind]}"]
    return lines


def checks(results: Results) -> list[str]:
    """The lines of the table of what was computed."""
    lines = [
        "| engine | checkpoint | logits, relative error | KL divergence, nats | same top token | texts | regret |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in results["variants"]:
        for checkpoint, found in variant["checks"].items():
            of = found["logits"]
            logits = f"{of['relative']:.1e} | {of['divergence']:.1e} | {of['same_top']:.0%}" if of else "not shown | |"
            texts = f"{found['equal_texts']} of {found['texts']}"
            name = f"{variant['engine']} {variant['variant']}"
            lines.append(f"| {name} | {checkpoint} | {logits} | {texts} | {found['regret']:.1e} |")
    return lines


def notes(results: Results) -> list[str]:
    """What wasn't timed, and what ran: versions and settings, once an engine."""
    lines = []
    for variant in results["variants"]:
        if variant["status"] != "ok":
            lines.append(f"- {variant['engine']} {variant['variant']}: {variant['status']}: {variant['reason']}")
    told = set()
    for variant in results["variants"]:
        if "versions" in variant and variant["engine"] not in told:
            told.add(variant["engine"])
            versions = ", ".join(f"{package} {version}" for package, version in variant["versions"].items())
            settings = f"; {variant['settings']}" if variant["settings"] else ""
            lines.append(f"- {variant['engine']}: {versions}{settings}")
    return lines


def limits_line(limits: list[dict[str, Any]]) -> str:
    """The limits in words."""
    parts = []
    for key, title in (
        ("bandwidth", "read bandwidth {} GB/s"),
        ("peak_float32", "float32 {} GFLOPS"),
        ("peak_bfloat16", "bfloat16 {} GFLOPS"),
        ("peak_int8", "int8 {} GOPS"),
    ):
        values = [limit[key] / 1e9 for limit in limits if key in limit]
        if values:
            parts.append(title.format(spread(statistics.median(values), min(values), max(values))))
    return ", ".join(parts)


def spread(*values: float) -> str:
    """The median, the least and the most, with three digits or more."""
    median, least, most = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{median} ({least}{DASH}{most})"


def picture(results: Results, path: Path) -> None:
    """Bars with their spread, a panel for each metric, and the rooflines of the widths as lines."""
    import matplotlib  # not at the top: the tables need none

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [metric for metric in results["metrics"] if rows(results, metric)]
    if not shown:
        return
    height = 1 + 0.25 * max(len(rows(results, metric)) for metric in shown)
    n_line = -(-len(shown) // 2)
    figure, panels = pyplot.subplots(n_line, 2, figsize=(14, height * n_line), squeeze=False, layout="constrained")
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    for metric, panel in zip(shown, panels.flat, strict=False):
        bars(panel, rows(results, metric), *LESS_IS_BETTER.get(metric, ("tokens/s", 1.0)))
        panel.set_title(results["metrics"][metric])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def bars(panel: Any, found: list[Row], unit: str, scale: float) -> None:
    """A panel: ours in another colour; a short line across each bar is what the limits allow to its width."""
    values = [row.median / scale for row in found]
    errors = [[(r.median - r.least) / scale for r in found], [(r.most - r.median) / scale for r in found]]
    colours = ["tab:blue" if row.variant["engine"] == OURS else "tab:gray" for row in found]
    panel.barh(range(len(found)), values, xerr=errors, color=colours, error_kw={"lw": 0.8})
    for i, row in enumerate(found):
        if row.roofline is not None:
            panel.vlines(row.roofline / scale, i - 0.45, i + 0.45, color="tab:red")
    panel.set_yticks(range(len(found)), [row.name for row in found])
    panel.invert_yaxis()
    panel.set_xlabel(unit + (", red: roofline" if any(row.roofline for row in found) else ", less is better"))


def write(results: Results, folder: Path) -> None:
    """results.json, results.md, and results.png where matplotlib is installed."""
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "results.md").write_text(markdown(results))
    try:
        picture(results, folder / "results.png")
    except ImportError:
        (folder / "results.png").unlink(missing_ok=True)  # one of an older run would not fit the tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a results.json")
    arguments = parser.parse_args()
    write(json.loads(arguments.results.read_text()), arguments.results.parent)


if __name__ == "__main__":
    main()
