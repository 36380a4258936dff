"""Continue an epoch in another number of processes than began it: each of its remaining samples is trained once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from eventtrain._torch import is_metric, metric_state, set_metric_state
from eventtrain.callbacks.distributed.samplers import plain_sampler, with_sampler
from eventtrain.data.generators import generators
from eventtrain.data.limits import samples_per_batch
from eventtrain.data.resumable import describe_loader, has_plain_sampler
from eventtrain.errors import MisconfigurationError
from eventtrain.trainer import Trainer

T = TypeVar("T")
Order = Mapping[str, Any]
"""How the samples of an epoch are ordered: by the ``seed`` or the ``state`` of the generator that shuffled them; in the order
of the data set without either."""


class Continued(Sampler[int]):
    """The samples of one process: of one epoch in the order in which other processes began it, of each other epoch those of
    another sampler.

    Args:
        sampler: The other sampler.
        samples: The number of samples that all processes share.
        rank: The index of this process.
        world_size: The number of processes.

    Attributes:
        epoch: The number of the current epoch.
        continues: The epoch that others began, and its order; None for no such epoch.
    """

    def __init__(self, sampler: Any, samples: int, rank: int, world_size: int) -> None:
        self.sampler, self.samples, self.rank, self.world_size = sampler, samples, rank, world_size
        self.epoch = 0
        self.continues: Mapping[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Take note of the epoch's number."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def seed(self) -> Any:
        """The seed by which the other sampler shuffles, if it has one."""
        return self.sampler.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.sampler.seed = seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.continues is None or self.continues["epoch"] != self.epoch:
            return iter(self.sampler)
        indices = in_order(self.samples, self.continues["order"])
        total = len(self) * self.world_size  # as DistributedSampler fills shares up, or leaves out the rest
        indices = (indices * math.ceil(total / max(len(indices), 1)))[:total]
        return iter(indices[self.rank :: self.world_size])


def in_order(samples: int, order: Order) -> list[int]:
    """Return the indices of all samples in an order."""
    generator = torch.Generator()
    if "seed" in order:
        generator.manual_seed(order["seed"])
    elif "state" in order:
        generator.set_state(order["state"])
    else:
        return list(range(samples))
    indices: list[int] = torch.randperm(samples, generator=generator).tolist()
    return indices


# ------------------------------------------------------------------ loaders


def innermost_sampler(loader: Any) -> Any:
    """Return the sampler that chooses a loader's samples one by one; None if a part of the loader may choose others."""
    if not isinstance(loader, DataLoader) or not has_plain_sampler(loader):
        return None
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    return batches.sampler if type(batches) is BatchSampler else None


def is_known(sampler: Any) -> bool:
    """Return whether the order of a sampler is known: in turn, shuffled, or that of torch's ``DistributedSampler``."""
    return type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler, Continued)


def continuable(loader: Any, rank: int, world_size: int) -> Any:
    """Return a loader whose sampler can continue an epoch of other processes; a loader of unknown order as it is.

    Args:
        loader: A loader that reads the share of this process.
        rank: The index of the process.
        world_size: The number of processes.
    """
    sampler = innermost_sampler(loader)
    if not is_known(sampler) or getattr(sampler, "num_replicas", world_size) != world_size:
        return loader
    return with_sampler(loader, Continued(sampler, number_of_samples(sampler), rank, world_size))


def number_of_samples(sampler: Any) -> int:
    """Return the number of samples from which a sampler of known order chooses."""
    source: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
    return len(source)


