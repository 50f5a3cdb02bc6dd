"""The pre-training loop: one backward, one optimiser step, nothing that waits for the device in between.

A step is a pure function of the model's and the optimiser's state and of (seed, epoch, position), so that a run that
is resumed from a checkpoint is, bit for bit on a CPU, the run that was never stopped.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator

from ..data.batches.loaders import PretrainingLoader
from ..data.images.transforms import Normalization
from .bad_images import BadImageLog, TooManyBadImagesError
from .checkpoints.files import load_tensors, read_json, write_json
from .checkpoints.state import (
    load_optimizer,
    load_process_states,
    random_state,
    refuse_other_settings,
    save_optimizer,
    save_process_states,
    set_random_state,
)
from .checkpoints.store import CheckpointStore
from .metrics import StepMeter, TrackedMetrics
from .optimization import WarmupSchedule, clip_gradients, parameter_names
from .processes import Agreement, everywhere, last_line, on_main_process
from .protocols import PretrainingModel, TrainingObserver
from .signals import RunStopped, StopRequest, WaitEnded

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had no finite gradient; the last finite state was saved."""


class BatchError(RuntimeError):
    """A process, this one or another, has got no batch for a step; the last whole step was saved."""


@dataclass
class Progress:
    """Where a run is: optimiser steps done, and images consumed in the current epoch, over all processes."""

    step: int = 0
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Intervals:
    """Steps between logs, checkpoints, and evaluations."""

    logging: int
    checkpointing: int
    evaluation: int


