"""Work done in threads: ahead, with results or items in order; or one call behind whoever asks for it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import Generic, ParamSpec, TypeVar, cast

Given = ParamSpec("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Results in the order of items, with at most `ahead` of them computed or waiting."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def read_ahead(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items, taken in a thread of their own, so many ahead of whoever asks for them."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        for item in in_order(pool, lambda _: next(iterator, end), repeat(None), ahead + 1):
            if item is end:
                return
            yield cast(Item, item)


class OneBehind(Generic[Given]):
    """Calls of a function in a thread of their own, one after another: a call waits for the one before it, and returns.

    Used in a `with` block, at whose end the last call is over. What a call raises, the next one does, or `wait`, or that end.
    """

    def __init__(self, work: Callable[Given, None]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._running: Future[None] | None = None

    def __call__(self, *given: Given.args, **named: Given.kwargs) -> None:
        """Have the function called, once its last call is over."""
        self.wait()
        self._running = self._pool.submit(self._work, *given, **named)

    def wait(self) -> None:
        """Until the last call is over."""
        if self._running:
            self._running.result()

    def __enter__(self) -> "OneBehind[Given]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()
