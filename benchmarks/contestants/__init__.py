"""The contestants, each written as its own documentation would have it.

A contestant is a function ``(setting, batches, folder) -> module``: it trains and returns the trained network. The
modules are imported when they take part, since some take seconds.
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
"""Where each contestant stands, as ``module:function``, by its name in the tables."""

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
    """Imports a contestant."""
    module, _, function = REGISTRY[name].partition(":")
    found: Contestant = getattr(importlib.import_module(f"benchmarks.contestants.{module}"), function)
    return found


def described(name: str) -> str:
    """What a contestant had switched on: its function's documentation."""
    return " ".join((contestant(name).__doc__ or "").split())
