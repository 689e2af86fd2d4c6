"""Parameter paths, and the regular expressions that choose among them."""

import re
from collections.abc import Sequence
from typing import Any

import jax


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """(key path joined by `/`, leaf) of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def matching(
    patterns: Any,
    paths: Sequence[str],
    name: str,
    what: str,
    skipped: Sequence[tuple[str, str]] = (),
) -> list[bool]:
    """For every path, whether one of the regular expressions is found in it (`re.search`).

    Raises:
      ValueError: for what is no regular expression, or matches no path; `name` is the argument's
        name, `what` the kind of thing that has the paths, `skipped` what is none, and why.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            f"{name} is {patterns!r}; it must be None, a regular expression, a list of them or a "
            "function"
        )
    chosen = [False] * len(paths)
    for pattern in patterns:
        try:
            found = [re.search(pattern, path) is not None for path in paths]
        except re.error as error:
            raise ValueError(f"{name} {pattern!r} is no regular expression: {error}") from None
        if not any(found):
            hints = [
                f"; {path} is none: {why}" for path, why in skipped if re.search(pattern, path)
            ]
            raise ValueError(
                f"{name} {pattern!r} matches no {what}; there are {', '.join(paths) or 'none'}"
                + "".join(hints)
            )
        chosen = [a or b for a, b in zip(chosen, found, strict=True)]
    return chosen
