"""Work in threads gives what work without them gives: the same items in the same order, and the same errors."""

import threading
import time

import pytest

from pipelines.threads import read_ahead


def test_items_come_in_order_from_a_thread_of_their_own_a_few_ahead():
    made, taken = [], []

    def numbers():
        for number in range(20):
            made.append((number, threading.current_thread()))
            yield number

    for number in read_ahead(numbers(), 2):
        taken.append(number)
        deadline = time.monotonic() + 30
        while len(made) < min(20, number + 3) and time.monotonic() < deadline:
            time.sleep(0.001)  # They come while nobody asks,
        assert len(made) <= number + 1 + 2 + 1  # but no more of them than were wanted.
    assert taken == list(range(20))
    assert {thread for _, thread in made} != {threading.main_thread()}
    assert list(read_ahead([])) == []
    assert list(read_ahead([None, 0, None])) == [None, 0, None]


def test_an_error_comes_where_it_would_and_what_was_before_it_first():
    def two():
        yield 1
        yield 2
        raise ValueError("the third")

    items = read_ahead(two())
    assert (next(items), next(items)) == (1, 2)
    with pytest.raises(ValueError, match="the third"):
        next(items)


def test_who_stops_asking_ends_the_thread():
    before = threading.active_count()
    items = read_ahead(iter(range(1000)))
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before