def sampling(loader: Any) -> dict[str, Any]:
    """Return how a training loader chooses its samples in the current epoch, as values that a checkpoint can hold.

    Args:
        loader: The loader, as a run reads it.

    Returns:
        ``samples``, their number, ``replicas``, the processes between which the sampler divides them, and their ``order``, or
        the generators that ``draws`` it, see :func:`drawn_order`; none of them if the order is unknown. ``continues`` if the
        run has continued an epoch of others.
    """
    sampler = innermost_sampler(loader)
    described: dict[str, Any] = {}
    if isinstance(sampler, Continued):
        described["continues"] = sampler.continues
        if sampler.continues is not None and sampler.continues["epoch"] == sampler.epoch:
            return described | {
                "samples": sampler.samples,
                "replicas": sampler.world_size,
                "order": sampler.continues["order"],
            }
        sampler = sampler.sampler
    if not is_known(sampler):
        return described
    described |= {"samples": number_of_samples(sampler), "replicas": getattr(sampler, "num_replicas", 1)}
    if isinstance(sampler, DistributedSampler):
        return described | {"order": {"seed": sampler.seed + sampler.epoch} if sampler.shuffle else {}}
    if isinstance(sampler, SequentialSampler):
        return described | {"order": {}}
    if plain_sampler(with_sampler(loader, sampler)) is None:  # it draws samples more than once
        return described
    paths = {id(generator): path for path, generator in generators(loader).items()}
    draws = [paths.get(id(each)) for each in (sampler.generator, loader.generator)]
    return described | {"draws": [*draws, loader.persistent_workers, loader.num_workers > 0]}


def drawn_order(draws: Any, part: Mapping[str, Any]) -> Order:
    """Return the order that torch's ``RandomSampler`` drew in a pass over its loader.

    Args:
        draws: The path of the sampler's generator, that of the loader's generator, each None for the global one; whether the
            loader's workers persist, so that the loader draws a seed for them in its first pass only; whether it has workers.
        part: The position in the pass, with the states of the generators before it and the number of passes before it.
    """

    def generator(path: str | None) -> torch.Generator:
        if path not in scratch:
            scratch[path] = torch.Generator()
            scratch[path].set_state(began["rng"]["torch"] if path is None else began["generators"][path])
        return scratch[path]

    scratch: dict[str | None, torch.Generator] = {}
    of_sampler, of_loader, persist, has_workers = draws
    # Without workers the sampler draws when the first batch is asked for; other loaders may draw until then.
    at_first_batch = part.get("before_first") is not None and not has_workers
    began = part["before_first"] if at_first_batch else part["began"]

    def draw(path: str | None) -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=generator(path)))

    if not (at_first_batch or (persist and part["passes"])):
        draw(of_loader)  # the seed of the workers, which a loader without workers draws too
    return {"seed": draw(None)} if of_sampler is None else {"state": generator(of_sampler).get_state()}


# ------------------------------------------------------------------ checkpoints


def must_continue(checkpoint: Mapping[str, Any], world_size: int) -> bool:
    """Return whether a run that resumes a checkpoint continues an epoch of other processes, or has done so before.

    Parts of a wrong type count as empty: an error names them afterwards.
    """
    in_epoch = part(checkpoint, "data", dict).get("position") is not None
    is_resized = in_epoch and len(part(checkpoint, "ranks", list)) + 1 != world_size
    return is_resized or any("continues" in each for each in written_samplings(checkpoint))


