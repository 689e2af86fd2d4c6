"""The order in which the weight gradient of a convolution costs the fewest MACs."""

import functools
import math

from lance_jax.conv_shape import ConvShape
from lance_jax.modes import Steps, cheapest_chain


@functools.lru_cache(maxsize=4096)
def cheapest_order(
    layer: ConvShape, ranks: tuple[tuple[str, int], ...]
) -> tuple[int, Steps, Steps, Steps]:
    """(MACs, expansions of the core, projections of dy, shifted projections of dy), the cheapest.

    The batch basis expands the core or projects dy. The spatial bases expand the core while its
    channel is small, and a convolution follows; or, shifted by each tap of the kernel, they project
    dy, and a matrix product follows. The channel basis comes last. Without one the core is never
    expanded: that would rebuild the input.
    """
    rank = dict(ranks)
    *kernel, i, out = layer.w_sizes
    n, *ys, _ = layer.y_sizes
    core, dy = math.prod(layer.core_shape(rank)), math.prod(layer.y_shape)
    batch = layer.steps({"batch": rank["batch"]} if "batch" in rank else {})
    spatial = layer.steps({m: r for m, r in ranks if m in layer.spatial_names})
    last = (
        layer.modes["channel"] * rank["channel"] * math.prod(kernel) * out
        if "channel" in rank
        else 0
    )

    options = []
    for expand_batch in (False, True) if "channel" in rank or "patch" in rank else (False,):
        up, down = (batch, ()) if expand_batch else ((), batch)
        samples = n if expand_batch or not batch else rank["batch"]
        dy_macs, y_size = sum(dy * r for _, _, r in down), dy // n * samples
        if "patch" in rank:
            k, r = layer.modes["patch"], rank["patch"]
            macs = sum(core * b for _, _, b in _flip(up)) + dy_macs + y_size * r + k * r * out
            options.append((macs, _flip(up), down, ()))
            continue
        if "channel" in rank or not spatial:
            macs, expand = cheapest_chain(core, _flip((*up, *spatial)))
            channels = rank.get("channel", i)
            macs += dy_macs + y_size * math.prod(kernel) * channels + last
            options.append((macs, expand, down, ()))
        if spatial:
            expand_macs, expand = cheapest_chain(core, _flip(up))
            steps = tuple(_tap_step(layer, rank, j) for j in range(len(ys)))
            shift_macs, steps = cheapest_chain(y_size, steps)
            macs = expand_macs + dy_macs + shift_macs
            small = math.prod(rank.get(m, layer.modes[m]) for m in layer.spatial_names)
            macs += samples * small * math.prod(kernel) * rank.get("channel", i) * out + last
            options.append((macs, expand, down, steps))
    return min(options)


def _tap_step(layer: ConvShape, rank: dict[str, int], j: int) -> tuple[int, int, int]:
    """dy's axis j + 1 of size y becomes taps x rank."""
    mode = layer.spatial_names[j]
    return j + 1, layer.y_sizes[1 + j], layer.w_sizes[j] * rank.get(mode, layer.modes[mode])


def _flip(steps: Steps) -> Steps:
    return tuple((axis, after, before) for axis, before, after in steps)
