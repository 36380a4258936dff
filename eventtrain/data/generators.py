"""The random number generators that a loader, its samplers and its data set hold, and their states."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from eventtrain.checkpoint.rng import rng_state, set_rng_state
from eventtrain.data.combined import CombinedLoader

NESTED = ("sampler", "batch_sampler", "dataset")
"""The attributes of a loader, and of its samplers, that are searched for generators."""


def generators(loader: Any) -> dict[str, Any]:
    """Return the random number generators that a loader, its samplers and its data set hold, by their paths.

    The transforms of a data set are searched too, and the data set that it is a part of. A generator that is shared is
    listed once.
    """
    if isinstance(loader, CombinedLoader):
        each = enumerate(loader.flattened)
        return {f"{index}.{path}": held for index, inner in each for path, held in generators(inner).items()}
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        kinds += (numpy_random.Generator, numpy_random.RandomState)
    by_path: dict[str, Any] = {}
    seen: set[int] = set()
    pending = [("loader", loader)]
    while pending:
        path, part = pending.pop()
        if id(part) in seen or isinstance(part, (ModuleType, type)):
            continue  # a library that a data set holds is no part of it
        seen.add(id(part))
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, kinds):
                if not any(value is known for known in by_path.values()):
                    by_path[f"{path}.{name}"] = value
            elif name in NESTED or (f"{path}.{name}".startswith("loader.dataset.") and hasattr(value, "__dict__")):
                pending.append((f"{path}.{name}", value))
    return dict(sorted(by_path.items()))


def generator_states(loader: Any) -> dict[str, Any]:
    """Return the states of a loader's generators, as values that a checkpoint can hold."""
    states: dict[str, Any] = {}
    for path, generator in generators(loader).items():
        if isinstance(generator, torch.Generator):
            states[path] = generator.get_state()
        elif isinstance(generator, random.Random):
            states[path] = generator.getstate()
        elif hasattr(generator, "get_state"):
            name, words, *rest = generator.get_state()
            states[path] = (name, torch.tensor(words.tolist()), *rest)
        else:
            states[path] = generator.bit_generator.state
    return states


def set_generator_states(loader: Any, states: dict[str, Any]) -> None:
    """Restore the states of a loader's generators.

    Args:
        loader: The loader.
        states: The result of :func:`generator_states`. States of generators that the loader no longer has are ignored.
    """
    for path, generator in generators(loader).items():
        if path not in states:
            continue
        if isinstance(generator, torch.Generator):
            generator.set_state(states[path])
        elif isinstance(generator, random.Random):
            generator.setstate(states[path])
        elif hasattr(generator, "set_state"):
            name, words, *rest = states[path]
            generator.set_state((name, words.numpy().astype("uint32"), *rest))
        else:
            generator.bit_generator.state = states[path]


def mark(loader: Any) -> dict[str, Any]:
    """Return the states of all generators from which a pass over a loader draws."""
    return {"rng": rng_state(), "generators": generator_states(loader)}


def put_back(loader: Any, states: Mapping[str, Any]) -> None:
    """Restore the states that :func:`mark` returned."""
    set_rng_state(states["rng"])
    set_generator_states(loader, states["generators"])
