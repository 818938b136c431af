"""One training loop for all models: on a CPU, on a GPU, or on many under ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from pyzoo._extras import need
from pyzoo.data._common import detection_collate


def fit(
    model: nn.Module,
    dataset: Dataset,
    *,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    steps: int | None = None,
    epochs: float | None = None,
    loss: Callable[..., Tensor | Mapping[str, Tensor]] | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    collate: Callable[[list], tuple] | None = None,
    clip_norm: float | None = None,
    gradient_accumulation: int = 1,
    mixed_precision: str | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    every: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> list[dict[str, float]]:
    """Trains a model in place, on a GPU if there is one and ``ACCELERATE_USE_CPU`` is not set; leaves it in eval mode.

    The samples come in an order that ``seed`` gives: one random permutation after the other, cut into batches that
    are all full. A sample's own random numbers (of an augmentation) depend on ``seed`` and its place in that order.
    So neither the number of processes, nor of workers, nor an interruption changes what is trained on.

    Args:
        model: a classifier, or a detector: ``model(inputs, targets)`` is a dict of losses.
        dataset: has a length, and gives pairs (input, target) by index.
        optimizer: of the model's parameters.
        batch_size: samples of one step, over all processes and all that is accumulated.
        steps, epochs: how often the optimizer steps; or how often each sample is seen, rounded up to whole steps.
        loss: ``loss(model(inputs), targets)`` is a scalar, or a dict of scalars to be summed; None for a detector.
        schedule: steps after each step of the optimizer.
        collate: makes (inputs, targets) of a list of samples; by default stacks them, for a detector lists them.
        clip_norm: the largest norm of all gradients together; longer ones are scaled down to it.
        gradient_accumulation: in how many parts a process computes its share of a batch, one after the other.
        mixed_precision: "no", "fp16" or "bf16"; by default what ``accelerate launch`` was told.
        evaluate: ``evaluate(model)`` gives figures to remember, in eval mode, without gradients, on each process.
            What it draws at random does not change the training.
        every: steps between evaluations, and between checkpoints; an epoch by default. The last step has both.
        folder: where ``checkpoint-<step>`` goes, the latest alone; None keeps nothing.
        resume: go on from the folder's checkpoint, if any; on a CPU to the same losses, bit for bit, as if in one run.
        seed: of the order and of all that is drawn at random.
        workers: processes that load samples; 0 loads them in this one.

    Returns:
        a dict a step: step, loss (the sum of its parts, the mean over the batch), its parts, lr, what was evaluated.

    Raises:
        FloatingPointError: a loss is not finite. The message names it and the file that has the batch.
    """
    accelerate = need("accelerate", "pyzoo.train.fit")
    tqdm = need("tqdm.auto", "pyzoo.train.fit").tqdm
    samples = len(dataset)
    _require(samples > 0, "the length of dataset", samples, "at least 1")
    _require(batch_size > 0, "batch_size", batch_size, "at least 1")
    _require((steps is None) != (epochs is None), "steps, epochs", (steps, epochs), "given, one of the two")
    _require(gradient_accumulation > 0, "gradient_accumulation", gradient_accumulation, "at least 1")
    _require(every is None or every > 0, "every", every, "at least 1")
    _require(clip_norm is None or clip_norm > 0, "clip_norm", clip_norm, "above 0")
    _require(mixed_precision in (None, "no", "fp16", "bf16"), "mixed_precision", mixed_precision, "no, fp16 or bf16")
    _require(not resume or folder is not None, "folder", folder, "given in order to resume")
    steps = steps if epochs is None else math.ceil(epochs * samples / batch_size)
    every = every or max(1, samples // batch_size)
    folder = None if folder is None else Path(folder)

    with _accelerator(accelerate, gradient_accumulation, mixed_precision) as accelerator:
        parts = accelerator.num_processes * gradient_accumulation
        _require(batch_size % parts == 0, "batch_size", batch_size, f"a multiple of {parts}: processes x accumulation")
        accelerate.utils.set_seed(seed, device_specific=True)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        run = {"seed": seed, "batch_size": batch_size, "samples": samples, "processes": accelerator.num_processes}
        history = _start(accelerator, folder, resume, run)
        loader = DataLoader(
            _Seeded(dataset, seed),
            batch_sampler=_order(accelerator, samples, batch_size, parts, range(len(history), steps), seed),
            collate_fn=collate or (detection_collate if loss is None else default_collate),
            num_workers=workers,
            generator=torch.Generator(),  # else it would draw a number from the generator of the model
        )
        batches = (accelerate.utils.send_to_device(batch, accelerator.device) for batch in loader)
        quiet = None if accelerator.is_main_process else True  # None: if the output is not a terminal
        bar = tqdm(range(len(history) + 1, steps + 1), initial=len(history), total=steps, disable=quiet)
        try:
            for step in bar:
                model.train()
                optimizer.zero_grad()
                losses = _backward(accelerator, model, batches, loss, gradient_accumulation, step, folder or Path())
                entry = {"step": step, **losses, "lr": optimizer.param_groups[0]["lr"]}
                if clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                due = step % every == 0 or step == steps
                if due and evaluate is not None:
                    sharded = accelerator.distributed_type == accelerate.DistributedType.FSDP
                    with torch.no_grad(), _seeded(seed, step):
                        entry.update(evaluate((model if sharded else accelerator.unwrap_model(model)).eval()))
                history.append(entry)
                bar.set_postfix(loss=f"{entry['loss']:.4g}", refresh=False)
                if due and folder is not None:
                    _save(accelerator, folder, run, history)
        finally:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()  # without mixed precision's forward
    return history


def _require(valid: bool, name: str, value, allowed: str) -> None:
    if not valid:
        raise ValueError(f"fit: {name} must be {allowed}, got {value!r}")


def _backward(accelerator, model, batches: Iterator, loss, parts: int, step: int, folder: Path) -> dict:
    """Computes the gradients of one step; returns its losses, the mean over all parts and processes."""
    seen = []
    for _ in range(parts):
        inputs, targets = next(batches)
        with accelerator.accumulate(model):
            losses = model(inputs, targets) if loss is None else loss(model(inputs), targets)
            losses = dict(losses) if isinstance(losses, Mapping) else {"loss": losses}
            for name, value in losses.items():
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = getattr(value, "shape", type(value).__name__)
                    raise TypeError(f"fit: the loss {name!r} must be a tensor of one number, got {got}")
            values = torch.stack([value.reshape(()) for value in losses.values()])
            accelerator.backward(values.sum())
        seen.append((values.detach(), inputs, targets))
    # One look at the numbers a step, since it waits for the device. A NaN in one process stops them all.
    mean = accelerator.reduce(torch.stack([values for values, *_ in seen]).mean(0), "mean")
    named = dict(zip(losses, mean.tolist(), strict=True))
    if bad := ", ".join(f"{name!r} is {value}" for name, value in named.items() if not math.isfinite(value)):
        path = folder / f"not_finite-{step}-{accelerator.process_index}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        _, inputs, targets = next((part for part in seen if not part[0].isfinite().all()), seen[0])
        torch.save({"inputs": inputs, "targets": targets}, path)
        raise FloatingPointError(f"fit: at step {step} the loss {bad}; the batch of this process is in {path}")
    return {**named, "loss": sum(named.values())}


def _order(accelerator, samples: int, batch_size: int, parts: int, steps: range, seed: int) -> Iterator[list]:
    """For each part of each step, what this process loads: (place in the order, index of the sample)."""

    @lru_cache(2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(samples)

    size = batch_size // parts
    for step in steps:
        for part in range(accelerator.process_index, parts, accelerator.num_processes):
            begin = step * batch_size + part * size
            yield [(place, int(permutation(place // samples)[place % samples])) for place in range(begin, begin + size)]


class _Seeded(Dataset):
    """Samples whose random numbers depend on their place in the order, not on who loads them or what came before."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        place, index = key
        with _seeded(self.seed, place):
            return self.dataset[index]


