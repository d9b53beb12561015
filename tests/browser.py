"""Pages in a real Chromium without a window, spoken to over its pipe: what it logs, what it asks for, how wide a page gets."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--remote-debugging-pipe")


class Tab:
    """One open page. `events` are what it has told of itself, by their kind, in DevTools' words."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb"), os.fdopen(answers, "rb")
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """Load a file's page and wait until all of it is there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._ask("Emulation.setEmulatedMedia", features=scheme)
        self.events.clear()
        self._ask("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; DevTools run it whatever the page's Content-Security-Policy."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """All that the page's console has: errors, warnings, what was refused."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        self.evaluate("1")  # What was told before this answer is in the events.
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """URLs that the page asked for, itself first; pictures within it (data:) are none."""
        asked = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def _ask(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers.fileno(), 1 << 16)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        told = json.loads(message)
        if "method" in told:
            self.events.append(told)
        return told

    def close(self) -> None:
        self._commands.close()
        self._answers.close()


@contextmanager
def open_browser(profile: Path) -> Iterator[Tab]:
    """A Chromium of its own with one tab, ended with the block."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    # Chromium reads from 3 and writes to 4.
    shell = f'exec "$@" 3<&{commands} 4>&{answers}'
    command = ["bash", "-c", shell, "bash", str(CHROMIUM), *_OPTIONS, f"--user-data-dir={profile}"]
    with subprocess.Popen(command, pass_fds=(commands, answers), stderr=subprocess.DEVNULL) as process:
        os.close(commands)
        os.close(answers)
        tab = None
        try:
            tab = Tab(to_browser, from_browser)
            yield tab
        finally:
            process.terminate()
            if tab:
                tab.close()
