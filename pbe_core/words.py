"""Numbers and lists as people read them: `1 shard`, `1,200 shards`, `3 min 20 s`, `a, b, c and 9 more`."""

from collections.abc import Sequence


def number_of(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun, in the singular for 1: `number_of(1, "shard")` is `1 shard`; `many` where an `s` is not enough."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def noun(number: float, many: str) -> str:
    """The noun that goes with a number, by its plural: `noun(1, "boxes")` is `box`."""
    return {"boxes": "box", "classes": "class", "entries": "entry"}.get(many, many.removesuffix("s")) if number == 1 else many


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 20 s` or `2 h 05 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def few(names: Sequence[object], shown: int = 3) -> str:
    """The first few of many, and how many there are beside: `12, 15, 19 and 1,200 more`."""
    rest = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + rest
