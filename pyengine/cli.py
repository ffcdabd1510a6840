"""The command line. The only place that prints; what is piped out is the text alone.

Exit codes: 0 done, 1 an error that is named on stderr, 2 wrong usage, 130 stopped by Ctrl-C, 141 the reader of the
output is gone.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

from pyengine import __version__

from .arguments import TEMPERATURE, parser, sampling_params
from .errors import ArgumentError, CheckpointFileError, Error

if TYPE_CHECKING:
    from .model import Model


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    open_streams()
    arguments = parser().parse_args(argv)
    try:
        code = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except (Error, MemoryError) as error:
        print("pyengine:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:  # of the output: whatever else can't be read or written is an Error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout raises nothing
        if isinstance(error, BrokenPipeError):
            return 128 + 13
        print(f"pyengine: output: expected to write it, got: {error.strerror}", file=sys.stderr)
        return 1


def open_streams() -> None:
    """Makes stdout and stderr usable where they are closed, and where their encoding lacks characters."""
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")


def open_model(arguments: argparse.Namespace, **options: Any) -> Model:
    """The model that the arguments name, with a progress bar if it takes long; `options` go before the arguments."""
    from .loading import load

    with progress_bar(desc="loading", delay=0.5, unit="B", unit_scale=True, total=1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        names = ("model", "dtype", "threads", "kv_dtype")
        return load(
            **{name: getattr(arguments, name) for name in names} | options,
            progress=progress if bar else None,
        )


@contextmanager
def progress_bar(**options: Any) -> Iterator[Any]:
    """A bar of tqdm on stderr while the block runs, wiped away at its end; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    with tqdm(file=sys.stderr, leave=False, dynamic_ncols=True, **options) as bar:
        yield bar


