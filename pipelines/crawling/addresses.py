"""Which addresses may be connected to: public ones, and those that the user allows.

A URL of somebody else's table, or a redirect, may point into the network that the crawler runs in: at a router, a database, a
cloud's metadata service with its credentials (server-side request forgery). Names do not tell, so addresses are checked, twice:

    name ──CheckedResolver──▶ addresses, all of them fine ──┐
                                                            ├──checked_socket──▶ a socket for just this address
    address in the URL itself ──────────────────────────────┘

The second check sees the very address that is connected to, however it came there: a literal, a cache, a name that resolves anew.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

from pbe_core.errors import InputError

GetAddrInfo = Callable[..., list[tuple[Any, ...]]]
"""As `socket.getaddrinfo`."""

AddressInfo = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[Any, ...]]
"""One entry of what getaddrinfo gives: family, kind, protocol, canonical name, (address, port, ...)."""

# Of the registries https://www.iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry, what the standard
# library takes for global in one version or another, though nothing that may be asked is there; and one cloud's own.
_SPECIAL: tuple[IPv4Network | IPv6Network, ...] = (
    IPv4Network("100.64.0.0/10"),  # Carriers' NAT, RFC 6598; Alibaba's metadata service is 100.100.100.200.
    IPv4Network("168.63.129.16/32"),  # A public number, but what answers is Azure's machine around the virtual one.
    IPv4Network("192.0.0.0/24"),  # Protocol assignments, RFC 6890; Oracle's metadata service is 192.0.0.192.
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    IPv6Network("2001::/23"),  # Protocol assignments, RFC 2928; Teredo is in it, whose tunnels end at any IPv4 address.
    IPv6Network("3fff::/20"),  # Documentation, RFC 9637
)
_UNICAST_6 = IPv6Network("2000::/3")  # All that IANA gives out (RFC 4291, section 2.4).
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052, section 2.1


class AddressRefused(OSError):
    """An address that is neither public nor allowed; an OSError, which is what aiohttp expects of resolvers and sockets."""


class AddressRules:
    """What `crawl.allowed_addresses` adds to the public addresses."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """Read the setting: ADDRESS, ADDRESS:PORT, [IPV6]:PORT, NETWORK/PREFIX or NETWORK/PREFIX:PORT.

        Raises:
            InputError: if one of them is none of these.
        """
        self._allowed = tuple(_network_and_port(rule) for rule in allowed)

    def refusal(self, address: str, port: int) -> str | None:
        """Why `port` of `address` must not be connected to, or None if it may.

        IPv6 addresses that stand for IPv4 ones (mapped, 6to4, NAT64) are as good as those; a scope (fe80::1%eth0) is no matter.
        """
        try:
            number = ipaddress.ip_address(address)
        except ValueError:
            # Somebody further down would resolve it, unseen.
            return f"{address} is not written as an IP address"
        if isinstance(number, IPv6Address) and number.ipv4_mapped:
            number = number.ipv4_mapped
        if any(number in network and only in (None, port) for network, only in self._allowed) or _is_public(number):
            return None
        return f"{address} is not public and not among crawl.allowed_addresses"

    def checked_socket(self, info: AddressInfo) -> socket.socket:
        """A socket for the one address in `info`; aiohttp's `socket_factory`.

        Raises:
            AddressRefused: if it must not be connected to.
        """
        family, kind, protocol, _, address = info
        if refusal := self.refusal(address[0], address[1]):
            raise AddressRefused(refusal)
        return socket.socket(family, kind, protocol)


class CheckedResolver(AbstractResolver):
    """The system's resolver, in threads of its own; a name of which any address is refused is refused."""

    def __init__(self, rules: AddressRules, threads: int, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        self._rules = rules
        self._getaddrinfo = getaddrinfo
        # The loop's own pool has few threads: some dead names, each of which takes many seconds, would hold up all others.
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """All addresses of `host`.

        Raises:
            AddressRefused: if one of them must not be connected to; the message names it.
            OSError: if there are none.
        """
        look_up = partial(self._getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        results = []
        for its_family, _, protocol, _, address in found:
            # (address, port) or (address, port, flow, scope)
            number = f"{address[0]}%{address[3]}" if its_family == socket.AF_INET6 and address[3] else address[0]
            if refusal := self._rules.refusal(number, port):
                raise AddressRefused(refusal)
            flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            results.append(ResolveResult(hostname=host, host=number, port=port, family=its_family, proto=protocol, flags=flags))
        if not results:
            raise OSError("no addresses")
        return results

    async def close(self) -> None:
        """Let go of the threads; a look-up that hangs in one of them is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _network_and_port(rule: str) -> tuple[IPv4Network | IPv6Network, int | None]:
    """One of `crawl.allowed_addresses`; None is any port."""
    with_port = re.fullmatch(r"(?:\[(.+)\]|([\d.]+|.+/\d+)):(\d{1,5})", rule)
    try:
        network = ipaddress.ip_network((with_port[1] or with_port[2]) if with_port else rule)
        port = int(with_port[3]) if with_port else None
        if port is not None and not 0 < port < 65536:
            raise ValueError(f"{port} is no port")
    except ValueError as error:
        raise InputError(
            f"crawl.allowed_addresses: {rule!r} cannot be read ({error}); give numbers, as ADDRESS, ADDRESS:PORT, [IPV6]:PORT, "
            f"NETWORK/PREFIX or NETWORK/PREFIX:PORT"
        ) from error
    return network, port


def _is_public(number: IPv4Address | IPv6Address) -> bool:
    """Whether an address is globally routable unicast; for IPv6, also whether the IPv4 one is at which its packets end."""
    if isinstance(number, IPv6Address):
        if number in _NAT64:
            return _is_public(IPv4Address(int(number) & 0xFFFF_FFFF))
        if number.sixtofour:
            return _is_public(number.sixtofour)
        if number not in _UNICAST_6:
            return False
    special = number.is_multicast or number.is_reserved or any(number in network for network in _SPECIAL)
    return number.is_global and not special
