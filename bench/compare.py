"""pyengine side by side with other engines: the same weights, the same number of threads, in turn.

    make bench-peers                                   # .venv-peers: pyengine, and the engines of bench/peers.txt
    .venv-peers/bin/python -m bench.compare            # GPT-2 of the 124M shape with random weights
    .venv-peers/bin/python -m bench.compare --model path/to/gpt2 --engines pyengine,llama_cpp --rounds 3

Each engine in each of its formats has a process of its own, which is stopped unless it is its turn. Before anything is
timed, its output is compared with our float32; one that computes something else is not timed. Then come rounds: the
machine's limits, and each variant once in each metric. Figures of one round stand for one state of the machine, so
ratios are made within rounds. DIR gets results.json (all samples), results.md and results.png; `python -m bench.report
DIR/results.json` makes the latter two again.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import random_checkpoint, report
from bench.contender import Contender, Subject, Trouble, fitting, good
from bench.conversions import once
from bench.engines import VARIANTS, WIDTHS
from bench.metrics import METRICS, TITLES
from bench.remote import Remote
from bench.roofline import decode_bytes, roofline
from pyengine import loading
from pyengine.cost import cost

LIMIT_MEGABYTES = 512


def main(argv: list[str] | None = None) -> int:
    """Runs a comparison; returns the exit code."""
    arguments = parser().parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what ends it ends its workers, which are stopped
    subjects = list(subjects_of(arguments.model, arguments.work.resolve(), arguments.metrics))
    contenders = [
        Contender(engine, variant, arguments.threads, arguments.out / "logs")
        for engine in arguments.engines
        for variant, width in VARIANTS[engine].items()
        if width in arguments.dtypes or variant in arguments.dtypes
    ]
    results = {
        "machine": machine(),
        "model": describe(subjects[0]),
        "threads": arguments.threads,
        "metrics": {name: TITLES[name] for name in TITLES if name in arguments.metrics},
        "limits": [],
        "rooflines": [],
        "variants": [contender.found for contender in contenders],
    }
    try:
        prepare(contenders, subjects, arguments)
        for number in range(1, arguments.rounds + 1):
            say(f"round {number} of {arguments.rounds}")
            measure(results, contenders, subjects, arguments, number)
            report.write(results, arguments.out)
    finally:
        for contender in contenders:
            contender.close()
    print((arguments.out / "results.md").read_text())
    return 0 if all(contender.found["status"] != "failed" for contender in contenders) else 1


def prepare(contenders: list[Contender], subjects: list[Subject], arguments: argparse.Namespace) -> None:
    """Converts, loads and checks all variants on all checkpoints."""
    keep = kept(subjects, arguments)
    for subject in subjects:
        reference = Remote("pyengine", "float32", arguments.threads, arguments.out / "logs" / "reference.log")
        try:
            good(reference.hello)
            good(reference.ask("load", files=str(subject.folder), threads=arguments.threads))
            for contender in contenders:
                if contender.ok:
                    say(f"{subject.folder.name}: {contender.engine} {contender.variant}", end=" … ")
                    contender.prepare(subject, reference)
                    contender.close(keep)
                    say(contender.found.get("reason") or summary(contender.found["checks"][subject.folder.name]))
        finally:
            reference.close()


def measure(
    results: dict[str, Any],
    contenders: list[Contender],
    subjects: list[Subject],
    arguments: argparse.Namespace,
    number: int,
) -> None:
    """One round: the limits, then everyone."""
    probe = Remote("pyengine", "float32", arguments.threads, arguments.out / "logs" / "limits.log")
    limits = good(probe.ask("limits", threads=arguments.threads, megabytes=LIMIT_MEGABYTES))
    probe.close()
    results["limits"].append(limits)
    results["rooflines"].append(rooflines(limits, subjects))
    ready = [contender for contender in contenders if contender.ok]
    if number == 1 and not arguments.fresh:
        for contender in ready:
            contender.warm_up(arguments.metrics, subjects[:1])
    for contender in ready:
        start = time.perf_counter()
        contender.measure(arguments.metrics, subjects, number)
        contender.close(kept(subjects, arguments))
        say(f"  {contender.engine} {contender.variant}: {time.perf_counter() - start:.1f} s")


def kept(subjects: list[Subject], arguments: argparse.Namespace) -> Path | None:
    """The checkpoint whose processes live on between their turns: the others would take as much memory once more."""
    return None if arguments.fresh else subjects[0].folder


def subjects_of(name: str, work: Path, chosen: list[str]) -> Iterator[Subject]:
    """The checkpoint, and the one of its shape with a longer context if a chosen metric needs that."""
    if name not in random_checkpoint.SHAPES:
        folder = loading.find(name).resolve()
        path = zlib.crc32(str(folder).encode())  # tells folders of one name apart
        yield Subject(folder, work / f"{folder.name}-{path:08x}-files", loading.plan_of(folder))
        return
    shapes = [name]
    if "prefill_4096" in chosen and f"{name}-4096" in random_checkpoint.SHAPES:
        shapes.append(f"{name}-4096")
    for shape in shapes:
        folder = once(work / shape, lambda path, shape=shape: random_checkpoint.write(path, shape))
        yield Subject(folder, work / f"{shape}-files", loading.plan_of(folder))


def rooflines(limits: dict[str, Any], subjects: list[Subject]) -> dict[str, dict[str, float | None]]:
    """Width → metric → the tokens a second that the limits allow."""
    found: dict[str, dict[str, float | None]] = {width: {} for width in WIDTHS}
    for name, metric in METRICS.items():
        try:
            plan = fitting(metric, subjects).plan
        except Trouble:
            continue
        for width in WIDTHS:
            found[width][name] = roofline(plan, width, metric, limits)
    return found


def describe(subject: Subject) -> dict[str, Any]:
    """The model, for the report."""
    counted = cost(subject.plan, "float32", "float32")
    return {
        "name": subject.folder.name,
        "type": subject.plan.model_type,
        "parameters": counted.n_parameter,
        "context": subject.plan.max_seq_len,
        "prompt_flops_per_token": counted.block_flops,
        "bytes_per_step": {width: decode_bytes(subject.plan, width) for width in WIDTHS},
    }


def machine() -> dict[str, Any]:
    """What it runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def summary(found: dict[str, Any]) -> str:
    """A check in a line."""
    text = f"regret {found['regret']:.2g}, {found['equal_texts']} of {found['texts']} texts equal"
    logits = found["logits"]
    return f"{text}, logits differ by {logits['relative']:.2g}" if logits else text


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def some(allowed: list[str]) -> Any:
        def parse(text: str) -> list[str]:
            words = text.split(",")
            for word in words:
                if word not in allowed:
                    raise argparse.ArgumentTypeError(f"expected some of {','.join(allowed)}, got {word!r}")
            return words

        return parse

    formats = [*WIDTHS, *(v for variants in VARIANTS.values() for v in variants if v not in WIDTHS)]
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_list(name: str, allowed: list[str], default: list[str]) -> None:
        help_text = f"from {', '.join(allowed)} (default: {', '.join(default) if default != allowed else 'all'})"
        found.add_argument(name, type=some(allowed), default=default, metavar="A,B", help=help_text)

    shapes = ", ".join(random_checkpoint.SHAPES)
    found.add_argument("--model", default="124m", help=f"a folder, or a shape for random weights: {shapes}")
    add_list("--engines", list(VARIANTS), list(VARIANTS))
    add_list("--dtypes", formats, list(WIDTHS))
    add_list("--metrics", list(TITLES), list(TITLES))
    found.add_argument("--threads", type=int, default=2, help="of every engine (default: 2)")
    found.add_argument("--rounds", type=int, default=5, help="after a warm-up (default: 5)")
    found.add_argument("--out", type=Path, default=Path("build/bench/results"), metavar="DIR", help="for the results")
    found.add_argument("--work", type=Path, default=Path("build/bench"), metavar="DIR", help="for conversions, kept")
    found.add_argument(
        "--fresh",
        action="store_true",
        help="end a variant's process after each turn: all variants of the 124M shape take 10 GB, larger ones more",
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
