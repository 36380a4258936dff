"""The contestants, each written as its documentation recommends.

A contestant is a function ``(setting, batches, folder) -> module``, which trains a network and returns it. A module is imported
if its contestant takes part, because some imports take seconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from torch import nn

from benchmarks.work import Batches, Setting

Contestant = Callable[[Setting, Batches, Path], nn.Module]

REGISTRY: dict[str, str] = {
    "hand-written": "by_hand:loop",
    "hand-written, again": "by_hand:loop",
    "hand-written step(closure)": "by_hand:closure_loop",
    "eventtrain": "ours:train",
    "Ignite": "with_ignite:train",
    "Accelerate": "with_accelerate:train",
    "Lightning": "with_lightning:train",
    "Lightning, barebones": "with_lightning:barebones",
    "HF Trainer": "with_transformers:train",
}
"""The function of each contestant, as ``module:function``, by its name in the tables."""

TAKES_PART: dict[str, tuple[str, ...]] = {
    "hand-written": ("bare", "standard", "monitored", "transformer"),
    "hand-written, again": ("bare", "standard", "monitored", "transformer"),
    "hand-written step(closure)": ("bare", "transformer"),
    "eventtrain": ("bare", "standard", "monitored", "transformer"),
    "Ignite": ("bare", "standard", "transformer"),
    "Accelerate": ("bare", "standard", "transformer"),
    "Lightning": ("bare", "standard", "transformer"),
    "Lightning, barebones": ("bare", "transformer"),
    "HF Trainer": ("bare", "standard", "transformer"),
}
"""The settings that each contestant takes part in."""


def contestant(name: str) -> Contestant:
    """Import a contestant."""
    module, _, name_in_module = REGISTRY[name].partition(":")
    function: Contestant = getattr(importlib.import_module(f"benchmarks.contestants.{module}"), name_in_module)
    return function


def described(name: str) -> str:
    """Return the options that a contestant runs with: the docstring of its function."""
    return " ".join((contestant(name).__doc__ or "").split())
