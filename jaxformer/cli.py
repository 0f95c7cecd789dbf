"""The `jaxformer` command: train, generate, score, evaluate, embed, convert, tokenizer.

Heavy imports wait until a command needs them, so that `--help` answers at once.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from jaxformer import config
from jaxformer.config import SAMPLING, BulkConfig, DecodeConfig, hint
from jaxformer.errors import ConfigError, DataError, Stopped, UserError

USAGE = """\
usage: jaxformer COMMAND [OPTIONS]        (jaxformer COMMAND --help lists its options)

  train      --config FILE.py [--any.field VALUE ...]   train, or resume the run in --run_dir
  generate   --run DIR [--beams 4 --json ...] < TEXT    write one line for each line of TEXT
  score      --run DIR < PAIRS                          how likely given targets are, as JSON lines
  evaluate   --run DIR [--beams 4 ...]                  score the validation data, as JSON
  embed      --run DIR --output FILE.npy < TEXT         write one vector for each line of TEXT
  convert    SOURCE TARGET [--family NAME]              a downloaded model to a run, or a run back
  tokenizer  --config FILE.py --output DIR              train a tokenizer on the training data

--run takes the run_dir of a training run, a Hugging Face directory, or a GGUF file;
evaluate only the first, for it needs validation data.

exit codes: 0 done, 2 wrong options, 3 wrong data, 4 checkpoint or run directory, 5 numerics,
75 stopped by SIGTERM or Ctrl-C (the same command resumes, or begins anew), 141 nobody reads on
"""

AT_ONCE = 4096  # lines read before anything is written for them
DRAWN = 8  # lines whose attention one picture shows
PLAIN = (tyro.conf.FlagCreatePairsOff,)
DTypeOrSame = Literal["", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a run's validation data and print JSON: loss, perplexity, and its text metrics."""

    run: str
    """Run directory."""
    step: int = 0
    """Checkpoint to use; 0 is the newest."""
    dtype: DTypeOrSame = ""
    """Type of parameters and arithmetic; without it, the run's."""
    decode: tyro.conf.OmitArgPrefixes[DecodeConfig]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Read lines, and write one line of generated text for each; or with --input and --output,
    read a file of records and write a folder of them, each with its text.

    In plain text, control characters and newlines are escaped, and a line that is too long for the
    model gives an empty one and a message.
    """

    run: str
    """Run directory, Hugging Face directory or GGUF file."""
    step: int = 0
    """Checkpoint of a run to use; 0 is the newest."""
    dtype: DTypeOrSame = ""
    """Type of parameters and arithmetic; without it, what the checkpoint has."""
    int8: bool = False
    """Round the weights to eight bits each: read faster, and a quarter of float32's memory."""
    chat: bool = False
    """Take each line as what a user says, and answer it by the checkpoint's chat template."""
    json: bool = False
    """Write JSON: the text, and all n_best hypotheses with their scores; or an error."""
    stream: bool = False
    """Write the text of each line piece by piece, as it comes."""
    draft: str = ""
    """A smaller model of the same tokenizer (as run) that guesses tokens ahead: the same output,
    sooner."""
    plot_attention: str = ""
    """Picture to draw, as map.png: which tokens of the first lines (or, without an encoder, of what
    is written already) each generated token attends to, in the mean over layers and heads."""
    bulk: tyro.conf.OmitArgPrefixes[BulkConfig] = BulkConfig()
    decode: tyro.conf.OmitArgPrefixes[DecodeConfig]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Read pairs of a source and a target, and write for each a line of JSON: the log-probability
    of the target in nats, its end included, its number of tokens, and the perplexity; or an error.

    Pairs are JSON lines with a source (or none, for a decoder-only model) and a target on standard
    input; or lines of two files.
    """

    run: str
    """Run directory, Hugging Face directory or GGUF file."""
    sources: str = ""
    """Text file with the source of each line of targets."""
    targets: str = ""
    """Text file of targets."""
    step: int = 0
    """Checkpoint of a run to use; 0 is the newest."""
    dtype: DTypeOrSame = ""
    """Type of parameters and arithmetic; without it, what the checkpoint has."""
    int8: bool = False
    """Round the weights to eight bits each: read faster, and a quarter of float32's memory."""
    token_log_probs: bool = False
    """Write the log-probability of each token, too."""


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write an embedding of each line, empty ones too: an array of float32, [lines, d_model].

    Of a line that is too long for the model, what fits is embedded.
    """

    run: str
    """Run directory, Hugging Face directory or GGUF file of an encoder."""
    output: str
    """File to write, as vectors.npy, which numpy.load reads."""
    input: str = ""
    """Text file to read; without one, standard input."""
    step: int = 0
    """Checkpoint of a run to use; 0 is the newest."""
    dtype: DTypeOrSame = ""
    """Type of parameters and arithmetic; without it, what the checkpoint has."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Make a run directory of a Hugging Face directory or GGUF file; or of a run directory, a
    Hugging Face directory."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """What to read."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """Folder to write, which must be empty or not there yet."""
    family: str = ""
    """Model type to write a run as, such as llama or t5; without it, the one that it came from, or
    the first that has such models."""
    dtype: DTypeOrSame = ""
    """Type of the parameters written; without it, what they have."""


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
    _keep_compiled()
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


def _keep_compiled() -> None:
    """Have jax keep what it compiles in the user's cache directory, unless it is told where."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "jaxformer" / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


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
    if options.stream and (options.json or options.draft or options.bulk.output):
        raise ConfigError("stream writes text as it comes; leave out json, draft and output.")
    if options.plot_attention:
        _check_picture(options)
    step, dtype = options.step or None, options.dtype or None
    if options.bulk.output:
        from jaxformer import bulk

        bulk.generate(
            options.run,
            options.bulk,
            options.decode,
            step=step,
            dtype=dtype,
            chat=options.chat,
            hypotheses=options.json,
            draft=options.draft,
            int8=options.int8,
        )
        return
    with _opened(options.bulk.input) as stream:
        _generate(options, stream)


