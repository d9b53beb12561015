"""The server's end of the painting process: it starts it, tells it what to paint, hears how far it is, and starts another one."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pbe_core.errors import InputError
from pbe_train.app.models import Choice, Facts
from pbe_train.app.security import RefusedError

Message = dict[str, Any]
LONGEST_LINE = 1 << 20
_ENDINGS = ("done", "failed", "cancelled")


class Painter:
    """One painting process at a time.

    Args:
        choices: the models it may be asked for.
        settings: its `device`, `precision`, `offload` and `threads`.
    """

    def __init__(self, choices: Sequence[Choice], settings: dict[str, Any]) -> None:
        self.settings = settings | {"sources": [choice.source for choice in choices]}
        self.models: dict[str, Facts] = {}
        """Source -> what it is like."""
        self.wrong: dict[str, str] = {}
        """Source -> why there is no such model."""
        self.schedulers: list[str] = []
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and wait until it says what models there are.

        Raises:
            InputError: there is no such device.
            RefusedError: the process ended before it said so.
        """
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pbe_train.app.worker",
            json.dumps(self.settings),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE,
            # Threads that spin while they wait for each other get nothing done beside other work, such as a browser's.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
            start_new_session=True,  # The terminal's Ctrl-C is for the server, which then ends both.
        )
        message = await self._hear()
        if message is None:
            raise RefusedError(503, f"the painting process {await self._end()}; the server's log says more")
        if message["is"] == "refused":
            await self._end()
            raise InputError(message["error"])
        self.models, self.wrong, self.schedulers = message["models"], message["wrong"], message["schedulers"]

    async def paint(self, job: Message, hear: Callable[[Message], None]) -> None:
        """Paint an edit to its end.

        Args:
            job: as the process takes it.
            hear: is called with each message about it, of which the last is `done`, `failed` or `cancelled`.
        """
        last = {"is": "failed", "edit": job["edit"]}
        try:
            if self.process is None or self.process.returncode is not None:
                await self.start()
            self.tell({"do": "paint", **job})
            while (message := await self._hear()) is not None:
                if message["edit"] == job["edit"]:
                    hear(message)
                    if message["is"] in _ENDINGS:
                        return
            ended = await self._end()
        except (InputError, RefusedError) as error:
            hear(last | {"error": str(error)})
        else:
            hear(last | {"error": f"the painting process {ended} in the middle of this edit; a new one starts: try again"})

    def tell(self, order: Message) -> None:
        """Send an order; to a process that has ended, nothing."""
        if self.process and self.process.stdin and not self.process.stdin.is_closing():
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    async def stop(self) -> None:
        """End the process."""
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self._end()

    async def _hear(self) -> Message | None:
        assert self.process is not None
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        message: Message | None = json.loads(line) if line.endswith(b"\n") else None
        return message

    async def _end(self) -> str:
        """Wait for the process's end; says how it ended."""
        if not self.process:
            return "has not begun"
        status = await self.process.wait()
        self.process = None
        if status == -signal.SIGKILL:
            return "was killed (for want of memory, most likely)"
        return f"was ended by signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
