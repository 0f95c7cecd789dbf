"""The `jaxformer` command: train, generate, evaluate, tokenizer.

Heavy imports wait until a command needs them, so that `--help` answers at once.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from jaxformer import config
from jaxformer.config import DecodeConfig, hint
from jaxformer.errors import ConfigError, DataError, Stopped, UserError

USAGE = """\
usage: jaxformer COMMAND [OPTIONS]        (jaxformer COMMAND --help lists its options)

  train      --config FILE.py [--any.field VALUE ...]   train, or resume the run in --run_dir
  generate   --run DIR [--beams 4 --json ...] < TEXT    write one line for each line of TEXT
  evaluate   --run DIR [--beams 4 ...]                  score the validation data, as JSON
  tokenizer  --config FILE.py --output DIR              train a tokenizer on the training data

exit codes: 0 done, 2 wrong options, 3 wrong data, 4 checkpoint or run directory, 5 numerics,
75 stopped by SIGTERM or Ctrl-C (the same command resumes, or begins anew), 141 nobody reads on
"""

AT_ONCE = 4096  # lines generated for before any is written


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a run's validation data and print JSON: loss, perplexity, and its text metrics."""

    run: str
    """Run directory."""
    step: int = 0
    """Checkpoint to use; 0 is the newest."""
    decode: tyro.conf.OmitArgPrefixes[DecodeConfig]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Read lines from standard input, and write one line of generated text for each.

    In plain text, control characters and newlines are escaped, and a line that is too long for the
    model gives an empty one and a message.
    """

    run: str
    """Run directory."""
    step: int = 0
    """Checkpoint to use; 0 is the newest."""
    json: bool = False
    """Write JSON: the text, and all n_best hypotheses with their scores; or an error."""
    decode: tyro.conf.OmitArgPrefixes[DecodeConfig]


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Train a tokenizer on the training data of a config."""

    output: str
    """Folder to write it to, which data.tokenizer_path can then name."""


Options = TypeVar("Options", Evaluate, Generate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; a user's mistake is a message, no traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name, *rest = arguments
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if name not in COMMANDS:
            raise ConfigError(f"there is no command {name!r}.{hint(name, COMMANDS)}\n\n{USAGE}")
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # libraries' tracebacks of our errors
        COMMANDS[name](rest)
        sys.stdout.flush()
    except UserError as e:
        print(f"jaxformer: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt as e:
        print(f"jaxformer: stopped by {e}; give the same command again.", file=sys.stderr)
        return Stopped.exit_code
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _stop(number: int, _: object) -> None:
    """Leave whatever is being done (training has its own way); a second signal kills."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt(signal.Signals(number).name)


def train(argv: list[str]) -> None:
    """`jaxformer train`, and train.py."""
    settings = config.load(argv)
    from jaxformer.training.loop import fit

    fit(settings)


def generate(argv: list[str]) -> None:
    """`jaxformer generate`."""
    options = _with_run_defaults(Generate, argv)
    from jaxformer.loading import load
    from jaxformer.training.report import printable

    model = load(options.run, options.step or None)
    for first, lines in _chunks(sys.stdin.buffer):
        for i, result in enumerate(model.hypotheses(lines, options.decode, first_row=first)):
            best = result.hypotheses[0].text if result.hypotheses else ""
            if options.json:
                found = [h._asdict() for h in result.hypotheses]
                row = (
                    {"error": result.error} if result.error else {"text": best, "hypotheses": found}
                )
                print(json.dumps(row, ensure_ascii=False))
                continue
            if result.error:
                print(f"jaxformer: line {first + i + 1}: {result.error}", file=sys.stderr)
            print(printable(best))
        sys.stdout.flush()


def evaluate(argv: list[str]) -> None:
    """`jaxformer evaluate`."""
    options = _with_run_defaults(Evaluate, argv)
    from jaxformer.loading import load
    from jaxformer.training.loop import evaluate_run

    model = load(options.run, options.step or None)
    print(json.dumps(evaluate_run(Path(options.run), model, options.decode), indent=2))


def tokenizer(argv: list[str]) -> None:
    """`jaxformer tokenizer`."""
    options, rest = tyro.cli(TokenizerOptions, args=argv, return_unknown_args=True)
    settings = config.load(rest)
    from jaxformer import run
    from jaxformer.data import sources, tasks
    from jaxformer.data.tokenizer import train_tokenizer

    output = Path(options.output)
    with run.writing(output):  # found out before the work
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    examples, _ = sources.read(settings.data, settings.seed)
    pieces = train_tokenizer(settings.data, tasks.texts(settings.data, examples))
    with run.writing(output):
        pieces.save(output)
    print(f"{options.output}: {pieces.vocab_size} ids, SHA-256 {pieces.hash}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "tokenizer": tokenizer,
}


def _with_run_defaults(kind: type[Options], argv: list[str]) -> Options:
    """Parse the options of a command on a run, whose own decode options are the defaults."""
    from jaxformer import run

    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--run=") else [a])]
    decode = DecodeConfig()
    if "--run" in argv[:-1] and not {"-h", "--help"} & set(argv):
        decode = run.read(Path(argv[argv.index("--run") + 1]))[0].decode
    # An option of beam search or of sampling sets aside what the run says of the other.
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}
    if given & {"samples", "temperature", "top_k", "top_p", "min_p"}:
        decode = dataclasses.replace(decode, beams=1, n_best=1)
    elif "beams" in given:
        decode = dataclasses.replace(
            decode, samples=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, n_best=1
        )
    default = kind(run=tyro.MISSING, decode=decode)
    return tyro.cli(kind, default=default, args=argv, config=(tyro.conf.FlagCreatePairsOff,))


def _chunks(stream: Iterator[bytes]) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line, from 0, and the lines, a few thousand at a time."""
    first, lines = 0, []
    for number, line in enumerate(stream):
        try:
            lines.append(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as e:
            raise DataError(
                f"standard input, line {number + 1}: not UTF-8 ({e.reason} at byte {e.start}); "
                "convert it, for example with iconv."
            ) from None
        if len(lines) == AT_ONCE:
            yield first, lines
            first, lines = number + 1, []
    if lines:
        yield first, lines


if __name__ == "__main__":
    sys.exit(main())
