"""The HTTP API of the dataset viewer."""

from collections.abc import Sequence

from aiohttp import web


def dataset_routes(datasets: Sequence[str]) -> list[web.RouteDef]:
    """The handlers for these datasets.

    Args:
        datasets: folders or URLs, as `--dataset` takes them.
    """
    return []
