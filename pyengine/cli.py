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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyengine import __version__

from .errors import ArgumentError, CheckpointFileError, Error

if TYPE_CHECKING:
    from .model import Model

EXAMPLES = {
    "pyengine": """
examples:
  pyengine generate "It was a dark and stormy night"
  pyengine info --model ./gpt2
  pyengine generate --help
""",
    "generate": """
examples:
  pyengine generate "It was a dark and stormy night"
  pyengine generate "Once upon a time" --model ./gpt2 --dtype float32 --temperature 0 --stats
  pyengine generate "The year was" --regex " 1[0-9]{3}"
  echo "Dear Sir," | pyengine generate - --seed 1 > letter.txt
""",
    "info": """
examples:
  pyengine info
  pyengine info --model ./gpt2
""",
    "bench": """
examples:
  pyengine bench
  pyengine bench --model ./gpt2 --dtype float32 --threads 2
""",
    "perplexity": """
examples:
  pyengine perplexity book.txt
  cat book.txt | pyengine perplexity - --model ./gpt2 --dtype float32 --stride 256
""",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    open_streams()
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
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


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(
        prog="pyengine",
        description="Transformer language models on CPUs, straight from their Hugging Face checkpoints.",
        epilog=EXAMPLES["pyengine"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("-V", "--version", action="version", version=f"pyengine {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("generate", generate, "continue a text and stream what comes")
    sub.add_argument("prompt", help="the text to continue; - reads it from stdin")
    model_arguments(sub)
    sub.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to generate (default 128)"
    )
    sub.add_argument(
        "--temperature", type=float, default=None, metavar="T", help="0 is greedy (default 0.8; 1 with --num-beams)"
    )
    sub.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens; 0: all (default)"
    )
    sub.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable tokens of mass P"
    )
    sub.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens at least P times as probable as the best",
    )
    sub.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens that occurred are less probable",
    )
    sub.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="taken from the logit of a token that was generated",
    )
    sub.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for each time it was")
    sub.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; can be given several times")
    sub.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    sub.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams")
    sub.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="of beam search: above 0 favours longer texts"
    )
    sub.add_argument(
        "--num-beam-groups", type=int, default=1, metavar="N", help="divide the beams into N groups (default 1)"
    )
    sub.add_argument(
        "--diversity-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="with groups: taken from a token that a group before chose in the same step",
    )
    sub.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens; with --num-beams it draws what beams compete with (default: draw without beams)",
    )
    sub.add_argument(
        "--json-schema", metavar="S", help="the text must be JSON of this schema: a file, or the schema itself ({...})"
    )
    sub.add_argument("--regex", metavar="R", help="the text must match this regular expression")
    sub.add_argument("--grammar", metavar="FILE", help="the text must match this grammar, Lark as llguidance takes it")
    sub.add_argument(
        "--prompt-lookup-num-tokens",
        type=int,
        metavar="N",
        help="guess up to N tokens ahead from the text so far: the same text, faster where it repeats itself",
    )
    sub.add_argument(
        "--assistant-model", metavar="M", help="a smaller model of the same vocabulary that guesses tokens ahead"
    )
    sub.add_argument("--ignore-eos", action="store_true", help="go on after the model's end of text")
    sub.add_argument("--no-prompt", action="store_true", help="don't print the prompt before its continuation")
    sub.add_argument("--stats", action="store_true", help="print speed, threads and SIMD level on stderr")

    sub = command("bench", bench, "measure prefill and decode beside the limits of this machine")
    model_arguments(sub)
    sub.add_argument(
        "--prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="tokens of the prompt (default 512, at most the context)",
    )
    sub.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    sub.add_argument("--rounds", type=int, default=5, metavar="N", help="how often (default 5)")

    sub = command("info", info, "say what this machine can do, and what a model needs")
    sub.add_argument("--model", metavar="M", help="a folder, a model id of the hub, or demo")
    sub.add_argument("--threads", type=int, metavar="N", help="number of threads")

    sub = command("perplexity", perplexity, "the perplexity of a text file")
    sub.add_argument("file", help="a file of UTF-8 text; - reads stdin")
    model_arguments(sub)
    sub.add_argument("--stride", type=int, metavar="N", help="windows start N tokens apart (default: half the context)")
    return top


