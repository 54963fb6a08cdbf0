"""Which measured config serves which size."""

from collections.abc import Collection, Mapping

from .tuning_log import Config, TuningLog

SLACK = 0.015
"""Medians this close are one time: the difference is noise, and must not choose."""


def choose(times: Mapping[int, Mapping[Config, float]], slack: float = SLACK) -> dict[int, Config]:
    """A config for every size, within `slack` of that size's fastest, from as few configs as a greedy cover finds.

    Fewer configs are fewer kernels to compile and warm up. Among configs that serve equally many sizes the faster wins.
    """
    best = {size: min(of_size.values()) for size, of_size in times.items()}
    serves: dict[Config, set[int]] = {}
    for size, of_size in times.items():
        for config, us in of_size.items():
            if us <= best[size] * (1 + slack):
                serves.setdefault(config, set()).add(size)
    chosen: dict[int, Config] = {}
    while open_sizes := times.keys() - chosen.keys():

        def rank(config: Config, open_sizes: set[int] = open_sizes) -> tuple[int, float, Config]:
            served = serves[config] & open_sizes
            slowdown = sum(times[size][config] / best[size] for size in served) / max(1, len(served))
            return -len(served), slowdown, config

        winner = min(serves, key=rank)
        chosen |= dict.fromkeys(serves[winner] & open_sizes, winner)
    return chosen


def checked_so_far(log: TuningLog, sizes: Collection[int]) -> dict[int, Config]:
    """Winners among the configs that were timed and found right at a size, for the sizes that have any."""
    times = {
        size: {c: us for c, us in log.times.get(size, {}).items() if log.verdicts.get((size, c), "unknown") is None}
        for size in sizes
    }
    return choose({size: of_size for size, of_size in times.items() if of_size})


def from_log(log: TuningLog, sizes: Collection[int]) -> dict[int, Config] | None:
    """The winners as far as the log goes, leaving out what failed at a size; None where a size has no time yet.

    A winner may still be unchecked at its own size: `log.verdicts` tells.
    """
    times = {}
    for size in sizes:
        times[size] = {c: us for c, us in log.times.get(size, {}).items() if log.verdicts.get((size, c)) is None}
        if not times[size]:
            return None
    return choose(times)
