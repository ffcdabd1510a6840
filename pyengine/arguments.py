"""What can be asked for on the command line: the arguments of every command, and examples."""

from __future__ import annotations

import argparse
from typing import Any

from pyengine import __version__

TEMPERATURE = 0.8  # of texts that are drawn, where no other is asked for

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
    "batch": """
examples:
  pyengine batch requests.jsonl results.jsonl --temperature 0 --max-new-tokens 64
  pyengine batch requests.jsonl results.jsonl --seed 1 --model ./gpt2
  cat requests.jsonl | pyengine batch - - > results.jsonl

A line of the input: {"id": "a", "prompt": "Once upon a time", "max_new_tokens": 20, "stop": ["\\n"]}
Its result: {"request": DIGEST, "id": "a", "text": ..., "finish_reason": "stop", "usage": {...}}
or {"request": DIGEST, "id": "a", "error": ...}. The same command again goes on where it was stopped.
""",
}


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

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    sub = command("generate", "continue a text and stream what comes")
    sub.add_argument("prompt", help="the text to continue; - reads it from stdin")
    model_arguments(sub)
    sampling_arguments(sub)
    sub.add_argument(
        "--assistant-model", metavar="M", help="a smaller model of the same vocabulary that guesses tokens ahead"
    )
    sub.add_argument("--no-prompt", action="store_true", help="don't print the prompt before its continuation")
    sub.add_argument("--stats", action="store_true", help="print speed, threads and SIMD level on stderr")

    sub = command("batch", "continue the prompts of a file, line for line; started again, it goes on where it was")
    sub.add_argument("input", help="a JSON object a line: prompt, any argument of generate(), id; - reads stdin")
    sub.add_argument("output", help="a JSON object a line, in the same order; - writes to stdout")
    model_arguments(sub)
    sampling_arguments(sub)
    sub.add_argument("--max-batch", type=int, default=32, metavar="N", help="sequences that run at once (default 32)")
    sub.add_argument("--token-ids", action="store_true", help="write the token ids of each text too")
    sub.add_argument("--restart", action="store_true", help="begin anew: what the output has is thrown away")

    sub = command("bench", "measure prefill and decode beside the limits of this machine")
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

    sub = command("info", "say what this machine can do, and what a model needs")
    sub.add_argument("--model", metavar="M", help="a folder, a model id of the hub, or demo")
    sub.add_argument("--threads", type=int, metavar="N", help="number of threads")

    sub = command("perplexity", "the perplexity of a text file")
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


def sampling_arguments(sub: argparse.ArgumentParser) -> None:
    """What every command that generates takes: arguments of `Model.generate`, which has the defaults."""
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate (default 128)")
    sub.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 0.8; 1 with --num-beams)")
    sub.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens; 0: all (default)")
    sub.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens of mass P")
    sub.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens at least P times as probable as the best",
    )
    sub.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: tokens that occurred are less probable",
    )
    sub.add_argument(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="taken from the logit of a token that was generated",
    )
    sub.add_argument("--frequency-penalty", type=float, metavar="X", help="the same for each time it was")
    sub.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; can be given several times")
    sub.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    sub.add_argument("--num-beams", type=int, metavar="N", help="beam search with N beams")
    sub.add_argument("--length-penalty", type=float, metavar="X", help="of beam search: above 0 favours longer texts")
    sub.add_argument(
        "--num-beam-groups", type=int, metavar="N", help="divide the beams into N groups that avoid each other's tokens"
    )
    sub.add_argument(
        "--diversity-penalty",
        type=float,
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
    sub.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the model's end of text")


def sampling_params(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given."""
    names = argparse.ArgumentParser(add_help=False)
    sampling_arguments(names)
    given = {name: getattr(arguments, name) for name in vars(names.parse_args([]))}
    return {name: value for name, value in given.items() if value is not None}
