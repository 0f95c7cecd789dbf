"""Decoding against transformers on PyTorch, and CTranslate2: 64 tokens in, 64 out, random weights.

    pip install -e ".[benchmark]" && python benchmarks/decode.py [--only t5] [--json FILE]

Each library has a process of its own, and the same weights. Processes take turns (alternated), and
then each runs by itself (alone); what counts against us is a peer's better figure. End of sequence
is banned, compilation and a first call are not timed, and a sample during which other programs
took the processor is taken again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH = 64
THREADS = os.cpu_count() or 1
WHOLE = [("t5", 1, 1), ("t5", 8, 1), ("t5", 32, 1), ("t5", 1, 4), ("t5", 8, 4), ("t5", 32, 4),
         ("llama", 1, 1), ("llama", 8, 1),
         ("t5 int8", 1, 1), ("t5 int8", 8, 1), ("t5 int8", 32, 1)]  # fmt: skip
"""Model, rows, beams; int8 weights against those of CTranslate2, whose tokens are not the same."""
PEERS = ("transformers", "ctranslate2")


def prompts(rows: int) -> Any:
    """The same random ids for everyone."""
    import numpy as np

    return np.random.default_rng(1).integers(3, 32000, (rows, LENGTH)).astype(np.int32)


def jaxformer(folder: Path) -> Any:
    """Our own: the parameters as `jaxformer.load` has them, decoded as `Model.generate` does."""
    from types import SimpleNamespace

    from jaxformer.batching import pad
    from jaxformer.config import DecodeConfig
    from jaxformer.generate import decode_batch, prepare
    from jaxformer.loading import load_weights
    from jaxformer.nn.quantize import quantize

    models = {}

    def run(model: str, rows: int, beams: int) -> list[int]:
        if model not in models:
            name, _, rounded = model.partition(" ")
            config, params = load_weights(folder / name)
            models[model] = config, prepare(quantize(params) if rounded else params)
        stop = 2 if model == "llama" else 1
        special: Any = SimpleNamespace(start_id=0, pad_id=0, stop_ids=(stop,))
        options = DecodeConfig(beams=beams, max_length=LENGTH, min_length=LENGTH)
        batch = pad(prompts(rows), LENGTH, 0)
        found = decode_batch(*models[model], special, batch, range(rows), options)
        return found.tokens[0, 0].tolist()

    return run


def transformers(folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    torch.set_num_threads(THREADS)
    classes = {"t5": T5ForConditionalGeneration, "llama": LlamaForCausalLM}
    models = {}

    def run(model: str, rows: int, beams: int) -> list[int]:
        if model not in models:
            models[model] = classes[model].from_pretrained(folder / model).eval()
        ids = torch.from_numpy(prompts(rows)).long()
        with torch.inference_mode():
            found = models[model].generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False,
                min_new_tokens=LENGTH, max_new_tokens=LENGTH, pad_token_id=0,
            )  # fmt: skip
        return found[0, -LENGTH:].tolist()

    return run


def ctranslate2(folder: Path) -> Any:
    import ctranslate2

    models = {}

    def run(model: str, rows: int, beams: int) -> list[int]:
        name, _, rounded = model.partition(" ")
        kind = ctranslate2.Generator if name == "llama" else ctranslate2.Translator
        if model not in models:
            models[model] = kind(
                str(folder / f"{name}.ct2"), device="cpu", compute_type=rounded or "float32",
                inter_threads=1, intra_threads=THREADS,
            )  # fmt: skip
        words = [[f"t{i}" for i in row] for row in prompts(rows)]
        if name == "t5":
            found = models[model].translate_batch(
                words, beam_size=beams, max_batch_size=0,
                min_decoding_length=LENGTH, max_decoding_length=LENGTH,
            )[0].hypotheses[0]  # fmt: skip
        else:
            found = models[model].generate_batch(
                words, beam_size=beams, min_length=LENGTH, max_length=LENGTH,
                include_prompt_in_result=False, end_token="</s>",
            )[0].sequences[0]  # fmt: skip
        return [SPECIAL.index(word) if word in SPECIAL else int(word[1:]) for word in found]

    return run


SPECIAL = ["<pad>", "</s>", "<unk>"]
WORKERS = {"jaxformer": jaxformer, "transformers": transformers, "ctranslate2": ctranslate2}


def make_models(folder: Path) -> None:
    """T5-small and a Llama of 135M, as transformers initialises them, and CTranslate2's form."""
    import torch
    from ctranslate2.converters.transformers import TransformersConverter
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    class Words:
        """A tokenizer whose words are numbers."""

        unk_token, bos_token, eos_token, pad_token = "<unk>", "<s>", "</s>", "<pad>"

        def __init__(self, size: int):
            self.words = [*SPECIAL, *(f"t{i}" for i in range(3, size))]

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

        def __len__(self) -> int:
            return len(self.words)

        def convert_ids_to_tokens(self, i: int) -> str:
            return self.words[i]

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, name: str, **_: Any) -> Any:
            return Words(32128 if name.endswith("t5") else 49152)

    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=0)).save_pretrained(folder / "t5")
    shape = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, intermediate_size=1536, vocab_size=49152,
                 max_position_embeddings=2048, rope_theta=1e5)  # fmt: skip
    llama = LlamaConfig(**shape, tie_word_embeddings=True)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name in ("t5", "llama"):
        Converter(str(folder / name)).convert(str(folder / f"{name}.ct2"), force=True)


