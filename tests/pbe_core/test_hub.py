"""The hub, as a real server on the loopback interface: whatever it does ends in bounded time, with one line on what it was."""

import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

import pbe_core.hub
from pbe_core.errors import InputError
from pbe_core.hub import fetch
from pbe_core.vae import load_vae, weights_sha256
from tests.conftest import VAE
from tests.hostile_server import untrusted_context
from tests.hub_server import HubServer

NO_HUB = r"no network: the hub, https?://127\.0\.0\.1:\d+, cannot be reached \("
FAULTS = {
    "closes": rf"{NO_HUB}RemoteProtocolError.*HTTPS_PROXY",
    "no HTTP": rf"{NO_HUB}RemoteProtocolError",
    "silent": rf"{NO_HUB}it does not answer in time\)",
    "page": rf"{NO_HUB}what answers there is no hub",
    "200": rf"{NO_HUB}what answers there is no hub",
    "404": "no such name: .*HTTP 404",
    "hidden": "not allowed: .*HTTP 401.* log in",
    "401": "not allowed: .*HTTP 401.*HF_TOKEN",
    "gated": r"not allowed: .*HTTP 403\); .*agree to the terms",
    "429": r"the hub is busy .*HTTP 429\); try again in some minutes",
    "busy for an hour": r"the hub is busy .*HTTP 429\); try again in 3600 s",
    "500": r"the hub is busy or out of order \(HTTP 500\)",
    "418": "answers HTTP 418; check HF_ENDPOINT",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """Serves the tiny world's VAE."""
    monkeypatch.setattr(pbe_core.hub, "PAUSES_S", (0.0, 0.0))
    with HubServer(Path(VAE)) as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def lower_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server that says nothing; what a slow machine makes of them is the same line."""
    monkeypatch.setattr(pbe_core.hub, "ANSWER_S", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)


def refusal(source: str = "someone/model") -> str:
    with pytest.raises(InputError) as caught:
        load_vae(source)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{source}: no such folder here, and ")
    assert said.endswith(", or give a local folder")
    return said


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_says_what_is_wrong_with_the_hub(fault: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    hub.faults["/"] = fault
    if fault == "silent":
        lower_limits(monkeypatch)
    assert re.search(FAULTS[fault], refusal())


@pytest.mark.parametrize("fault", ["silent", "gated", "429", "page"])
def test_a_hub_that_tells_of_files_and_does_not_give_them(fault: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    """As for gated models, whose names are public. The library would try for minutes."""
    hub.faults["/someone/model/resolve"] = fault
    if fault == "silent":
        lower_limits(monkeypatch)
    assert re.search(FAULTS[fault], refusal())
    assert len(hub.asked) <= 4


def test_a_file_that_stops_half_way(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    lower_limits(monkeypatch)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.faults["/someone/model/resolve/main/diffusion_pytorch_model.safetensors"] = "stops half way"
    assert re.search(rf"{NO_HUB}it does not answer in time", refusal())


def test_a_certificate_that_nobody_trusts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with HubServer(Path(VAE), tls=untrusted_context()) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        assert re.search("cannot be reached .*self-signed certificate.*SSL_CERT_FILE", refusal())
        assert hub.asked == []


@pytest.mark.parametrize("proxy", ["http://proxy:port", "socks5://127.0.0.1:9"])
def test_a_proxy_that_is_none(proxy: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert "HTTPS_PROXY and HTTP_PROXY name a proxy" in refusal()
    assert hub.asked == []


def test_a_hub_that_is_not_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    for endpoint in ("127.0.0.1:1", "http://127.0.0.1:1"):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        assert f"no network: the hub, {endpoint}, cannot be reached (" in refusal()


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: HubServer):
    hub.faults = {"/api/": "503, once", "/someone/model/resolve/main/config.json": "429, once"}
    assert weights_sha256(load_vae("someone/model").state_dict()) == weights_sha256(load_vae(VAE).state_dict())
    assert hub.asked[:2] == ["GET /api/models/someone/model"] * 2


def test_what_was_fetched_needs_the_hub_no_more(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys):
    """Fetched once; later the names are asked for and no file; a hub that fails is told, and offline nothing is asked."""
    expected = weights_sha256(load_vae(VAE).state_dict())
    assert hub.asked == [], "a local folder is none of the hub's business"
    assert weights_sha256(load_vae("someone/model").state_dict()) == expected
    asked = len(hub.asked)
    load_vae("someone/model")
    assert hub.asked[asked:] == ["GET /api/models/someone/model"]
    for fault, said in (("503", "the hub is busy"), ("closes", "no network"), ("hidden", "not allowed")):
        hub.faults["/"] = fault
        capsys.readouterr()
        assert weights_sha256(load_vae("someone/model").state_dict()) == expected
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"someone/model: .*{said}.*; the copy in the cache is used", line)
    asked = len(hub.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert weights_sha256(load_vae("someone/model").state_dict()) == expected
    assert "HF_HUB_OFFLINE forbids to ask the hub" in refusal("someone/other")
    assert hub.asked[asked:] == []
    assert capsys.readouterr().err == ""


def test_half_a_model_in_the_cache_is_none(hub: HubServer):
    huggingface_hub.hf_hub_download("someone/model", "config.json")
    hub.faults["/"] = "503"
    assert "the hub is busy" in refusal()


def test_a_cache_that_cannot_be_written_to(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert "set HF_HOME to a folder that can" in refusal()


def test_a_repository_without_such_a_network(hub: HubServer, tmp_path: Path):
    hub.folder = tmp_path
    (tmp_path / "README.md").touch()
    with pytest.raises(InputError, match="someone/model: the hub has it, but no AutoencoderKL in it"):
        load_vae("someone/model")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").touch()
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"no weights of a AutoencoderKL as \.safetensors in vae"):
        load_vae("someone/model")


def test_nothing_is_wanted(hub: HubServer):
    assert fetch("someone/model", lambda names: [name for name in names if name == "image_encoder/config.json"]) is None
    assert hub.asked == ["GET /api/models/someone/model"]
