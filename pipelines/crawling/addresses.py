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
_SPECIAL: dict[IPv4Network | IPv6Network, str] = {
    IPv4Network("100.64.0.0/10"): "carrier's NAT",  # RFC 6598; Alibaba's metadata service is 100.100.100.200.
    IPv4Network("168.63.129.16/32"): "Azure's host",  # A public number, but what answers is the machine around the virtual one.
    IPv4Network("192.0.0.0/24"): "protocol assignment",  # RFC 6890; Oracle's metadata service is 192.0.0.192.
    IPv4Network("192.88.99.0/24"): "6to4 relay",  # RFC 7526
    IPv6Network("2001::/23"): "protocol assignment",  # RFC 2928; Teredo is in it, whose tunnels end at any IPv4 address.
    IPv6Network("3fff::/20"): "documentation",  # RFC 9637
}
_UNICAST_6 = IPv6Network("2000::/3")  # All that IANA gives out (RFC 4291, section 2.4).
_COMPATIBLE = IPv6Network("::/96")  # RFC 4291, section 2.5.5.1
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052, section 2.1

_RULE = re.compile(
    r"""(?: \[ (?P<bracketed> [0-9a-fA-F:.]+ ) \] : (?P<bracketed_port> \d{1,5} )
        |   (?P<with_port> [0-9.]+ | [0-9a-fA-F:.]+/\d{1,3} ) : (?P<port> \d{1,5} )
        |   (?P<alone> [0-9a-fA-F:.]+ (?: /\d{1,3} )? ) )""",
    re.VERBOSE,
)


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
        if any(number in network and only in (None, port) for network, only in self._allowed):
            return None
        kind = _kind_of_private(number)
        return kind and f"{address} is not public ({kind}) and not among crawl.allowed_addresses"

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
    try:
        match = _RULE.fullmatch(rule)
        if not match:
            raise ValueError("it must be ADDRESS, ADDRESS:PORT, [IPV6]:PORT, NETWORK/PREFIX or NETWORK/PREFIX:PORT, in numbers")
        network = ipaddress.ip_network(match["bracketed"] or match["with_port"] or match["alone"])
        port = match["bracketed_port"] or match["port"]
        if port and not 0 < int(port) < 65536:
            raise ValueError(f"{port} is no port")
    except ValueError as error:
        raise InputError(f"crawl.allowed_addresses: {rule!r} cannot be read: {error}") from error
    return network, int(port) if port else None


def _kind_of_private(number: IPv4Address | IPv6Address) -> str | None:
    """What an address is that is not globally routable unicast; None for one that is."""
    if isinstance(number, IPv6Address):
        if number in _NAT64:
            return _kind_of_carried(number, "NAT64", int(number) & 0xFFFF_FFFF)
        if number.sixtofour:
            return _kind_of_carried(number, "6to4", int(number.sixtofour))
        if number in _COMPATIBLE and int(number) > 1:
            return f"IPv4-compatible, for {IPv4Address(int(number))}"
    kinds = {
        "loopback": number.is_loopback,
        "unspecified": number.is_unspecified,
        "link-local": number.is_link_local,
        "multicast": number.is_multicast,
        "private": number.is_private,
        **{kind: True for network, kind in _SPECIAL.items() if number in network},
        "reserved": number.is_reserved or not number.is_global or (number.version == 6 and number not in _UNICAST_6),
    }
    return next((kind for kind, applies in kinds.items() if applies), None)


def _kind_of_carried(number: IPv6Address, how: str, carried: int) -> str | None:
    """The same for an IPv6 address whose packets end at an IPv4 one."""
    kind = _kind_of_private(IPv4Address(carried))
    return kind and f"{how} for {IPv4Address(carried)}, {kind}"
