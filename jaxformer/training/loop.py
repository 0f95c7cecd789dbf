"""The training run: data, state, steps, evaluation, checkpoints. The only file that ties them."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxformer import inspecting, run, sharding
from jaxformer.config import DecodeConfig, DType, MeshConfig, ModelConfig, TrainConfig, require
from jaxformer.data import pipeline, sources, tasks, tokenizer
from jaxformer.data.sources import Example
from jaxformer.errors import CheckpointError, ConfigError, DataError, Stopped
from jaxformer.hub.family import resolved
from jaxformer.hub.folder import is_checkpoint
from jaxformer.loading import load, load_into, read_origin
from jaxformer.model import Model
from jaxformer.training import manifest, optim
from jaxformer.training.checkpoint import Checkpoints, lock
from jaxformer.training.evaluate import evaluate_loss, evaluate_text, samples, spaced
from jaxformer.training.report import Report
from jaxformer.training.state import TrainState, abstract_state, init_state
from jaxformer.training.step import make_eval_step, make_train_step
from jaxformer.training.stopping import StopRequest
from jaxformer.training.window import Window


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run learns from and is judged by, as text where it is generated and tokenised."""

    tokenizer: tokenizer.Tokenizer
    train: tasks.Rows
    valid: tasks.Rows
    examples: Sequence[Example]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all the ids."""
        digest = hashlib.sha256()
        for rows in (self.train, self.valid):
            for ids in (rows.source_ids, rows.source_offsets, rows.target_ids, rows.target_offsets):
                digest.update(ids.tobytes())
        return digest.hexdigest()


def fit(config: TrainConfig) -> None:
    """Train as configured, or go on where the run in `config.run_dir` stopped.

    A run that is resumed is bit for bit the run that was never stopped. Raises the errors of
    jaxformer.errors; `Stopped` after a signal, with the state saved.
    """
    require(
        config.model.head == "tokens",
        f"model.head is {config.model.head!r}, but only models with head 'tokens' are trained here "
        "(mlm, for an encoder).",
    )
    if config.distributed:
        jax.distributed.initialize()
    run_dir = Path(config.run_dir)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        if jax.process_index() == 0:
            stack.enter_context(lock(run_dir))
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_fits(config.model, mesh)
        config, data = prepare(config, run_dir)
        sharding.check_fits(config.model, mesh)
        if jax.process_index() == 0:
            run.create(run_dir, config, data.tokenizer)
        multiple = sharding.batch_shards(mesh) * config.accumulate
        processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
        batches = pipeline.training_batches(
            config.data,
            data.train,
            data.tokenizer,
            seed=config.seed,
            multiple=multiple,
            **processes,
        )
        if config.data.workers:
            stack.callback(batches.close)

        tx = optim.make_optimizer(config.model, config.optim, config.steps)
        abstract = abstract_state(config.model, tx, mesh)
        checkpoints = stack.enter_context(
            Checkpoints(
                run_dir, keep_latest=config.keep_latest, keep_best=config.keep_best, report=print
            )
        )
        restored = checkpoints.restore(abstract)
        if restored is None:
            state, meta, step = init_state(config.model, tx, mesh, config.seed), {}, 0
            origin = None
            if config.init_from:
                base = Path(config.init_from)
                state = state._replace(params=adopt(state.params, config.model, base))
                origin = read_origin(base)
            if jax.process_index() == 0:
                run.write_origin(run_dir, origin and origin._asdict())
        else:
            state, meta, step = restored
            if meta["data_hash"] != data.hash:
                raise CheckpointError(
                    f"the data are not those that {run_dir} was trained on so far; put the files "
                    "back as they were, or choose another run_dir, with init_from this one."
                )
            batches.set_state(meta["data"])
        evaluated, saved, loss = meta.get("evaluated", 0), step, None
        report = stack.enter_context(Report(run_dir, step, config.steps, evaluated == step))
        size = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        report.say(
            f"{config.model.kind}, {size:,} parameters, mesh {dict(mesh.shape)}; "
            f"{len(data.train):,} training and {len(data.valid):,} validation examples, "
            f"{pipeline.left_out(config.data, data.train):,} left out as too long; "
            + (f"resumed at step {step}" if step else "starting anew")
        )
        train_step = make_train_step(
            config.model, config.optim, tx, config.accumulate, mesh, abstract
        )
        eval_step = make_eval_step(config.model, mesh)
        schedule = optim.schedule(config.optim, config.steps)

        def evaluate(state: TrainState, step: int) -> float:
            """Log the evaluation of `state`, show samples, and return its loss."""
            held_out = pipeline.evaluation_batches(
                config.data, data.valid, data.tokenizer, multiple=multiple, **processes
            )
            scores = evaluate_loss(eval_step, state.params, stop.between(held_out), mesh)
            model = Model(config.model, state.params, data.tokenizer, config.data, config.decode)
            examples = data.examples
            if step < config.steps:
                examples = spaced(examples, config.eval_examples)
            texts, predictions = evaluate_text(model, examples, config.metrics, stop)
            report.log(step, {**scores, **texts})
            report.samples(samples(model, examples or data.examples, predictions))
            report.plot()
            return scores["eval/loss"]

        window = Window.from_json(meta["window"]) if meta else Window()

        def meta_now() -> dict[str, Any]:
            return {
                "data": batches.get_state(),
                "data_hash": data.hash,
                "window": window.to_json(),
                "evaluated": evaluated,
            }

        def save() -> None:
            checkpoints.save(step, state, meta_now(), loss=loss if evaluated == step else None)

        try:
            while True:
                last = step == config.steps
                if evaluated != step and (last or step % config.eval_every == 0):
                    loss = evaluate(state, step)
                    evaluated = step
                    if saved == step:  # before it was evaluated: it has no loss yet
                        checkpoints.amend(step, meta_now(), loss=loss)
                if saved != step and (last or step % config.save_every == 0):
                    save()
                    saved = step
                if step >= config.steps:
                    break
                stop.check()
                checkpoints.check()
                begin = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - begin
                state, metrics = train_step(state, sharding.put_batch(batch, mesh))
                step += 1
                window.add(metrics, batch, begin, waited)
                report.advance(step, window.note())
                if step % config.log_every == 0 or step == config.steps:
                    scores = window.close(config.max_bad_steps)
                    report.log(
                        step,
                        {
                            **scores,
                            "train/learning_rate": float(jax.device_get(schedule(step - 1))),
                        },
                    )
        except Stopped:
            if saved != step:
                save()
            checkpoints.wait()
            raise


def evaluate_run(
    run_dir: Path, decode: DecodeConfig, step: int | None = None, dtype: DType | None = None
) -> dict[str, Any]:
    """The scores of a trained model on all of its run's validation data, generated by `decode`.

    `step` and `dtype` are those of `load`. Raises `ConfigError` if there are no such data.
    """
    trained = run.exists(run_dir) and not manifest.is_only_parameters(run_dir / "checkpoints")
    require(
        trained or not (run.exists(run_dir) or is_checkpoint(run_dir)),
        f"{run_dir} was not trained here, so it has no validation data to be evaluated on; "
        "fine-tune it on yours with init_from, or score texts from Python (Model.score).",
    )
    config, data = prepare(run.read(run_dir)[0], run_dir)
    model = load(run_dir, step, dtype=dtype)
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    batches = pipeline.evaluation_batches(config.data, data.valid, data.tokenizer, multiple=1)
    scores = evaluate_loss(make_eval_step(model.config, mesh), model.params, batches, mesh)
    model = dataclasses.replace(model, defaults=decode)
    return scores | evaluate_text(model, data.examples, config.metrics, StopRequest())[0]


def prepare(config: TrainConfig, run_dir: Path) -> tuple[TrainConfig, Data]:
    """Read and tokenise the data, and check that what is in the run directory is this run.

    Until its first checkpoint a run may be begun anew with other options. Returns the config with
    the vocabulary's size filled in.
    """
    old, checkpoints = None, run_dir / "checkpoints"
    if manifest.is_only_parameters(checkpoints):
        raise CheckpointError(
            f"{run_dir} holds the parameters of a model that was converted, not trained, so there "
            f"is no state to go on from; choose another run_dir, with init_from {run_dir}."
        )
    train, valid = sources.read(config.data, config.seed)
    if not run.exists(run_dir) and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise CheckpointError(
            f"{checkpoints} holds something that jaxformer did not write, for {run_dir} has no "
            f"{run.VERSIONS}; choose another run_dir."
        )
    if manifest.steps(checkpoints):
        old, pieces = run.read(run_dir)
    elif config.init_from:
        require_same(config.model, Path(config.init_from))
        pieces = inspecting.read_tokenizer(config.init_from)
    elif config.data.tokenizer_path:
        pieces = tokenizer.load_tokenizer(config.data.tokenizer_path)
    else:
        pieces = tokenizer.train_tokenizer(config.data, tasks.texts(config.data, train))
    config = resolve(config, pieces)
    if old is not None:
        run.check_resumable(run_dir, old, config)
    rows = tasks.tokenise(config.data, pieces, valid, one_per_target=False)
    longest = pipeline.longest_pair(config.data, rows)
    if longest > config.model.max_length:
        raise DataError(
            f"a validation example has {longest} tokens, over model.max_length "
            f"{config.model.max_length}; raise that, or shorten or remove the example."
        )
    learnt = tasks.tokenise(config.data, pieces, train, one_per_target=True)
    return config, Data(pieces, learnt, rows, valid)


def require_same(model: ModelConfig, base: Path) -> None:
    """Raise a `ConfigError` naming each field in which `model` computes something else than `base`.

    Without a table of positions, their greatest number is no part of that; nor is a vocabulary of
    size 0, which is to be the tokenizer's.
    """
    there, here = resolved(inspecting.read_config(base)), resolved(model)
    free = {"max_length"} if model.position != "learned" else set()
    free |= {"vocab_size"} if model.vocab_size == 0 else set()
    differing = [
        f"  model.{name}: {there[name]!r} there, {here[name]!r} here"
        for name in there.keys() & here.keys() - free
        if there[name] != here[name]
    ]
    require(
        not differing,
        f"init_from {base} is another model:\n" + "\n".join(sorted(differing)) + "\n"
        "In a config file, model=jaxformer.read_config(init_from) takes it over; "
        "see configs/finetune.py.",
    )


def adopt(params: dict[str, Any], model: ModelConfig, base: Path) -> dict[str, Any]:
    """`params`, of `model`, with those of a run, Hugging Face directory or GGUF file in their
    place; adapters stay as they are.

    Raises `CheckpointError`, naming every parameter that differs.
    """
    own: dict[Any, Any] = flatten_dict(params)
    places = {path: leaf for path, leaf in own.items() if not path[-1].startswith("lora_")}
    if not run.exists(base):
        return unflatten_dict(own | flatten_dict(load_into(model, unflatten_dict(places), base)))
    there: dict[Any, Any] = flatten_dict(load(base).params)
    wanted, found = (manifest.structure(unflatten_dict(tree)) for tree in (places, there))
    manifest.require_fit(base, wanted, found, cast=True)
    for path, leaf in places.items():
        own[path] = jax.device_put(np.asarray(there[path], leaf.dtype), leaf.sharding)
    return unflatten_dict(own)


def resolve(config: TrainConfig, pieces: tokenizer.Tokenizer) -> TrainConfig:
    """`config` with the tokenizer's vocabulary size where it says 0."""
    size = config.model.vocab_size or pieces.vocab_size
    if size < pieces.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {size}, but the tokenizer has {pieces.vocab_size} ids; "
            "raise it, or set it to 0 to take the tokenizer's."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
