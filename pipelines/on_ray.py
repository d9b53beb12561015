"""Joining a Ray cluster, or starting a Ray of our own on this machine."""

import logging
import sys

import ray

from schemas.errors import InputError


def start_ray(address: str | None) -> None:
    """Join the cluster at an address; without one, that of RAY_ADDRESS, or the one this machine was made a part of with
    `ray start`; where there is none, start a Ray for the time of this process.

    Does nothing where this process has one; where that has lost all its nodes (that of this machine was killed), it begins anew.
    Says on stderr which cluster it joins, since what runs there belongs to others, too.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        if any(node["Alive"] for node in ray.nodes()):
            return
        print("Ray's processes on this machine were ended; starting it again", file=sys.stderr)
        ray.shutdown()
    # A Ray of our own needs no dashboard, which would cost a gigabyte of memory where it is installed.
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {address or 'RAY_ADDRESS'} ({error}); see build.ray.address") from None
    if not ray._private.worker._global_node.is_head():
        print(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}", file=sys.stderr)
