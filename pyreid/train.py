"""`fit`: an encoder learns to tell people apart from images that nobody has labelled.

Each epoch:  1. features <- the method's inference network, all training images in their order
                            (for a method that wants them)
             2. labels   <- method.label(features, cameras)
             3. steps    <- loss, backward, optimiser's step, method.update, on batches of labelled images
             4. ranking  <- evaluation on the test images, if there are any
After it all of the run is on disk. What is random in an epoch depends on the seed and the epoch alone, so a
run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from pyreid import distributed, files, options
from pyreid.data import (
    Batch,
    Frames,
    Images,
    MeshedImages,
    Photo,
    ReidData,
    Tracklets,
    as_images,
    batches,
    transforms,
)
from pyreid.evaluation import Evaluation, cluster_quality, evaluate_data, extract
from pyreid.methods import METHODS
from pyreid.models import save_weights
from pyreid.options import option
from pyreid.progress import Progress

CHECKPOINT = "checkpoint.pt"
_FORMAT = 2  # of it
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FIGURES = ("mAP", "rank1", "rank5", "rank10", "mINP")  # that the history keeps
_STATISTICS = ("running_mean", "running_var")  # buffers that each process moves with its own share
_AGREE_EVERY = 10  # steps between the times at which processes ask each other whether to stop
# Options that may change when a run goes on: they change where and how long, not what.
_FREE = (
    *("epochs", "workers", "device", "compile", "test_batch"),
    *("evaluate_every", "keep_every", "tensorboard"),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """How a method is trained; each method has released values of its own, `recipe`."""

    epochs: int = option(40, "epochs: each labels all images anew")
    steps: int | None = option(400, "steps of an epoch; none: one pass over the images in clusters")
    batch_size: int = option(32, "images of a step, of all processes together")
    optimizer: Literal["adam", "sgd"] = option("adam", "sgd: with Nesterov's momentum of 0.9")
    learning_rate: float = option(3.5e-4, "the optimiser's step size")
    weight_decay: float = option(5e-4, "the optimiser's L2 penalty, on all parameters")
    warmup_epochs: int = option(
        10, "epochs in which the step size climbs from a tenth to all of it"
    )
    step_size: int | None = option(None, "epochs after which the step size is multiplied by gamma")
    gamma: float = option(0.1, "what the step size is multiplied by every step_size epochs")
    height: int = option(256, "of the images, in pixels")
    width: int = option(128, "of the images, in pixels")
    frames: int = option(4, "random frames of a tracklet in a view of it")
    seed: int = option(1, "of everything that is random")
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the networks' forward and backward passes; the losses are float32 always"
    )
    channels_last: bool = option(False, "images and weights with their channels last in memory")
    compile: bool = option(False, "torch.compile the networks")
    device: str = option("auto", "cpu, cuda, cuda:1; auto: cuda if there is one")
    workers: int = option(0, "processes that read images; 0: this one")
    test_batch: int = option(256, "images of a pass without gradient")
    evaluate_every: int = option(1, "epochs between evaluations on the test images; 0: never")
    flip: bool = option(False, "evaluate with the mean of the features of an image and its mirror")
    keep_every: int = option(0, "epochs between checkpoints that are kept beside the last; 0: none")
    tensorboard: bool = option(False, "also write the figures of every epoch for TensorBoard")
    skip_corrupt: bool = option(False, "pass over images that cannot be read, and count them")

    def __post_init__(self) -> None:
        if self.precision not in _DTYPES:
            names = ", ".join(_DTYPES)
            raise ValueError(f"fit: precision must be one of {names}, got {self.precision!r}")
        for name in ("epochs", "steps", "batch_size", "height", "width", "frames", "test_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"fit: {name} must be at least 1, got {value}")
        for name in ("workers", "evaluate_every", "keep_every", "warmup_epochs", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"fit: {name} must not be negative, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"fit: learning_rate must be positive, got {self.learning_rate}")
        if self.step_size is not None and self.step_size < 1:
            raise ValueError(f"fit: step_size must be at least 1, got {self.step_size}")

    @property
    def extraction(self) -> dict[str, Any]:
        """The options of `evaluation.extract`."""
        return {
            "height": self.height,
            "width": self.width,
            "batch_size": self.test_batch,
            "workers": self.workers,
            "precision": self.precision,
        }

    def rate_at(self, epoch: int) -> float:
        """What step sizes are multiplied by in an epoch."""
        rate = 1.0
        if epoch < self.warmup_epochs:
            done = epoch / self.warmup_epochs
            rate *= 0.1 * (1 - done) + done
        if self.step_size is not None:
            rate *= self.gamma ** (epoch // self.step_size)
        return rate


class Phase(NamedTuple):
    """A part of a step: the sum of the losses is descended by optimisers of these names."""

    losses: dict[str, torch.Tensor]
    optimizers: tuple[str, ...]


class Method(Protocol):
    """What `fit` knows of a method: an nn.Module with these.

    It may also have
        wants_features: bool, whether `label` needs features this time; else they are not extracted, and it
            gets None. Its labels are then all -1 as a rule: there are no clusters.
        wants_frames: bool, whether `label` is told when images were taken: it has a third argument `frames`.
        distances(queries, gallery, query_cameras, gallery_cameras) -> {name: (Q, G) distances} of its own,
            by which test images are ranked too; see `evaluate`.
        optimizers(training) -> {name: optimizer} of its own, in place of one for all that requires a
            gradient.
        phases(batch) -> iterator of Phase, in place of `loss`: networks against each other. Before it is
            asked for the next, the step of the one before has been taken.
        beside: {name: module}, whose weights are kept beside the encoder's, in NAME.pt.
    """

    views: tuple[str, ...]  # names of the transforms that make the views of a batch
    encoder: torch.nn.Module  # is trained
    inference: torch.nn.Module  # labels, is evaluated and saved
    config: Any

    def label(self, features: torch.Tensor | None, cameras: torch.Tensor) -> torch.Tensor: ...
    def sampler(self, labels, cameras, *, batch_size: int, rng) -> Iterator[np.ndarray]: ...
    def loss(self, batch: Batch) -> dict[str, torch.Tensor]: ...
    def update(self, batch: Batch) -> None: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` returns.

    encoder: the trained network, (B, 3, H, W) -> (B, D).
    labels: (N,) int64, those of the last epoch, in the order of the training images; -1 is none.
    history: one dict per epoch, as in metrics.jsonl. Its seconds are the host's, which on CUDA runs ahead:
        there, only their sum tells something.
    before, evaluation: of the encoder as it came, and after the last epoch; None without test images.
    stopped: whether it was interrupted before its end.
    """

    encoder: torch.nn.Module
    labels: torch.Tensor
    history: list[dict[str, Any]]
    before: dict[str, Any] | None
    evaluation: Evaluation | None
    stopped: bool


