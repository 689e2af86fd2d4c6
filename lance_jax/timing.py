"""Which of several functions is the fastest here."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

ROUNDS = 5

Name = TypeVar("Name")


def least_seconds(calls: Mapping[Name, Callable[[], Any]]) -> dict[Name, float]:
    """The least time of each over some rounds in turn, after two calls that compile and warm up."""
    least = {}
    for timed in [False, False, *[True] * ROUNDS]:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds = time.perf_counter() - start
            if timed:
                least[name] = min(seconds, least.get(name, seconds))
    return least