def model_arguments(sub: argparse.ArgumentParser) -> None:
    """What every command that loads a model takes."""
    sub.add_argument(
        "--model", default="demo", metavar="M", help="a folder, a model id of the hub, or demo (the bundled one)"
    )
    sub.add_argument("--dtype", default="int8", metavar="D", help="float32, bfloat16, int8 (default) or int4")
    sub.add_argument(
        "--kv-dtype",
        metavar="D",
        help="what keys and values are kept in: float32 (default with float32), bfloat16 (default else) or int8",
    )
    sub.add_argument("--threads", type=int, metavar="N", help="number of threads (default: the CPUs that may be used)")


def open_model(arguments: argparse.Namespace, name: str | None = None) -> Model:
    """The model that the arguments name, or another one, with a progress bar on a terminal if it takes long."""
    from .model import load

    with progress_bar() as progress:
        return load(
            name or arguments.model,
            dtype=arguments.dtype,
            threads=arguments.threads,
            progress=progress,
            kv_dtype=arguments.kv_dtype,
        )


@contextmanager
def progress_bar(after: float = 0.5) -> Iterator[Callable[[int, int], None] | None]:
    """What draws a bar on stderr when called with (done, total), once `after` seconds have gone by; None if piped."""
    if not sys.stderr.isatty():
        yield None
        return
    start = time.monotonic()
    drawn = False

    def draw(done: int, total: int) -> None:
        nonlocal drawn
        if time.monotonic() - start > after:
            drawn = True
            filled = 30 * done // max(total, 1)
            bar = "#" * filled + "." * (30 - filled)
            print(f"\rloading [{bar}] {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        if drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def read_text(source: str) -> str:
    """A file's text, or that of stdin for "-"."""
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        with open(source, "rb") as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{source}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    except OSError as error:
        raise CheckpointFileError(f"{source}: expected a readable file, got: {error.strerror}") from None


def generate(arguments: argparse.Namespace) -> int:
    """Streams a continuation."""
    prompt = read_text("-").rstrip("\n") if arguments.prompt == "-" else arguments.prompt
    started = time.perf_counter()
    model = open_model(arguments)
    assistant = None if arguments.assistant_model is None else open_model(arguments, arguments.assistant_model)
    loaded = time.perf_counter()
    names = ["max_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
    names += ["stop", "seed", "ignore_eos", "do_sample", "regex", "prompt_lookup_num_tokens"]
    names += ["num_beams", "length_penalty", "num_beam_groups", "diversity_penalty"]
    params = {name: getattr(arguments, name) for name in names}
    schema = arguments.json_schema
    params["json_schema"] = schema if schema is None or schema.lstrip().startswith("{") else read_text(schema)
    params["grammar"] = None if arguments.grammar is None else read_text(arguments.grammar)
    params["assistant_model"] = assistant
    beams = arguments.num_beams > 1
    params["temperature"] = (1.0 if beams else 0.8) if arguments.temperature is None else arguments.temperature
    if beams:
        completion = model.generate(prompt, **params)
        write(completion.text if arguments.no_prompt else prompt + completion.text)
        n, usage = len(completion.token_ids), completion.usage
        first, decode = usage.time_to_first_token, usage.decode_seconds
    else:
        pieces = model.stream(prompt, **params)
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


def write(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=bool(text))


def info(arguments: argparse.Namespace) -> int:
    """Says what the machine can do, and what a model needs."""
    from ._native import simd
    from ._native.matmul import DTYPES
    from .cost import KV_BYTES, cost
    from .model import plan_of
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
        f"operations   {c.block_flops / 1e6:,.1f} M a token, {c.head_flops / 1e6:,.1f} M more for its logits, "
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


if __name__ == "__main__":
    sys.exit(main())