def part(content: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return a part of a checkpoint; an empty one if it is missing or of a wrong type."""
    value = content.get(key)
    return value if isinstance(value, kind) else kind()


def written_samplings(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the result of :func:`sampling` for each training loader of the run that wrote a checkpoint; nothing if no
    callback wrote it."""
    states = [state for state in part(checkpoint, "callbacks", dict).values() if isinstance(state, dict)]
    samplings = next((part(state, "samplers", list) for state in states if "samplers" in state), [])
    return [each for each in samplings if isinstance(each, dict)]


def divide_anew(
    trainer: Trainer,
    checkpoint: Mapping[str, Any],
    states: list[dict[str, Any]],
    loaders: list[Any],
    of_one_process: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return this process's part of the rest of an epoch that another number of processes began.

    Args:
        trainer: The trainer.
        checkpoint: The content of the checkpoint.
        states: For each process that wrote it, its ``window``, ``metrics``, ``rng`` and ``data``.
        loaders: The training loaders.
        of_one_process: The result of :func:`sampling` for each of them in a single process.

    Raises:
        MisconfigurationError: If the rest cannot be divided so that each sample is trained once.
    """
    before, now = len(states), trainer.processes.data.world_size
    advice = f"Resume with {before} processes, or from a checkpoint of an epoch's end."
    if any(state["window"]["open"] for state in states):
        raise MisconfigurationError(
            f"The checkpoint was written by {before} processes in an open accumulation window, whose gradients {now} processes "
            f"cannot share. {advice}"
        )
    state = dict(states[min(trainer.processes.data.global_rank, before - 1)])
    data = state["data"]
    position = dict(data["position"])
    if position["state"] is not None and not isinstance(position["state"], list):
        raise MisconfigurationError(
            f"The checkpoint was written by {before} processes in an epoch, at positions that their loaders keep, and {now} "
            f"processes cannot share those. {advice}"
        )
    sizes = [samples_per_batch(loader) for loader in loaders]
    batches = batches_done(data, position, sizes, loaders, before, now, advice)
    # A single process may have had no callback that describes its loaders.
    written = written_samplings(checkpoint) or (of_one_process if before == 1 else [])
    continue_orders(checkpoint, states, loaders, written, now, advice)
    if position["state"] is None:
        position["length"] = len(loaders[0])
    progress = checkpoint["progress"]
    total = progress["total_batch_idx"] + batches - position["batches"]
    return state | {
        "data": data | {"position": position | {"batches": batches}},
        "progress": progress
        | {
            "batch_idx": batches - 1,
            "total_batch_idx": total,
            "validated_at": total if progress["validated_at"] == progress["total_batch_idx"] else -1,
        },
        "metrics": merged_metrics(states, trainer, advice),
        "window": state["window"] | {"gradients": mean_gradients([each["window"]["gradients"] for each in states])},
    }


def batches_done(
    data: Mapping[str, Any],
    position: Mapping[str, Any],
    sizes: list[int | None],
    loaders: list[Any],
    before: int,
    now: int,
    advice: str,
) -> int:
    """Return how many batches of each process hold the samples that are trained.

    Args:
        data: The state of the data.
        position: The position in it.
        sizes: The sizes of this process's batches, by loader.
        loaders: The loaders.
        before: The number of processes that trained them.
        now: The number of processes.
        advice: The end of the messages.

    Raises:
        MisconfigurationError: If no number of batches holds them.
    """
    batches: int = position["batches"]
    sizes_before = data.get("batch_sizes", ())
    if len(sizes_before) != len(sizes) or None in (*sizes_before, *sizes):
        raise MisconfigurationError(
            f"The checkpoint was written by {before} processes in an epoch, and it is not known how many samples of the "
            f"training data ({', '.join(map(describe_loader, loaders))}) they had trained. {advice}"
        )
    both = [(before * (old or 0), now * (new or 0)) for old, new in zip(sizes_before, sizes, strict=True)]
    if len(loaders) > 1:
        if changed := next(((old, new) for old, new in both if old != new), None):
            raise MisconfigurationError(
                f"The checkpoint was written in an epoch over several loaders, and one of them gave {changed[0]} samples a "
                f"batch to all {before} processes together. It gives {changed[1]} to {now} processes. Give each loader the "
                f"batch_size with which both are the same. {advice}"
            )
        return batches
    if batches == position["length"]:
        return len(loaders[0])
    samples = batches * both[0][0]
    done, rest = divmod(samples, both[0][1])
    if rest:
        raise MisconfigurationError(
            f"The checkpoint was written after {samples} samples of the epoch: {batches} batches of {sizes_before[0]} on each "
            f"of {before} processes, which is no whole number of batches of {sizes[0]} on each of {now}. Give the loader "
            f"another batch_size, such as {both[0][0]} divided by the number of processes. {advice}"
        )
    return done


def continue_orders(
    checkpoint: Mapping[str, Any],
    states: list[dict[str, Any]],
    loaders: list[Any],
    written: list[dict[str, Any]],
    now: int,
    advice: str,
) -> None:
    """Tell the samplers of loaders in which order the epoch began.

    Raises:
        MisconfigurationError: If it is unknown, or the data set of a loader has changed.
    """
    data = states[0]["data"]
    position = data["position"]
    parts = position["state"] or [{**position, "passes": data["passes"]["train/0"]}]
    for index, loader in enumerate(loaders):
        sampler, described = innermost_sampler(loader), written[index] if index < len(written) else {}
        is_same = isinstance(sampler, Continued) and described.get("samples") == sampler.samples
        kind = type(getattr(sampler, "sampler", sampler)).__name__
        if not is_same or described["replicas"] != len(states) or not {"order", "draws"} & described.keys():
            raise MisconfigurationError(
                f"The checkpoint was written by {len(states)} processes in an epoch, and it is not known which samples "
                f"of the training data ({describe_loader(loader)}, {kind}) are left for {now}. It is known "
                "for a DataLoader over a data set of the same length, in order or shuffled, or with torch's "
                f"DistributedSampler. {advice}"
            )
        part = parts[index]
        if "order" not in described and part["began"] is None:
            continue  # one of several that are read in turn, which had not begun
        order = described["order"] if "order" in described else drawn_order(described["draws"], part)
        sampler.continues = {"epoch": checkpoint["progress"]["current_epoch"], "order": order}


def mean_gradients(gradients: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over processes of the gradients that each holds: they are averaged before a step, so it is the same if
    all processes hold their mean."""
    names = dict.fromkeys(name for each in gradients for name in each)
    return {name: sum(each[name] / len(gradients) for each in gradients if name in each) for name in names}


def merged_metrics(states: list[dict[str, Any]], trainer: Trainer, advice: str) -> dict[str, Any]:
    """Return the logged values of this process, if the first one takes over the sums of the unfinished epoch from all.

    Raises:
        MisconfigurationError: If a metric object cannot add another's updates to its own.
    """
    metrics: dict[str, Any] = dict(states[min(trainer.processes.data.global_rank, len(states) - 1)]["metrics"])
    logged = [entry for state in states for entry in state["metrics"]["entries"]]
    of_objects = {(each["metric"], each["name"], each.get("scope")): each for each in logged if each["metric"] is not None}
    metrics["entries"] = list(of_objects.values())  # all processes compute them together
    is_first = trainer.processes.data.global_rank == 0
    if is_first:
        metrics["entries"] += [each for each in logged if each["metric"] is None]
    objects = [state["metrics"]["metric_objects"] for state in states]
    modules = dict(trainer.module.named_modules())
    metrics["metric_objects"] = {
        path: merged_object(modules[path], [each[path] for each in objects if path in each], is_first, advice)
        for path in dict.fromkeys(path for each in objects for path in each)
        if path in modules and is_metric(modules[path])
    }
    return metrics


def merged_object(metric: nn.Module, states: list[dict[str, Any]], takes_over: bool, advice: str) -> dict[str, Any]:
    """Return the state of a metric object after the updates of all processes in one, and after none in the others."""
    merged: Any = copy.deepcopy(metric)
    merged.reset()
    updated = [state for state in states if state["updates"]]
    if takes_over and updated:
        set_metric_state(merged, updated[0])
        for state in updated[1:]:
            both = metric_state(merged)
            set_metric_state(merged, {**both, "updates": both["updates"] + state["updates"]})
            try:
                merged.merge_state(moved(state["states"], merged.device))
            except (RuntimeError, TypeError, ValueError) as error:
                raise MisconfigurationError(
                    f"The checkpoint was written by {len(states)} processes in an epoch that has updated a "
                    f"{type(metric).__name__}, which cannot add the updates of another process to its own: {error} {advice}"
                ) from error
    return metric_state(merged)


def moved(states: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the states of a metric object on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else [each.to(device) for each in value]
        for name, value in states.items()
    }
