"""Training in two stages with an average of the weights: resumable at every step, and the same whether resumed or not.

The second stage goes back to the best weights of the first, with another rate and everything else anew.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from . import checkpoint
from .config import option
from .options import Options
from .progress import Progress
from .run import Run
from .stop import Stop

COLUMNS = ["step", "epoch", "stage", "lr", "loss", "seconds", "epoch_seconds", "score"]


class Diverged(Exception):
    """The loss is not finite; the message says at which step, and what to do. Ends an example with status 3."""


@dataclass(frozen=True)
class Schedule(Options):
    """Options of training in two stages; each example gives its own defaults to some."""

    dtype: str = option("fp32", "bf16: autocast, with weights in float32", choices=("fp32", "bf16"))
    batch_size: int = option(64, "of a step")
    epochs: int = option(30, "in all", may_change=True)
    max_steps: int = option(0, "stop after so many steps; 0: no limit", may_change=True)
    lr: float = option(1e-3, "of the first stage")
    warmup_epochs: float = option(0.0, "over which the rate rises from zero")
    second_lr: float = option(1e-4, "of the second stage")
    switch_epoch: int = option(20, "epochs of the first stage, at most")
    switch_from: int = option(1, "epochs before the next two rules may end the first stage")
    switch_patience: int = option(3, "end it when the best score is more than so many epochs old")
    switch_below: float = option(0.0, "end it when the score is below this")
    ema_decay: float = option(0.9999, "of the averaged weights, which are evaluated and kept; 0: no averaging")
    eval_every: int = option(1, "epochs between evaluations")
    save_every: int = option(100, "steps between checkpoints; one is written after every epoch too", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(batch_size=1, epochs=1, eval_every=1, save_every=1, switch_epoch=1)
        self.at_least(max_steps=0, warmup_epochs=0, lr=0, second_lr=0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {self.ema_decay}")

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bf16" else nullcontext()


@dataclass
class State:
    """Where a run stands; all of it is in the checkpoint. batch: of this epoch, the next one to take.

    best, best_epoch: the highest score above zero, and its epoch; 0 before there is one.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    stage: int = 1
    best: float = 0.0
    best_epoch: int = 0
    epoch_seconds: float = 0.0
    log_rows: int = 0


