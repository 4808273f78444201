"""A memory bank whose rows are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyreid import files, ops
from pyreid.ops import Mined
from pyreid.sharded import _contrast
from pyreid.sharded._best import best_of
from pyreid.sharded._exchange import Exchange, Places, Route

_NAMES = ("features", "labels", "cameras")
_REDUCE = ("row", "cluster_mean", "label_uniform")
_DENOMINATORS = ("joint", "own")


class ShardedMemoryBank(torch.nn.Module):
    """`MemoryBank` for more rows than one GPU holds: each process has some of them, and all call each method
    together, each with its own share of the batch (of any size, 0 included).

    Rows are numbered through all processes, by rank: `own` are the numbers of those here. Results are those
    of a MemoryBank with all rows, and of `ops` on it; docs/many-gpus.md says what travels. Messages are sent
    by the calls below alone, none by `backward`.

    Args:
        features: (n, D) this process's rows, as they are. n may differ between processes, D may not.
        labels, cameras: (n,) their ids. Without labels, -1: no row has any; without cameras, all 0.
        momentum, repeats, parts, normalize: of `ops.memory_update_`, for every update.
        search_dtype: torch.float16 or torch.bfloat16 keeps a copy in half precision for
            `mine(..., precision="fast")`, in step with every update.
        group: of torch.distributed; None: all processes. Its timeout is how long a call waits for one that
            has stopped.
    """

    features: torch.Tensor
    labels: torch.Tensor
    cameras: torch.Tensor
    search_features: torch.Tensor | None

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None = None,
        cameras: torch.Tensor | None = None,
        *,
        momentum: float = 0.2,
        repeats: str = "sequential",
        parts: int | Sequence[int] = 1,
        normalize: bool = True,
        search_dtype: torch.dtype | None = None,
        group: Any = None,
    ):
        super().__init__()
        self.momentum = momentum
        self.repeats = repeats
        self.parts = parts
        self.normalize = normalize
        self.search_dtype = search_dtype
        self.group = group
        for name in _NAMES:
            self.register_buffer(name, None)
        self.register_buffer("search_features", None, persistent=False)
        self.reset(features, labels, cameras)

    @torch.no_grad()
    def reset(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None = None,
        cameras: torch.Tensor | None = None,
    ) -> None:
        """Starts over from this process's (n, D) features and (n,) ids, of any n."""
        size = len(features)
        for name, ids in (("labels", labels), ("cameras", cameras)):
            if ids is not None and tuple(ids.shape) != (size,):
                raise ValueError(
                    f"ShardedMemoryBank: {name} must have shape ({size},), got {tuple(ids.shape)}"
                )
        device = features.device
        self.features = features.detach().clone().contiguous()
        for name, ids, default in (("labels", labels, -1), ("cameras", cameras, 0)):
            given = torch.full((size,), default) if ids is None else ids.detach()
            setattr(self, name, given.to(device, torch.int64, copy=True))
        self._placed()

    def _placed(self) -> None:
        self._seen()
        exchange = self._exchange("reset")
        self._places = Places.of(exchange, self.features)
        self._shared: _contrast.Shared | None = None
        self.search_features = (
            None if self.search_dtype is None else self.features.to(self.search_dtype)
        )
        self._seen()

    def _seen(self) -> None:
        """Remembers the rows as they are, to notice if somebody else writes to them."""
        rows = self.features
        self._known = (rows.data_ptr(), None if rows.is_inference() else rows._version)

    def _exchange(self, call: str) -> Exchange:
        op = f"ShardedMemoryBank.{call}"
        place, version = self._known
        rows = self.features
        if rows.data_ptr() != place:  # moved to another device, or a copy
            self._seen()
        elif version is not None and rows._version != version:
            raise RuntimeError(
                f"{op}: the rows of this process were written to by something else. DistributedDataParallel "
                "copies rank 0's buffers to all ranks: keep the bank outside of the module that it wraps, or "
                "pass broadcast_buffers=False"
            )
        return Exchange(op, self.group)

    def __len__(self) -> int:
        """N: the rows of all processes."""
        return self._places.total

    @property
    def own(self) -> range:
        """The numbers of the rows that are here."""
        return self._places.own

    @torch.no_grad()
    def update(
        self,
        features: torch.Tensor,
        rows: torch.Tensor,
        *,
        momentum: float | torch.Tensor | None = None,
    ) -> None:
        """Moves `rows` (E,), of all, towards `features` (E, D); `momentum`, a float or (E,), once instead of
        the bank's own. Events count in the order of ranks, and of each rank's batch: as `MemoryBank.update`
        takes the batches of all, one after another."""
        exchange = self._exchange("update")
        self._check(exchange, "features", features, (len(rows), self.features.shape[1]))
        route = Route(exchange, self._places, "rows", rows.long())
        came = route.tell("features of events", features.detach())
        weight: Any = self.momentum if momentum is None else momentum
        if isinstance(weight, torch.Tensor):
            weight = route.tell("momentum of events", weight)
        ops.memory_update_(
            self.features,
            came,
            route.asked,
            momentum=weight,
            repeats=self.repeats,
            parts=self.parts,
            normalize=self.normalize,
        )
        self._seen()
        if self.search_features is not None:
            moved = self.features[route.asked]
            self.search_features[route.asked] = moved.to(self.search_features.dtype)

    @torch.no_grad()
    def mine(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        skip: int = 0,
        self_rows: torch.Tensor | None = None,
        query_labels: torch.Tensor | None = None,
        query_cameras: torch.Tensor | None = None,
        camera_penalty: float = 0.0,
        precision: str = "exact",
    ) -> Mined:
        """`MemoryBank.mine` among the rows of all, for this process's queries (B, D). No gradient: for one,
        pass the rows on to `set_contrast`."""
        exchange = self._exchange("mine")
        self._check(exchange, "queries", queries, (len(queries), self.features.shape[1]))
        bank = self.features
        if precision == "fast" and self.search_features is not None:
            bank = self.search_features
        everyone, counts = exchange.gather("queries", queries.detach())
        ids = (
            None if given is None else exchange.gather(name, given.long(), counts)[0]
            for name, given in (
                ("self_rows", self_rows),
                ("query_labels", query_labels),
                ("query_cameras", query_cameras),
            )
        )
        themselves, labels, cameras = ids
        if themselves is not None:
            themselves = themselves - self.own.start  # of others' rows: out of range, which is none
        scores, rows = ops.mine_negatives(
            everyone,
            bank,
            k + skip,
            self_rows=themselves,
            query_groups=labels,
            bank_groups=None if labels is None else self.labels,
            query_cameras=cameras,
            bank_cameras=None if cameras is None else self.cameras,
            camera_penalty=camera_penalty,
            precision=precision,
        )
        rows += self.own.start * (rows >= 0)
        # Lists of all processes side by side.
        scores = exchange.sent_back("scores", scores, counts).transpose(0, 1).flatten(1)
        rows = exchange.sent_back("mined rows", rows, counts).transpose(0, 1).flatten(1)
        return Mined(*best_of(scores, rows, k + skip, skip))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., D): rows by number of all, from those who have them. No gradient."""
        return self._fetched("rows", self.features, ids)

    def labels_of(self, ids: torch.Tensor) -> torch.Tensor:
        """(...): their labels."""
        return self._fetched("labels_of", self.labels, ids)

    @torch.no_grad()
    def _fetched(self, call: str, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        route = Route(self._exchange(call), self._places, "ids", ids.reshape(-1).long())
        return route.fetch(call, table).view(*ids.shape, *table.shape[1:])

    def cross_entropy(
        self,
        queries: torch.Tensor,
        targets: torch.Tensor,
        *,
        scale: float,
        reduce: str = "row",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """`ops.bank_cross_entropy` with the rows of all, by the bank's labels where `reduce` takes labels:
        (B,) losses of this process's queries (B, D), differentiable in them.

        A target that is no row, or no label of any, is a ValueError on all processes. With "cluster_mean",
        logits of labels whose rows are on several processes travel: rows should be sorted by label.
        """
        exchange = self._exchange("cross_entropy")
        self._check(exchange, "queries", queries, (len(queries), self.features.shape[1]))
        self._check(exchange, "targets", targets, (len(queries),))
        _check_choice(exchange, "reduce", reduce, _REDUCE)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"{exchange.op}: label_smoothing must lie in [0, 1], got {label_smoothing}"
            )
        if reduce == "cluster_mean" and self._shared is None:
            self._shared = _contrast.shared_labels(exchange, self.labels)
        work = _contrast.CrossEntropy(
            exchange,
            self._places,
            self.features,
            self.labels,
            self._shared,
            scale=scale,
            reduce=reduce,
            smoothing=label_smoothing,
        )
        return _contrast.differentiable(queries, lambda given, wanted: work(given, targets, wanted))

    def set_contrast(
        self,
        queries: torch.Tensor,
        positives: torch.Tensor,
        negatives: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
        scale: float,
        denominator: str = "joint",
    ) -> torch.Tensor:
        """`ops.set_contrast` with listed rows of all: (B,) losses of this process's queries (B, D),
        differentiable in them. `positives` (B, J), `negatives` (B, K): numbers of all rows, -1 pads.

        Products travel, not rows: B (J + K) floats, whatever D is."""
        exchange = self._exchange("set_contrast")
        self._check(exchange, "queries", queries, (len(queries), self.features.shape[1]))
        _check_choice(exchange, "denominator", denominator, _DENOMINATORS)
        self._check(exchange, "positives", positives, (len(queries), *positives.shape[1:2]))
        lists = [positives]
        if negatives is not None:
            self._check(exchange, "negatives", negatives, (len(queries), *negatives.shape[1:2]))
            lists.append(negatives)
        listed = torch.cat([rows.long() for rows in lists], 1)
        return _contrast.differentiable(
            queries,
            lambda given, wanted: _contrast.set_contrast(
                exchange,
                self._places,
                self.features,
                given,
                listed,
                positives.shape[1],
                weights=weights,
                scale=scale,
                denominator=denominator,
                with_gradients=wanted,
            ),
        )

    @staticmethod
    def _check(exchange: Exchange, name: str, array: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{exchange.op}: {name} must have shape {shape}, got {tuple(array.shape)}"
            )

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        own = f"{self.own.start} to {self.own.stop}"
        return f"{len(self)} x {dim}, of them {size} here ({own}), momentum={self.momentum}"

    # --- files and state dicts ------------------------------------------------------------------------

    def whole_state(self) -> dict[str, torch.Tensor]:
        """The state dict of a MemoryBank with the rows of all, on each process."""
        exchange = self._exchange("whole_state")
        return {name: exchange.gather(name, getattr(self, name))[0] for name in _NAMES}

    def load_whole_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes this process's share, as even as can be, of a MemoryBank's state dict; it may be mapped into
        memory (`torch.load(path, mmap=True)`), so that only the share is read."""
        exchange = self._exchange("load_whole_state")
        own = _share(len(state["features"]), exchange)
        device = self.features.device
        self.reset(*(state[name][own.start : own.stop].to(device) for name in _NAMES))

    def save(self, folder: str | Path) -> None:
        """Writes this process's rows to a file of their own in `folder`, which all processes see."""
        exchange = self._exchange("save")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        numbers = {"first": self.own.start, "total": len(self)}
        with files.replacing(_file(path, exchange.rank, exchange.size)) as file:
            # Views of the whole bank would be written whole.
            torch.save(
                numbers | {name: getattr(self, name).detach().cpu().clone() for name in _NAMES},
                file,
            )
        exchange.numbers("end of save", [0], self.features)  # the files are all there
        if exchange.rank == 0:
            for old in path.glob("bank-*-of-*.pt"):
                if not old.stem.endswith(f"-of-{exchange.size:05}"):
                    old.unlink()

    def load(self, folder: str | Path) -> None:
        """Takes this process's share, as even as can be, of what any number of processes have saved."""
        exchange = self._exchange("load")
        parts = _read(exchange.op, Path(folder))
        own = _share(parts[0]["total"], exchange)
        taken = []
        for part in parts:
            first, last = part["first"], part["first"] + len(part["features"])
            some = slice(max(own.start, first) - first, max(min(own.stop, last) - first, 0))
            taken.append([part[name][some] for name in _NAMES])
        device = self.features.device
        self.reset(*(torch.cat(rows).to(device) for rows in zip(*taken, strict=True)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any):
        for name in _NAMES:
            buffer = getattr(self, name)
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._placed()


def _check_choice(exchange: Exchange, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        choices = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise ValueError(f"{exchange.op}: {name} must be {choices}, got {value!r}")


def _share(total: int, exchange: Exchange) -> range:
    first, last = (total * part // exchange.size for part in (exchange.rank, exchange.rank + 1))
    return range(first, last)


def _file(folder: Path, rank: int, size: int) -> Path:
    return folder / f"bank-{rank:05}-of-{size:05}.pt"


def _read(op: str, folder: Path) -> list[dict[str, Any]]:
    """The parts of a bank, in their order. What is not looked at of them is not read."""
    found = sorted(folder.glob("bank-*-of-*.pt"))
    sizes = {path.stem.rsplit("-", 1)[1] for path in found}
    if len(sizes) != 1 or len(found) != int(*sizes):
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{op}: folder must hold the files of one save, got {names}")
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in found]