class Pretrainer:
    """Trains a model for its `loss`, and logs its `scalars`.

    Args:
        model: not yet prepared; what is asked of it stands in `PretrainingModel`.
        optimizer: one that takes `found_inf` (AdamW, fused).
        loader: batches of uint8 images and mask noise, as a function of (epoch, position).
        normalize: uint8 images on the device → what the model takes.
        schedule: the learning rate of each step, and how many steps the whole run has.
        max_grad_norm: None = no clipping.
        max_nonfinite_steps: skipped steps in a row at which the run stops.
        output_dir: where `metrics.jsonl` and `bad_images.jsonl` lie.
        settings: what the result follows from; kept in each checkpoint, compared on a resume.
        save_model: writes model, configuration and preprocessing into a folder.
        evaluate: called with the step, on all processes; returns metrics.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: PretrainingModel,
        optimizer: torch.optim.Optimizer,
        loader: PretrainingLoader,
        normalize: Normalization,
        schedule: WarmupSchedule,
        gradient_accumulation_steps: int,
        max_grad_norm: float | None,
        max_nonfinite_steps: int,
        intervals: Intervals,
        output_dir: Path,
        checkpoints: CheckpointStore,
        settings: dict[str, Any],
        save_model: Callable[[Path], None],
        evaluate: Callable[[int], dict[str, float]],
        max_bad_image_fraction: float,
        observer: TrainingObserver | None = None,
    ):
        self.accelerator, self.loader, self.normalize = accelerator, loader, normalize
        self.schedule = schedule
        self.gradient_accumulation_steps, self.max_grad_norm = gradient_accumulation_steps, max_grad_norm
        self.max_nonfinite_steps, self.intervals = max_nonfinite_steps, intervals
        self.output_dir, self.checkpoints = output_dir, checkpoints
        self.settings, self.save_model, self.evaluate = settings, save_model, evaluate

        self.unwrapped = model
        self.parameter_names = parameter_names(model, optimizer)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.approximator_parameters = [p for name, p in trainable if name.startswith("approximator.")]
        self.other_parameters = [p for name, p in trainable if not name.startswith("approximator.")]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.buffers = list(model.buffers())

        self.observer = observer or TrainingObserver()
        self.progress = Progress()
        self.meter = StepMeter(model.scalars, accelerator.device)
        self.metrics = TrackedMetrics(
            output_dir, accelerator, loss_terms=model.loss_terms, total_steps=schedule.total_steps
        )
        bad_images = output_dir / "bad_images.jsonl"
        self.bad_images = BadImageLog(bad_images, num_images=len(loader.source), max_fraction=max_bad_image_fraction)
        self._agreement = Agreement()
        self._stop_request = StopRequest(self._agreement)
        self._last_log = (time.perf_counter(), 0)  # when, and after which step

    def train(self) -> None:
        """Runs to the schedule's last step, from wherever `resume` has put it, and saves at the end.

        Raises:
            RunStopped: a signal asked for it; a checkpoint is saved.
            NonFiniteError: a checkpoint of the last finite state is saved.
            TooManyBadImagesError: a checkpoint is saved.
            BatchError: on all processes; a checkpoint of the last whole step is saved, if there was one.
        """
        self.metrics.begin(self.progress.step)
        self.bad_images.begin()
        batches = self.loader.batches(self.progress.epoch, self.progress.position)
        if left_out := self.loader.num_samples - self.loader.samples_used:
            logger.info("%d images of each epoch, others in each, are left out: they do not fill a step", left_out)
        self.model.train()
        try:
            with self._stop_request:
                if self._owes_evaluation():
                    self._evaluate()
                self._run_steps(batches)
        finally:
            self.metrics.close()
            self._agreement.close()

    def _owes_evaluation(self) -> bool:
        """Before the first step, and where a run was ended between a checkpoint and the evaluation that follows it."""
        step = self.progress.step
        is_due = step == 0 or self._is_evaluated_after(step)
        return is_due and on_main_process(lambda: self.metrics.lacks_evaluation(step))

    def _is_evaluated_after(self, step: int) -> bool:
        return step % self.intervals.evaluation == 0 or step == self.schedule.total_steps

    def _evaluate(self) -> None:
        self.metrics.write(self.progress.step, self.evaluate(self.progress.step))

    def _run_steps(self, batches: Iterator[dict[str, Any]]) -> None:
        """To the last one; whatever all processes agree to end with before that, the last whole step is saved."""
        self._last_log = (time.perf_counter(), self.progress.step)
        try:
            while self.progress.step < self.schedule.total_steps:
                self._step(batches)
                self._after_step()
        except (RunStopped, NonFiniteError, TooManyBadImagesError, BatchError):  # by all processes at the same step
            if self.progress.step > 0:
                self.save()
            raise

    def _step(self, batches: Iterator[dict[str, Any]]) -> None:
        scalars = torch.zeros(len(self.unwrapped.scalars), device=self.accelerator.device)
        before = random_state(), [buffer.clone() for buffer in self.buffers]
        for micro_step in range(1, self.gradient_accumulation_steps + 1):
            try:
                batch = self._next(batches)
            except (BatchError, RunStopped):
                self._undo_forward_passes(*before)
                raise
            self.bad_images.add(batch["bad_images"])
            is_last = micro_step == self.gradient_accumulation_steps
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                scalars += self._forward_backward(batch) / self.gradient_accumulation_steps
        self._update(scalars)

        self.progress.step += 1
        self.progress.position += self.loader.images_per_step
        if self.progress.position >= self.loader.samples_used:
            self.progress.epoch, self.progress.position = self.progress.epoch + 1, 0
        self.metrics.advance()
        self.observer.on_step(self.progress.step)

    def _next(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch, if every process has got its own: none may wait for another's gradient in vain."""
        batch: Any = None
        failure: Exception | None = None
        try:
            with self._stop_request.ending_waits():  # a read that fails may be tried again for minutes
                batch = next(batches)
        except WaitEnded:
            pass
        except Exception as error:  # whatever it is, the other processes must know
            failure = error
        if self._agreement.largest(int(batch is None)):
            if signum := self._stop_request.agreed():
                raise RunStopped(signum)
            self._tell_of_missing_batch(failure)
        return batch

    def _tell_of_missing_batch(self, failure: Exception | None) -> NoReturn:
        """Raises: BatchError, on all processes, with the reason where it happened."""
        rank = self._agreement.largest(0 if failure is None else self.accelerator.process_index)
        step = self.progress.step
        words = f"process {rank} has no batch for step {step + 1}"
        if failure is not None:
            words += f": {last_line(failure)}"
        if step > 0:
            words += f"; --resume_from_checkpoint latest goes on after step {step}"
        raise BatchError(words) from failure

    def _undo_forward_passes(self, random: dict[str, torch.Tensor], buffers: list[torch.Tensor]) -> None:
        """Puts back the random state and the buffers, such as the gate, that an unfinished step has changed."""
        set_random_state(random)
        for buffer, before in zip(self.buffers, buffers, strict=True):
            buffer.copy_(before)

    def _forward_backward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The output's scalars, detached, in the order in which the model names them."""
        device = self.accelerator.device
        pixel_values = self.normalize(batch["pixel_values"].to(device, non_blocking=True))
        pixel_values = self.observer.on_pixels(self.progress.step + 1, pixel_values)
        output = self.model(pixel_values, noise=batch["noise"].to(device, non_blocking=True), return_logits=False)
        self.accelerator.backward(output.loss / self.gradient_accumulation_steps)
        self.observer.on_forward(self.progress.step + 1, batch, output)
        return torch.stack([output[name].detach().float() for name in self.unwrapped.scalars])

    def _update(self, scalars: torch.Tensor) -> None:
        """One optimiser step, or none where the gradient is not finite: decided on the device, from the reduced
        gradient, and so by all processes alike."""
        step = self.progress.step + 1
        self.observer.on_gradients(step, self.unwrapped)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.progress.step)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        grad_norm = clip_gradients(self.other_parameters, self.approximator_parameters, self.max_grad_norm)
        is_finite = grad_norm.isfinite()
        if self.accelerator.scaler is None:  # with one, fp16's scaler skips the step itself
            self.optimizer.optimizer.grad_scale = None
            self.optimizer.optimizer.found_inf = (~is_finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.update(step, scalars, grad_norm, is_finite)
        self.observer.on_update(step, self.unwrapped)

    def _after_step(self) -> None:
        step = self.progress.step
        is_end = step == self.schedule.total_steps
        if step % self.intervals.logging == 0 or is_end:
            self._log()
        paused = time.perf_counter()
        signum = 0 if is_end else self._stop_request.agreed()
        if signum:
            raise RunStopped(signum)
        if step % self.intervals.checkpointing == 0 or self._is_evaluated_after(step):
            self.save()
        if self._is_evaluated_after(step):  # after saving: what it may run into loses no step
            self._evaluate()
        then, last_step = self._last_log
        self._last_log = (then + time.perf_counter() - paused, last_step)  # neither counts as training

    def _log(self) -> None:
        metrics = self.meter.read(self.accelerator)
        now, (then, last_step) = time.perf_counter(), self._last_log
        seconds_per_step = (now - then) / (self.progress.step - last_step)
        images_per_second = self.loader.images_per_step / seconds_per_step
        self._last_log = (now, self.progress.step)
        metrics |= {
            "learning_rate": self.schedule(self.progress.step - 1),
            "epoch": self.progress.epoch + self.progress.position / self.loader.samples_used,
            "seconds_per_step": seconds_per_step,
            "images_per_second": images_per_second,
            "views_per_second": images_per_second * self.unwrapped.config.num_views,
            "skipped_steps": self.meter.skipped_steps,
        }
        self._stop_if_hopeless()
        self.metrics.write(self.progress.step, {**metrics, "bad_images": self.bad_images.count})
        self.metrics.show(self.progress.step, metrics)

    def _stop_if_hopeless(self) -> None:
        """Bad images and skipped steps are looked at when logging, where the device is waited for anyway."""
        self.bad_images.flush()
        self.bad_images.check()
        if self.meter.longest_skip >= self.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self.meter.longest_skip} steps in a row had no finite gradient "
                f"(--max_nonfinite_steps {self.max_nonfinite_steps}). A lower base_learning_rate, a longer "
                "warm-up or --max_grad_norm may help; the last finite state is saved"
            )

    def save(self) -> None:
        """Publishes a checkpoint of this moment. Collective: rank 0 writes for all.

        Raises:
            CheckpointError: it could not be written; on other processes than the main one, OtherProcessError.
        """
        self.bad_images.flush()
        states = everywhere([{**random_state(), "meter": self.meter.window}])

        def publish() -> None:
            with self.observer.saving(self.progress.step):
                path = self.checkpoints.save(self.progress.step, lambda folder: self._write(folder, states))
            logger.info("saved %s", path)

        on_main_process(publish, self._agreement.group)  # the device has nothing to wait for

    def _write(self, folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
        self.save_model(folder)
        save_optimizer(folder, self.optimizer.optimizer, self.parameter_names)
        save_process_states(folder, states)
        scaler = self.accelerator.scaler
        trainer_state = {
            "progress": asdict(self.progress),
            "meter": self.meter.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "bad_images": self.bad_images.known,
            "settings": self.settings,
        }
        write_json(folder / "trainer_state.json", trainer_state)

    def resume(self, checkpoint: Path) -> None:
        """Continues where `checkpoint` was saved.

        Raises:
            ValueError: the checkpoint belongs to a run with other settings (names them), or to another model.
        """
        state = read_json(checkpoint / "trainer_state.json")
        refuse_other_settings(state["settings"], self.settings)
        on_main_process(lambda: self.checkpoints.discard_after(state["progress"]["step"]))
        self.unwrapped.load_state_dict(load_tensors(checkpoint / "model.safetensors"))
        load_optimizer(checkpoint, self.optimizer.optimizer, self.parameter_names)
        self.progress = Progress(**state["progress"])
        self.meter.load_state(state["meter"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.bad_images.resume(state.get("bad_images"))  # older checkpoints have none
        self._resume_process(load_process_states(checkpoint))
        logger.info("resumed from %s: %s", checkpoint, self.progress)

    def _resume_process(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Goes on as the process of this rank; where there were more or fewer, with the mean of what they measured."""
        rank = self.accelerator.process_index
        if rank < len(states):
            set_random_state(states[rank])
        windows = [state["meter"] for state in states]
        are_as_many = len(states) == self.accelerator.num_processes
        self.meter.load_window(windows[rank] if are_as_many else torch.stack(windows).mean(dim=0))
