"""Tables and numbers as text."""

NOTHING = "(not measured yet)"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference(mean: float, low: float, high: float) -> str:
    """A difference and its interval, in points."""
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def ratio(found: dict[str, float]) -> str:
    """A ratio and its interval, as `step_time.ratio` gives them."""
    digits = 2 if found["median"] < 10 else 1
    middle, low, high = (f"{found[end]:.{digits}f}" for end in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def span(values: list[float]) -> str:
    """ "13.1 to 14.3", or one number where they are the same."""
    ends = [f"{end:.1f}" for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))
