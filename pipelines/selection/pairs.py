"""All pairs within groups, without a loop over groups."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, Integer


def pairs_within(
    groups: Integer[np.ndarray, " rows"],
) -> Iterator[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]]:
    """All pairs of rows of the same group, as arrays (earlier row, later row), each pair once.

    Args:
        groups: the group of each row; equal ones must stand together, in any order of groups.

    Row i is compared with row i + 1, then i + 2, ... for as long as any group is that long: one yield for each shift. A row that
    has left its group behind is not looked at again, so that time goes by the number of pairs, the sum of n * (n - 1) / 2 over
    groups of n rows. Memory is that of one shift, at most a few numbers for each row.
    """
    earlier = np.arange(len(groups))
    shift = 0
    while len(earlier):
        shift += 1
        earlier = earlier[: np.searchsorted(earlier, len(groups) - shift)]
        earlier = earlier[groups[earlier] == groups[earlier + shift]]
        if len(earlier):
            yield earlier, earlier + shift