@contextlib.contextmanager
def _seeded(*seed: int):
    """Random numbers of the CPU from a seed, and afterwards as if none had been drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    value = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.default_generator.manual_seed(value)  # torch.manual_seed would seed the GPU too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextlib.contextmanager
def _accelerator(accelerate, parts: int, mixed_precision: str | None):
    """An Accelerator that leaves the process free to make another one, of another precision."""
    state, alone = accelerate.state, not accelerate.state.is_initialized()
    cpu = not torch.accelerator.is_available()  # else, under torchrun without a GPU, each process trains by itself
    options = {"gradient_accumulation_plugin": accelerate.utils.GradientAccumulationPlugin(num_steps=parts)}
    options["dataloader_config"] = accelerate.DataLoaderConfiguration(split_batches=True)  # one step of the schedule
    try:
        yield accelerate.Accelerator(cpu=cpu, mixed_precision=mixed_precision, **options)
    finally:
        if alone:
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()


def _start(accelerator, folder: Path | None, resume: bool, run: dict) -> list[dict[str, float]]:
    """Loads the checkpoint of the folder, if the run is to go on; returns the history up to it."""
    latest = max(folder.glob("checkpoint-*"), default=None) if folder else None
    if latest is None:
        return []
    if not resume:
        raise FileExistsError(f"fit: {latest} is there already; resume=True goes on from it")
    progress = json.loads((latest / "progress.json").read_text())
    if changed := [f"{key} was {progress[key]}, is {run[key]}" for key in run if progress[key] != run[key]]:
        raise ValueError(f"fit: cannot go on from {latest}: {', '.join(changed)}")
    accelerator.load_state(str(latest))
    return progress["history"]


def _save(accelerator, folder: Path, run: dict, history: list[dict[str, float]]) -> None:
    """Replaces the checkpoint: the old one goes when the new one is complete."""
    unfinished = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "progress.json").write_text(json.dumps({**run, "history": history}))
        old = list(folder.glob("checkpoint-*"))
        unfinished.rename(folder / f"checkpoint-{len(history):08}")
        for path in old:
            shutil.rmtree(path)