def _check_picture(options: Generate) -> None:
    """Whether attention can be drawn, found out before the work."""
    from jaxformer.files import writing

    path = Path(options.plot_attention)
    if options.stream or options.bulk.output:
        raise ConfigError(
            "plot_attention draws lines that are generated whole, to standard output; leave out "
            "stream and output."
        )
    with writing(path):
        if path.is_dir() or path.suffix.lower() != ".png":
            raise ConfigError(f"plot_attention {path} is no file that ends in .png; name one.")
        tempfile.TemporaryFile(dir=path.parent).close()


def _generate(options: Generate, stream: Iterable[bytes]) -> None:
    """Line by line, from a stream to standard output."""
    from jaxformer.loading import load
    from jaxformer.training.report import json_line, printable

    dtype = options.dtype or None
    model = load(options.run, options.step or None, dtype=dtype, int8=options.int8)
    draft = load(options.draft, dtype=dtype, int8=options.int8) if options.draft else None
    at_once = 1 if options.stream else AT_ONCE
    pairs: list[tuple[Sequence[int], Sequence[int]]] = []  # whose attention is drawn
    for first, lines in _chunks(stream, options.bulk.input or "standard input", at_once):
        if options.chat:
            prompts = [model.tokenizer.chat([{"role": "user", "content": s}]) for s in lines]
        else:
            prompts = list(map(model.prompt, lines))
        if options.stream and not model.too_long(prompts[0]):
            for piece in model.stream(prompts[0], options.decode, row=first):
                print(printable(piece), end="", flush=True)
            print(flush=True)
            continue
        results = model.complete(prompts, options.decode, first_row=first, draft=draft)
        for i, result in enumerate(results):
            best = result.hypotheses[0].text if result.hypotheses else ""
            if options.json:
                found = [h.record() for h in result.hypotheses]
                row = (
                    {"error": result.error} if result.error else {"text": best, "hypotheses": found}
                )
                print(json_line(row))
                continue
            if result.error:
                print(f"jaxformer: line {first + i + 1}: {result.error}", file=sys.stderr)
            print(printable(best))
        sys.stdout.flush()
        written = [result.hypotheses[0].ids if result.hypotheses else () for result in results]
        pairs += [pair for pair in zip(prompts, written, strict=True) if pair[1]]
        del pairs[DRAWN:]
    if options.plot_attention:
        if not pairs:
            raise DataError("nothing was generated, so there is no attention to draw.")
        from jaxformer.picture import draw_attention

        draw_attention(model.attention(*zip(*pairs, strict=True)), Path(options.plot_attention))


def score(argv: list[str]) -> None:
    """`jaxformer score`."""
    options = tyro.cli(Score, args=argv, config=PLAIN)
    if options.sources and not options.targets:
        raise ConfigError(
            f"sources {options.sources} need targets; name a file with as many lines."
        )
    from jaxformer.loading import load
    from jaxformer.training.report import json_line

    dtype = options.dtype or None
    model = load(options.run, options.step or None, dtype=dtype, int8=options.int8)
    with contextlib.ExitStack() as stack:
        for sources, targets in _pairs(options, stack):
            for result in model.score_tokens(sources, targets):
                row: dict[str, Any] = {"error": f"the pair {result.error}"}
                if not result.error:
                    row = {
                        "log_prob": result.log_prob,
                        "tokens": len(result.token_log_probs),
                        "perplexity": result.perplexity,
                    }
                    if options.token_log_probs:
                        row["token_log_probs"] = result.token_log_probs
                print(json_line(row))
            sys.stdout.flush()