def fit(
    method: Any,
    encoder: torch.nn.Module | None,
    data: Any,
    training: Training | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
) -> Result:
    """Trains an encoder on unlabelled images.

    Args:
        method: a name ("ice", "cluster-contrast", "scl", "jvtc"), a method's Config, or a method itself.
        encoder: any module that maps (B, 3, H, W) images to (B, D) features; None where `method` has one.
        data: a ReidData, an Images (Tracklets are, for encoders of clips), or any map-style dataset of
            (image, id, camera). The ids of training images are used for nothing but to report how good the
            labels are.
        training: how long, how fast, on what; by default as the method's paper has it.
        output: a folder for checkpoint.pt (all that is needed to go on), last.pt and best.pt (weights of
            the encoder), labels.csv, metrics.jsonl and config.json.
        resume: go on from the checkpoint in `output`, if there is one.
        settings: more to write to config.json.

    Ctrl-C ends it after the step at hand and saves; a second one ends it at once. With torch.distributed
    initialised, every process calls this with the same arguments, and each works on its share of a batch.
    """
    run = _Run(_method(method, encoder), _data(data), training, output, settings or {})
    run.begin(resume)
    epochs = run.training.epochs
    with (
        _interruptible() as interrupted,
        Progress("training", epochs, unit="epochs", done=run.epoch) as bar,
    ):
        while run.epoch < epochs and not interrupted():
            if run.labels is None:
                run.label()
            run.train(interrupted)
            if run.step == run.steps:
                bar.say(run.end_epoch())
                bar.advance()
            else:
                run.save()
    stopped = run.epoch < run.training.epochs
    if run.evaluation is None and run.evaluates:  # of a run that had come to its end before
        run.evaluation = run.ranked()
    return Result(
        run.method.inference, run.last_labels, run.history, run.before, run.evaluation, stopped
    )