def read_text(source: str) -> str:
    """A file's text, or that of stdin for "-"."""
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        with open_file(source, "rb") as file:
            return bytes(file.read()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{source}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None


def open_file(path: str, mode: str, buffering: int = -1) -> Any:
    """The file, opened, stdin for "-"; an error that names it where it can't be."""
    try:
        return open(0 if path == "-" else path, mode, buffering, closefd=path != "-")
    except OSError as error:
        kind = "readable" if mode == "rb" else "writable"
        raise CheckpointFileError(f"{path}: expected a {kind} file, got: {error.strerror}") from None


def generate(arguments: argparse.Namespace) -> int:
    """Streams a continuation."""
    prompt = read_text("-").rstrip("\n") if arguments.prompt == "-" else arguments.prompt
    started = time.perf_counter()
    model = open_model(arguments)
    params = given_params(arguments)
    if arguments.assistant_model is not None:
        params["assistant_model"] = open_model(arguments, model=arguments.assistant_model)
    loaded = time.perf_counter()
    if params.get("num_beams", 1) > 1:
        completion = model.generate(prompt, **params)
        write(completion.text if arguments.no_prompt else prompt + completion.text)
        n, usage = len(completion.token_ids), completion.usage
        first, decode = usage.time_to_first_token, usage.decode_seconds
    else:
        pieces = model.stream(prompt, **{"temperature": TEMPERATURE} | params)
        if not arguments.no_prompt:
            write(prompt)
        times = []
        for piece in pieces:
            times.append(time.perf_counter())
            write(piece.text)
        n, first, decode = len(times), times[0] - loaded, times[-1] - times[0]
        usage = pieces.request.result().usage
    write("\n")
    if arguments.stats:
        rate = f", {(n - 1) / decode:,.1f} tokens/s" if n > 1 else ""
        if usage.proposed_tokens:
            rate += f", {usage.accepted_tokens:,} of {usage.proposed_tokens:,} guesses right"
        print(
            f"prompt of {len(model.token_ids(prompt)):,} tokens, first token after {first:.3f} s; {n:,} tokens{rate}; "
            f"loaded in {loaded - started:.2f} s; {model.dtype}, KV {model.kv_dtype}, "
            f"{model.executor.threads} threads, {model.executor.simd}",
            file=sys.stderr,
        )
    return 0


def given_params(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Model.generate` that were given; what they have in files is read."""
    params = sampling_params(arguments)
    if "json_schema" in params and not params["json_schema"].lstrip().startswith("{"):
        params["json_schema"] = read_text(params["json_schema"])
    if "grammar" in params:
        params["grammar"] = read_text(params["grammar"])
    return params


def batch(arguments: argparse.Namespace) -> int:
    """Runs a batch job, or what is left of it."""
    from .batch import Job, append, resume, run

    params = given_params(arguments)
    seed = params.pop("seed", None)
    # Never closed: that would wait for the thread that reads it, and so for a pipe's next line.
    source = open_file(arguments.input, "rb")
    with ExitStack() as files:
        out = None
        if arguments.output != "-":
            # "a" makes the file if there is none; unbuffered, a line is one write.
            out = files.enter_context(open_file(arguments.output, "ab+", 0))
            if out.seekable() and os.path.samefile(out.fileno(), source.fileno()):
                raise ArgumentError(f"{arguments.output}: expected another file than the input, got the same")
        model = open_model(arguments, max_batch=arguments.max_batch)
        job = Job(model, params, seed, TEMPERATURE, arguments.token_ids)
        lines, n_done, n_failed = iter(source), 0, 0
        if out is not None and out.seekable():
            if arguments.restart:
                out.truncate(0)
            done = resume(job, lines, out)
            lines, n_done, n_failed = done.rest, done.n_line, done.n_failed
        bar = files.enter_context(progress_bar(unit="line", initial=n_done, total=n_lines(arguments.input)))
        started, n_token = time.perf_counter(), 0
        results = files.enter_context(closing(run(job, lines, n_done)))
        for result in results:
            if out is None:
                write(result.line.decode())
            else:
                append(out, result.line)
            n_done += 1
            n_failed += result.failed
            n_token += result.n_token
            if bar is not None:
                rate = n_token / (time.perf_counter() - started)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s, {n_failed:,} failed", refresh=False)
                bar.update()
    if n_failed:
        print(f"pyengine: {n_failed:,} of {n_done:,} lines have errors", file=sys.stderr)
    return int(n_failed > 0)


def n_lines(path: str) -> int | None:
    """Lines of a file, if it can be read twice and somebody will see how many there are."""
    if not (sys.stderr.isatty() and os.path.isfile(path)):
        return None
    n, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            n += block.count(b"\n")
            last = block[-1:]
    return n + (last != b"\n")


def write(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=bool(text))


def info(arguments: argparse.Namespace) -> int:
    """Says what the machine can do, and what a model needs."""
    from ._native import simd
    from ._native.matmul import DTYPES
    from .cost import KV_BYTES, cost
    from .loading import plan_of
    from .threads import choose_threads

    threads = choose_threads(arguments.threads)
    print(f"pyengine {__version__}")
    print(f"CPU          {cpu_name()}: {', '.join(simd.features()) or 'no SIMD that is used'}")
    why = "set by PYENGINE_ISA, one of" if os.environ.get("PYENGINE_ISA") else "the best of"
    print(f"SIMD level   {simd.active()}: {why} {', '.join(simd.levels())}")
    how = "multiplied by the CPU" if simd.multiplies_bfloat16() else "widened and multiplied as float32: no BF16 here"
    print(f"bfloat16     {how}")
    print(f"threads      {threads.count}: {threads.reason}")
    if arguments.model is None:
        return 0
    plan = plan_of(arguments.model)
    print(f"\n{arguments.model}: {plan.model_type}, {cost(plan, 'float32', 'float32').n_parameter:,} parameters")
    print(
        f"             {plan.n_layer} layers, {plan.n_head} heads of {plan.head_dim}, d_model {plan.d_model}, "
        f"vocabulary {plan.vocab_size:,}, context {plan.max_seq_len:,}"
    )
    print(f"{'dtype':<12} {'weights':>12} {'read per token':>16}")
    for dtype in DTYPES:
        c = cost(plan, dtype, "float32")
        print(f"{dtype:<12} {c.weight_bytes / 1e6:>9,.1f} MB {c.decode_bytes / 1e6:>13,.1f} MB")
    full = {kv: cost(plan, "float32", kv).kv_bytes_per_token * plan.max_seq_len for kv in KV_BYTES}
    print("KV cache     full: " + ", ".join(f"{kv} {nbytes / 1e6:,.1f} MB" for kv, nbytes in full.items()))
    c = cost(plan, "float32", "float32")
    print(
        f"operations   {c.block_flops / 1e6:,.1f} M a token, {c.picked_flops / 1e6:,.1f} M more for its logits, "
        f"{c.attention_flops_per_position / 1e3:,.1f} k for each position that it looks at"
    )
    return 0


def cpu_name() -> str:
    """The CPU's own name where the system tells it."""
    import platform

    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def bench(arguments: argparse.Namespace) -> int:
    """Measures prefill and decode, and the machine's limits in the same run."""
    from .benchmark import run

    model = open_model(arguments)
    for line in run(model, arguments.prompt_tokens, arguments.new_tokens, arguments.rounds):
        print(line, flush=True)
    return 0


def perplexity(arguments: argparse.Namespace) -> int:
    """Prints the perplexity of a text."""
    text = read_text(arguments.file)
    score = open_model(arguments).score(text, arguments.stride)
    if len(score.logprobs) == 0:
        raise ArgumentError(f"{arguments.file}: expected at least two tokens, got one: it has none before it")
    print(f"{score.perplexity:.4f}")
    print(f"{len(score.token_ids):,} tokens, {-score.logprobs.mean():.4f} nats a token", file=sys.stderr)
    return 0


COMMANDS = {"generate": generate, "batch": batch, "bench": bench, "info": info, "perplexity": perplexity}

if __name__ == "__main__":
    sys.exit(main())