def busy() -> float:
    """Seconds of processor that the machine has used."""
    ticks = list(map(int, open("/proc/stat").readline().split()[1:9]))
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def used(pid: int) -> float:
    """Those that one process has used."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A library in a process of its own."""

    def __init__(self, name: str, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def ask(self, case: tuple[str, int, int]) -> tuple[float, list[int], float]:
        """Seconds of one run of a case, its tokens, and how many cores others used meanwhile."""
        assert self.process.stdin and self.process.stdout
        before, own, start = busy(), used(self.process.pid), time.perf_counter()
        self.process.stdin.write(json.dumps(case) + "\n")
        seconds, tokens = json.loads(self.process.stdout.readline())
        passed = time.perf_counter() - start
        others = (busy() - before) - (used(self.process.pid) - own)
        return seconds, tokens, max(0.0, others) / passed

    def sample(self, case: tuple[str, int, int]) -> float:
        """Seconds of one run during which others used next to nothing, if there is such a run."""
        tries = []
        for _ in range(4):
            seconds, _, others = self.ask(case)
            tries.append((others, seconds))
            if others < 0.12:
                break
            time.sleep(0.5)
        return min(tries)[1]


def compare(workers: dict[str, Worker], case: tuple[str, int, int], runs: int) -> dict[str, Any]:
    """Medians of a case: alternated, and each library alone."""
    tokens = {}
    for name, worker in workers.items():  # compiles, or warms up
        tokens[name] = worker.ask(case)[1]
    alternated: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(runs):
        for name, worker in workers.items():
            alternated[name].append(worker.sample(case))
    alone = {name: [worker.sample(case) for _ in range(runs)] for name, worker in workers.items()}
    median = statistics.median
    seconds = {
        name: {"alternated": median(alternated[name]), "alone": median(alone[name])}
        for name in workers
    }
    ours = min(seconds["jaxformer"].values())
    ratios = {name: min(seconds[name].values()) / ours for name in workers if name != "jaxformer"}
    same = {name: tokens[name] == tokens["jaxformer"] for name in ratios}
    return {"case": case, "seconds": seconds, "ratios": ratios, "same_tokens": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--json", default="")
    parser.add_argument("--folder", default="", help="where the models are, or are to be kept")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run = WORKERS[options.worker](Path(options.folder))
        out, sys.stdout = sys.stdout, sys.stderr
        for line in sys.stdin:
            case = json.loads(line)
            start = time.perf_counter()
            tokens = run(*case)
            print(json.dumps([time.perf_counter() - start, tokens]), file=out, flush=True)
        return
    folder = Path(options.folder or tempfile.mkdtemp())
    if not (folder / "llama.ct2").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make = [
            sys.executable,
            "-c",
            f"import decode; decode.make_models(decode.Path({str(folder.absolute())!r}))",
        ]
        subprocess.run(make, check=True, cwd=Path(__file__).parent)
    workers = {name: Worker(name, folder) for name in ("jaxformer", *options.peers)}
    results = []
    for case in WHOLE:
        model, rows, beams = case
        name = f"{model} {'beam ' + str(beams) if beams > 1 else 'greedy'} batch {rows}"
        if options.only not in name:
            continue
        able = dict(workers)
        if model.endswith("int8"):
            able.pop("transformers", None)
        result = compare(able, case, options.runs)
        results.append({"name": name, **result})
        times = "  ".join(
            f"{each} {1e3 * s['alternated']:.0f}/{1e3 * s['alone']:.0f} ms"
            for each, s in result["seconds"].items()
        )
        ratios = "  ".join(f"{each} {ratio:.2f}" for each, ratio in result["ratios"].items())
        print(
            f"{name}: {times}  | times as fast as {ratios}  same {result['same_tokens']}",
            flush=True,
        )
    for worker in workers.values():
        worker.process.communicate()
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