class Trainer(ABC):
    """The loop. A subclass says what the loss of some samples is, how the model is rated, and how the best is kept.

    samples: how many there are; each comes once an epoch, in an order that seed and epoch alone decide (`order`).

    The average's decay rises to its value as min(decay, (1 + n) / (10 + n)) over the steps n: without that a run of a
    thousand steps at 0.9999 would keep most of its initial weights.
    """

    def __init__(self, config: Schedule, model: nn.Module, optimizer: Optimizer, samples: int, run: Run) -> None:
        self.config, self.model, self.optimizer, self.samples, self.run = config, model, optimizer, samples, run
        self.ema = AveragedModel(model, multi_avg_fn=self._average)
        self.state = State()
        self.steps_an_epoch = math.ceil(samples / config.batch_size)

    @abstractmethod
    def loss(self, chosen: list[int], epoch: int) -> Tensor:
        """Of these samples; what is random in it comes from seed, epoch and sample, or from PyTorch's generator."""

    @abstractmethod
    def evaluate(self, progress: Progress) -> tuple[Mapping[str, float], str] | None:
        """Values for log.csv, "score" among them, and a text that shows them; None where nothing is held out."""

    @abstractmethod
    def keep(self) -> None:
        """Writes the averaged model into the run's folder as the best so far."""

    @abstractmethod
    def kept(self) -> Mapping[str, Tensor]:
        """The weights that `keep` wrote last."""

    def order(self, epoch: int) -> list[int]:
        """The samples of an epoch in the order in which batches are cut from them."""
        return np.random.default_rng((self.config.seed, epoch)).permutation(self.samples).tolist()

    def _average(self, averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = int(count)
        decay = min(self.config.ema_decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    # --- checkpoints ---

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "ema": self.ema}

    def save(self) -> None:
        self.run.log.flush()
        self.state.log_rows = self.run.log.rows
        checkpoint.save(self.run.checkpoint, self._modules(), self.optimizer, dataclasses.asdict(self.state))

    def resume(self) -> None:
        self.state = State(**checkpoint.load(self.run.checkpoint, self._modules(), self.optimizer))
        self.run.log.cut(self.state.log_rows)

    # --- the loop ---

    def train(self, about: str) -> bool:
        """From the last checkpoint, where there is one, to the end. False where a signal ended it, after a checkpoint.

        about: a line to begin with.
        """
        config = self.config
        if self.run.resumed:
            self.resume()
        total = self.steps_an_epoch * config.epochs
        total = min(total, config.max_steps) if config.max_steps else total
        bar = Progress(total, self.state.step, every=config.log_seconds, quiet=config.quiet)
        with Stop() as stop, bar as progress:
            size = sum(p.numel() for p in self.model.parameters())
            progress.say(f"{about}; {size:,} parameters, {config.epochs} epochs of {self.steps_an_epoch} steps")
            if self.run.resumed:
                progress.say(f"going on after step {self.state.step}")
            finished = self._epochs(progress, stop)
        if not self.state.best_epoch:
            self.keep()  # nothing is held out, or nothing was right yet: the average as it is
        return finished

    def _epochs(self, progress: Progress, stop: Stop) -> bool:
        config, state = self.config, self.state
        while state.epoch < config.epochs:
            order = self.order(state.epoch)
            self.model.train()
            while state.batch < self.steps_an_epoch:
                if stop.requested or (config.max_steps and state.step >= config.max_steps):
                    self.save()
                    return not stop.requested
                chosen = order[state.batch * config.batch_size : (state.batch + 1) * config.batch_size]
                loss = self.step(chosen)
                progress.step(f"epoch {state.epoch + 1}/{config.epochs}, loss {loss:.4g}")
                if state.step % config.save_every == 0:
                    self.save()
            self._end_epoch(progress)
        return True

    def step(self, chosen: list[int]) -> float:
        """One step with these samples; its loss."""
        config, state = self.config, self.state
        begun = time.perf_counter()
        lr = config.lr if state.stage == 1 else config.second_lr
        if state.stage == 1 and config.warmup_epochs:
            lr *= min(1.0, (state.step + 1) / (config.warmup_epochs * self.steps_an_epoch))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(chosen, state.epoch)
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(
                f"step {state.step + 1}: the loss is {value}. The last checkpoint is from before; "
                "a lower --lr, or float32 instead of bf16, may help"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        seconds = time.perf_counter() - begun
        state.step, state.batch, state.epoch_seconds = state.step + 1, state.batch + 1, state.epoch_seconds + seconds
        row = {"step": state.step, "epoch": state.epoch + 1, "stage": state.stage, "lr": lr}
        self.run.log.add(**row, loss=value, seconds=seconds)
        return value

    def _end_epoch(self, progress: Progress) -> None:
        config, state = self.config, self.state
        state.epoch, state.batch, seconds, state.epoch_seconds = state.epoch + 1, 0, state.epoch_seconds, 0.0
        due = state.epoch % config.eval_every == 0 or state.epoch in (config.epochs, config.switch_epoch)
        rated = self.evaluate(progress) if due else None
        poor = False
        if rated is not None:
            values, text = rated
            row = {"step": state.step, "epoch": state.epoch, "stage": state.stage, "epoch_seconds": seconds}
            self.run.log.add(**row, **values)
            progress.say(f"epoch {state.epoch}/{config.epochs}, {seconds:.1f} s: {text}")
            if values["score"] > state.best:
                state.best, state.best_epoch = values["score"], state.epoch
                self.keep()
            poor = state.epoch - state.best_epoch > config.switch_patience or values["score"] < config.switch_below
        switch = state.epoch >= config.switch_epoch or (poor and state.epoch >= config.switch_from)
        if state.stage == 1 and switch and state.epoch < config.epochs:
            self._second_stage(progress)
        self.save()

    def _second_stage(self, progress: Progress) -> None:
        """The best weights (the average, where none is); a new average and optimizer state; another rate."""
        self.state.stage = 2
        progress.say(f"second stage, from the weights of epoch {self.state.best_epoch or self.state.epoch}")
        self.model.load_state_dict(self.kept() if self.state.best_epoch else self.ema.module.state_dict())
        self.ema.n_averaged.zero_()
        self.ema.module.load_state_dict(self.model.state_dict())
        self.optimizer.state.clear()