def _pairs(
    options: Score, stack: contextlib.ExitStack
) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Sources and targets, a few thousand at a time."""
    if not options.targets:
        from jaxformer.data.records import as_pair

        for first, lines in _chunks(sys.stdin.buffer, "standard input"):
            pairs = [
                as_pair(line, f"standard input, line {number}")
                for number, line in enumerate(lines, first + 1)
            ]
            yield [source for source, _ in pairs], [target for _, target in pairs]
        return
    files = [
        _chunks(stack.enter_context(_opened(path)), path)
        for path in (options.sources or options.targets, options.targets)
    ]
    for left, right in itertools.zip_longest(*files, fillvalue=(0, [])):
        if len(left[1]) != len(right[1]):
            raise DataError(
                f"{options.sources} and {options.targets} have not as many lines; line n of one "
                "must be the source of line n of the other."
            )
        yield (left[1] if options.sources else [""] * len(left[1])), right[1]


def evaluate(argv: list[str]) -> None:
    """`jaxformer evaluate`."""
    options = _with_run_defaults(Evaluate, argv)
    from jaxformer.training.loop import evaluate_run

    scores = evaluate_run(
        Path(options.run), options.decode, options.step or None, options.dtype or None
    )
    print(json.dumps(scores, indent=2))


def embed(argv: list[str]) -> None:
    """`jaxformer embed`."""
    options = tyro.cli(Embed, args=argv, config=PLAIN)
    from jaxformer.inspecting import read_config
    from jaxformer.vectors import write_rows

    def parts() -> Iterator[Any]:
        from jaxformer.loading import load

        model = load(options.run, options.step or None, dtype=options.dtype or None)
        with _opened(options.input) as stream:
            for _, lines in _chunks(stream, options.input or "standard input"):
                yield model.embed(lines)

    output, width = Path(options.output), read_config(options.run).d_model
    if output.is_dir():
        raise ConfigError(f"output {output} is a folder; name a file in it, as vectors.npy.")
    rows = write_rows(output, width, parts())
    print(f"{output}: {rows} vectors of {width}")


def convert(argv: list[str]) -> None:
    """`jaxformer convert`."""
    options = tyro.cli(Convert, args=argv, config=PLAIN)
    from jaxformer import converting

    print(
        converting.convert(
            options.source, options.target, family=options.family, dtype=options.dtype or None
        )
    )


def tokenizer(argv: list[str]) -> None:
    """`jaxformer tokenizer`."""
    options, rest = tyro.cli(TokenizerOptions, args=argv, return_unknown_args=True)
    settings = config.load(rest)
    from jaxformer.data import sources, tasks
    from jaxformer.data.tokenizer import train_tokenizer
    from jaxformer.files import writing

    output = Path(options.output)
    with writing(output):  # found out before the work
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    examples, _ = sources.read(settings.data, settings.seed)
    pieces = train_tokenizer(settings.data, tasks.texts(settings.data, examples))
    with writing(output):
        pieces.save(output)
    print(f"{options.output}: {pieces.vocab_size} ids, SHA-256 {pieces.hash}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "generate": generate,
    "score": score,
    "evaluate": evaluate,
    "embed": embed,
    "convert": convert,
    "tokenizer": tokenizer,
}


def _with_run_defaults(kind: type[Options], argv: list[str]) -> Options:
    """Parse the options of a command on a run, whose own decode options are the defaults."""
    from jaxformer.constraining import read_files
    from jaxformer.inspecting import read_decode

    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--run=") else [a])]
    decode = DecodeConfig()
    if "--run" in argv[:-1] and not {"-h", "--help"} & set(argv):
        decode = read_decode(argv[argv.index("--run") + 1])
    # An option that asks for a strategy sets aside what the run says of the others.
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}
    if given & {*SAMPLING}:
        # One is drawn though the option's value be the usual one: --temperature 1.
        one = given & {"beams", "lookup", "draft", "stream"}
        samples = 1 if one else max(decode.samples, 1)
        decode = dataclasses.replace(decode.single, samples=samples, contrastive=0, lookup=0)
    elif given & {"contrastive", "beams"}:
        decode = decode.greedy
    elif given & {"lookup", "draft"}:
        decode = dataclasses.replace(decode.single, contrastive=0, lookup=0)
    elif "stream" in given:
        decode = decode.single
    default = kind(run=tyro.MISSING, decode=decode)
    options = tyro.cli(kind, default=default, args=argv, config=PLAIN)
    return dataclasses.replace(options, decode=read_files(options.decode, decode))


def _opened(path: str) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    """The lines of a file, or of standard input."""
    if not path:
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}.") from None


def _chunks(
    stream: Iterable[bytes], name: str, at_once: int = AT_ONCE
) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line, from 0, and the lines, at most `at_once` at a time."""
    first, lines = 0, []
    for number, line in enumerate(stream):
        try:
            lines.append(line.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as e:
            raise DataError(
                f"{name}, line {number + 1}: not UTF-8 ({e.reason} at byte {e.start}); "
                "convert it, for example with iconv."
            ) from None
        if len(lines) == at_once:
            yield first, lines
            first, lines = number + 1, []
    if lines:
        yield first, lines


if __name__ == "__main__":
    sys.exit(main())