class _Run:
    """A run and its state: `epoch` is the one at hand, `step` how many of its steps are done, `labels` its
    labels, None before it has any."""

    def __init__(self, method, data, training, output, settings):
        self.method: Any = method
        self.data: ReidData = data
        self.training: Training = training or Training(**getattr(method, "recipe", {}))
        self.output = None if output is None else Path(output)
        self.settings = {
            "method": options.to_dict(method.config) if hasattr(method, "config") else {},
            "training": options.to_dict(self.training),
            **settings,
        }
        if self.training.batch_size % distributed.world_size():
            raise ValueError(
                f"fit: batch_size must be a multiple of the {distributed.world_size()} processes, "
                f"got {self.training.batch_size}"
            )
        self.device = device_of(self.training.device)
        self.on_cuda = self.device.type == "cuda"
        self.images: Images = data.train
        if not len(self.images):
            raise ValueError("fit: data must hold training images, got none")
        self.cameras = torch.from_numpy(np.asarray(self.images.cameras)).to(self.device)
        self.epoch = self.step = 0
        self.labels: torch.Tensor | None = None
        self.last_labels = torch.full((len(self.images),), -1)
        self.history: list[dict[str, Any]] = []
        self.entry: dict[str, Any] = {}
        self.best = -1.0
        self.before: dict[str, Any] | None = None
        self.evaluation: Evaluation | None = None

    def begin(self, resume: bool) -> None:
        method = self.method.to(self.device)
        if self.training.channels_last:
            method.to(memory_format=torch.channels_last)
        distributed.copy_from_first_(itertools.chain(method.parameters(), method.buffers()))
        self.optimizers: dict[str, torch.optim.Optimizer] = getattr(
            method, "optimizers", self.one_optimizer
        )(self.training)
        self.rates = {
            name: [group["lr"] for group in optimizer.param_groups]
            for name, optimizer in self.optimizers.items()
        }
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.training.precision == "float16"
        )
        if self.output is not None:
            check_output(self.output, resume)
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoint = self.output / CHECKPOINT
            if checkpoint.exists():
                self.load(checkpoint)
            if distributed.rank() == 0:
                self.write_text("config.json", json.dumps(self.settings, indent=2) + "\n")
                self.write_metrics()
        if self.epoch == self.step == 0 and self.evaluates:
            self.before = self.ranked().to_dict()
        if self.training.compile:
            method.encoder.compile()
            if method.inference is not method.encoder:
                method.inference.compile()

    def one_optimizer(self, training: Training) -> dict[str, torch.optim.Optimizer]:
        trained = [weight for weight in self.method.parameters() if weight.requires_grad]
        if not trained:
            raise ValueError("fit: encoder must have parameters that require a gradient, got none")
        common: dict[str, Any] = {
            "lr": training.learning_rate,
            "weight_decay": training.weight_decay,
        }
        if training.optimizer == "sgd":
            return {"all": torch.optim.SGD(trained, momentum=0.9, nesterov=True, **common)}
        return {"all": torch.optim.Adam(trained, **common)}

    # --- lines 1 and 2

    def label(self) -> None:
        start = time.perf_counter()
        features = None
        if getattr(self.method, "wants_features", True):
            features = self.extract(self.images)
        extracted = time.perf_counter()
        frames = {}
        if getattr(self.method, "wants_frames", False):
            frames["frames"] = torch.from_numpy(np.asarray(self.images.frames)).to(self.device)
        self.labels = self.method.label(features, self.cameras, **frames)
        self.last_labels = self.labels.cpu()
        seconds = {"extract": extracted - start, "label": time.perf_counter() - extracted}
        self.entry = {
            "epoch": self.epoch + 1,
            "clusters": cluster_quality(self.last_labels, self.images.ids),
            "losses": {},
            "seconds": seconds,
        }

    def extract(self, images: Images) -> torch.Tensor:
        if isinstance(images, MeshedImages):
            images = images.photos
        return extract(
            self.method.inference, images, progress="features", **self.training.extraction
        )

    # --- line 3

    def train(self, interrupted) -> None:
        training, method = self.training, self.method
        for name, rates in self.rates.items():
            for group, rate in zip(self.optimizers[name].param_groups, rates, strict=True):
                group["lr"] = rate * training.rate_at(self.epoch)
        if self.step == 0:
            torch.manual_seed(_seed(training.seed, self.epoch))
        method.train()
        seconds: dict[str, float] = defaultdict(float, self.entry["seconds"])
        sums: dict[str, Any] = dict(self.entry["losses"])
        moment = time.perf_counter()

        def spent(stage: str) -> None:
            nonlocal moment
            now = time.perf_counter()
            seconds[stage] += now - moment
            moment = now

        label = f"epoch {self.epoch + 1} of {training.epochs}"
        with Progress(label, self.steps, unit="steps", done=self.step) as progress:
            for batch in self.batches():
                batch = batch.to(self.device)
                spent("data")
                losses: dict[str, torch.Tensor] = {}
                phases = iter(self.phases(batch))
                while True:
                    with self.autocast():
                        phase = next(phases, None)
                    if phase is None:
                        break
                    losses |= phase.losses
                    spent("forward")
                    self.descend(phase, spent)
                method.update(batch)
                distributed.mean_(
                    buffer for name, buffer in method.named_buffers() if name.endswith(_STATISTICS)
                )
                spent("update")
                self.step += 1
                # Not read here: that would wait for the device.
                values = torch.stack([value.detach().float() for value in losses.values()])
                distributed.mean_([values])
                for name, value in zip(losses, values.double(), strict=True):
                    sums[name] = sums.get(name, 0.0) + value
                progress.advance()
                if interrupted():
                    break
        self.entry["losses"] = {name: float(value) for name, value in sums.items()}
        self.entry["seconds"] = dict(seconds)

    @property
    def steps(self) -> int:
        """Of the epoch at hand."""
        if self.training.steps is not None:
            return self.training.steps
        count = int((self.last_labels >= 0).sum()) or len(self.last_labels)
        return max(1, count // self.training.batch_size)

    def phases(self, batch: Batch) -> Iterator[Phase]:
        """The phases of a step; of a method that has none, all at once."""
        if hasattr(self.method, "phases"):
            yield from itertools.starmap(Phase, self.method.phases(batch))
        else:
            yield Phase(self.method.loss(batch), tuple(self.optimizers))

    def descend(self, phase: Phase, spent) -> None:
        optimizers = [self.optimizers[name] for name in phase.optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.stack(list(phase.losses.values())).sum()).backward()
        spent("backward")
        distributed.mean_(
            weight.grad
            for optimizer in optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.grad is not None
        )
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        spent("update")

    def batches(self) -> Iterator[Batch]:
        """The batches of this epoch that are still to come: of each, this process's share."""
        training, method = self.training, self.method
        rng = np.random.default_rng((training.seed, self.epoch))
        try:
            plan = method.sampler(
                self.labels, self.cameras, batch_size=training.batch_size, rng=rng
            )
            steps = list(itertools.islice(plan, self.step, self.steps))
        except ValueError as error:
            clusters = int(self.last_labels.max()) + 1
            raise ValueError(
                f"fit: epoch {self.epoch + 1} cannot be trained on its {clusters} clusters: {error}"
            ) from None
        share = distributed.share(training.batch_size)
        views: list[Any] = [
            transforms.make(name, training.height, training.width) for name in method.views
        ]
        if isinstance(self.images, MeshedImages):
            views = [
                view if isinstance(view, transforms.MeshView) else Photo(view) for view in views
            ]
        elif any(isinstance(view, transforms.MeshView) for view in views):
            raise ValueError(
                "fit: data must be MeshedImages, for a method that has views of bodies"
            )
        if isinstance(self.images, Tracklets):
            views = [Frames(view, training.frames) for view in views]
        for batch in batches(
            self.images,
            [rows[share.start : share.stop] for rows in steps],
            transforms=views,
            labels=self.last_labels,
            seed=_seed(training.seed, self.epoch),
            workers=training.workers,
            skip_corrupt=training.skip_corrupt,
            first_step=self.step,
            first_slot=share.start,
            pin_memory=self.on_cuda and training.workers > 0,
        ):
            self.entry["skipped"] = self.entry.get("skipped", 0) + len(batch.skipped)
            if training.channels_last and batch.views[0].dim() == 4:
                nhwc = (view.contiguous(memory_format=torch.channels_last) for view in batch.views)
                batch = dataclasses.replace(batch, views=tuple(nhwc))
            yield batch

    def autocast(self):
        dtype = _DTYPES[self.training.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    # --- line 4

    def end_epoch(self) -> str:
        sums = self.entry["losses"].items()
        losses = {name: total / self.steps for name, total in sums}
        if not np.isfinite(sum(losses.values())):
            raise ValueError(
                f"fit: the loss must stay finite, got {losses} in epoch {self.epoch + 1}; "
                "learning_rate may be too large, or precision too low"
            )
        self.entry |= {
            "losses": losses,
            "learning_rate": self.training.learning_rate * self.training.rate_at(self.epoch),
        }
        done = self.epoch + 1
        last = done == self.training.epochs
        if self.evaluates and (last or done % self.training.evaluate_every == 0):
            self.evaluate()
        self.history.append(self.entry)
        line = self.line()
        self.epoch, self.step, self.labels, self.entry = self.epoch + 1, 0, None, {}
        self.save()
        return line

    @property
    def evaluates(self) -> bool:
        subsets = (self.data.query, self.data.gallery)
        return self.training.evaluate_every > 0 and all(images for images in subsets)

    def ranked(self) -> Evaluation:
        return evaluate_data(
            self.method.inference,
            self.data,
            same_camera=self.data.one_camera,
            distances=getattr(self.method, "distances", None),
            flip=self.training.flip,
            **self.training.extraction,
        )

    def evaluate(self) -> None:
        start = time.perf_counter()
        self.evaluation = self.ranked()
        found = self.evaluation.to_dict()
        self.entry["evaluation"] = {name: found[name] for name in _FIGURES}
        self.entry["seconds"]["evaluate"] = time.perf_counter() - start
        if found["mAP"] is not None and found["mAP"] > self.best:
            self.best = found["mAP"]
            if self.output is not None and distributed.rank() == 0:
                save_weights(self.method.inference, self.output / "best.pt")

    def line(self) -> str:
        """The entry of this epoch, for people to read."""
        clusters, found = self.entry["clusters"], self.entry.get("evaluation", {})
        loss, seconds = (sum(self.entry[part].values()) for part in ("losses", "seconds"))
        precision = clusters.get("pair_precision")
        right = "" if precision is None else f" ({precision:.0%} of pairs right)"
        grouped = f"{clusters['clusters']} clusters{right}, {clusters['outliers']} outliers, "
        if clusters["outliers"] == clusters["images"]:
            grouped = ""  # the method makes none
        ranking = ""
        if found.get("mAP") is not None:
            ranking = f", mAP {found['mAP']:.1%}, rank-1 {found['rank1']:.1%}"
        return (
            f"epoch {self.entry['epoch']:3} of {self.training.epochs}: "
            f"{grouped}loss {loss:.3f}{ranking}, {seconds:.1f} s"
        )

    # --- what stays on disk

    def save(self) -> None:
        if self.output is None or distributed.rank() > 0:
            return
        state = {
            "format": _FORMAT,
            "settings": self.settings,
            "epoch": self.epoch,
            "step": self.step,
            "labels": None if self.labels is None else self.last_labels,
            "last_labels": self.last_labels,
            "entry": self.entry,
            "history": self.history,
            "before": self.before,
            "best": self.best,
            "method": self.method.state_dict(),
            "optimizers": {
                name: optimizer.state_dict() for name, optimizer in self.optimizers.items()
            },
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.on_cuda else None,
        }
        finished = self.step == 0
        every = self.training.keep_every
        names = [CHECKPOINT]
        if finished and every and self.epoch % every == 0:
            names.append(f"checkpoint-{self.epoch:04}.pt")
        if finished:
            save_weights(self.method.inference, self.output / "last.pt")
            for name, module in getattr(self.method, "beside", {}).items():
                save_weights(module, self.output / f"{name}.pt")
            self.write_metrics()
            self.write_labels()
            if self.training.tensorboard:
                self.write_tensorboard()
        for name in names:
            with files.replacing(self.output / name) as file:
                torch.save(state, file)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # readers differ in what a damaged file makes them raise
            raise ValueError(f"{path}: is corrupt or no checkpoint: {error}") from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"{path}: must be a checkpoint of this version of pyreid")
        _check_same(path, state["settings"], self.settings)
        if len(state["last_labels"]) != len(self.images):
            raise ValueError(
                f"{path}: is of a run on {len(state['last_labels'])} images, got {len(self.images)}"
            )
        self.method.load_state_dict(state["method"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.last_labels = state["last_labels"].cpu()
        self.labels = None if state["labels"] is None else state["labels"].to(self.device)
        self.entry, self.history = state["entry"], state["history"]
        self.before, self.best = state["before"], state["best"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.on_cuda:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)

    def write_metrics(self) -> None:
        self.write_text(
            "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history)
        )

    def write_tensorboard(self) -> None:
        """The latest entry of the history, each number under the name of its part."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("fit: tensorboard takes a package: pip install tensorboard") from None
        assert self.output is not None
        entry = self.history[-1]
        with SummaryWriter(self.output / "tensorboard", purge_step=entry["epoch"]) as writer:
            for part in ("losses", "clusters", "evaluation", "seconds"):
                for name, value in entry.get(part, {}).items():
                    if value is not None:
                        writer.add_scalar(f"{part}/{name}", value, entry["epoch"])

    def write_labels(self) -> None:
        lines = (
            f'"{name}",{label}\n' if "," in name else f"{name},{label}\n"
            for name, label in zip(self.images.names, self.last_labels.tolist(), strict=True)
        )
        self.write_text("labels.csv", "image,label\n" + "".join(lines))

    def write_text(self, name: str, text: str) -> None:
        assert self.output is not None
        with files.replacing(self.output / name) as file:
            file.write(text.encode())


def _method(method: Any, encoder: torch.nn.Module | None) -> Any:
    if isinstance(method, torch.nn.Module):
        return method
    classes = list(METHODS.values())
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"fit: method must be one of {', '.join(METHODS)}, got {method!r}")
        cls, config = METHODS[method], METHODS[method].Config()
    else:
        cls = next((cls for cls in classes if isinstance(method, cls.Config)), None)
        if cls is None:
            raise ValueError(
                f"fit: method must be a name, a Config or a module, got {type(method).__name__}"
            )
        config = method
    if encoder is None:
        raise ValueError("fit: encoder must be a module that maps images to features, got None")
    return cls(encoder, config)


def _data(data: Any) -> ReidData:
    return data if isinstance(data, ReidData) else ReidData("images", as_images(data))


def check_output(output: Path, resume: bool) -> None:
    """What would keep `fit` from writing there."""
    if (output / CHECKPOINT).exists() and not resume:
        raise ValueError(
            f"fit: output must be a new folder, but {output} holds a run; resume it or name another"
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"fit: output must be a folder, but {output} is a file")


def device_of(name: str) -> torch.device:
    """The device that an option names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"fit: device must be cpu, cuda or auto, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"fit: device must be one that is here, got {name}: torch sees no GPU")
        if device.index is None and distributed.is_distributed():
            device = torch.device("cuda", distributed.rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def _seed(*parts: int) -> int:
    """One number of many, as unlike that of its neighbours as can be."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for part in {*saved, *now}:
        before, after = (json.loads(json.dumps(each.get(part))) for each in (saved, now))
        if not isinstance(before, dict) or not isinstance(after, dict):
            before, after = {part: before}, {part: after}
        for name in {*before, *after} - set(_FREE):
            if before.get(name) != after.get(name):
                raise ValueError(
                    f"{path}: was made with {name} {before.get(name)}, got {after.get(name)}; "
                    "a run goes on with the options it began with"
                )


@contextlib.contextmanager
def _interruptible() -> Iterator[Any]:
    """Within it the first Ctrl-C is only noted: the value is a function that tells whether there was one, the
    same on all processes."""
    noted = threading.Event()
    previous = None

    def note(number, frame) -> None:
        noted.set()
        # A job in the background is started deaf to it; who asks twice means it.
        deaf = previous in (signal.SIG_IGN, None)
        signal.signal(signal.SIGINT, signal.default_int_handler if deaf else previous)
        with Progress("") as progress:
            progress.say("stopping after this step; again to stop at once")

    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        if distributed.world_size() == 1:
            return noted.is_set()
        # Processes hear of it at different steps, and must stop at the same one.
        return asked % _AGREE_EVERY == 0 and distributed.any_of(noted.is_set())

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
