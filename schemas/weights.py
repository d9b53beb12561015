"""Networks from folders or the hub, and the VAE's identity: a hash by which a dataset and a model agree on the one they use."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL

from schemas.dataset import VaeIdentity
from schemas.errors import InputError
from schemas.settings import REPOSITORY

# A full CLIP checkpoint also holds the text model; the libraries would print a page on every weight that is not used.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
diffusers.logging.set_verbosity_error()
logging.getLogger("httpx").setLevel(logging.WARNING)


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values (as little-endian float32) of all tensors, sorted by name.

    Independent of the file format and of storage in float16 or float32: the same values give the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def load_vae(source: str) -> AutoencoderKL:
    """An AutoencoderKL in float32, in evaluation mode, without gradients; `source` as in `load_network`."""
    return load_network(AutoencoderKL, source, "vae").eval().requires_grad_(False)


def local_folder(source: str) -> Path | None:
    """The folder of this machine that a name means, looked for here and then in the project's own tree; null: there is none."""
    return next((path for path in (Path(source).expanduser(), REPOSITORY / source) if path.is_dir()), None)


def load_network(kind: Any, source: str, subfolder: str) -> Any:
    """Load a network of diffusers or transformers in float32. Safetensors only, so that nothing that is loaded can run code.

    Args:
        kind: its class, with `from_pretrained`.
        source: a folder that holds the network, or a pipeline that has it in `subfolder`; or such a hub id (owner/name, or
            owner/name/folder). A relative folder is looked for here, then in the project's own tree.
        subfolder: where a pipeline keeps it.

    Raises:
        InputError: no such folder or hub id, or what is there is not such a network.
    """
    folder = local_folder(source)
    if folder:
        inner = folder if (folder / "config.json").is_file() else folder / subfolder
        if not (inner / "config.json").is_file():
            raise InputError(f"{folder}: no {kind.__name__} here: there is no config.json in it, nor in {subfolder}/")
        places = [(str(inner), "")]
        # Half precision where there is nothing else, as a download with `variant="fp16"` leaves it.
        half = list(inner.glob("*.fp16.safetensors"))
        variant = "fp16" if half and len(half) == len(list(inner.glob("*.safetensors"))) else None
    else:
        variant = None
        owner, name, *inside = source.split("/") if source.count("/") in (1, 2) else ("", "")
        if not owner or not name or owner.startswith((".", "~")):
            raise InputError(f"{source}: no such folder, and no hub id (owner/name) of a {kind.__name__}")
        places = [(f"{owner}/{name}", inside[0])] if inside else [(source, subfolder), (source, "")]
    for number, (place, inside_place) in enumerate(places, start=1):
        try:
            # Stored precision varies; computation and hashes start from float32.
            dtype = {"torch_dtype": torch.float32} if issubclass(kind, diffusers.ModelMixin) else {"dtype": torch.float32}
            network, loaded = kind.from_pretrained(
                place, subfolder=inside_place, use_safetensors=True, output_loading_info=True, variant=variant, **dtype
            )
        except (OSError, ValueError, RuntimeError) as error:
            if number == len(places):
                cause = " ".join(str(error).split())[:200]
                raise InputError(
                    f"{source}: cannot load a {kind.__name__} ({cause}); give a folder with config.json and .safetensors weights"
                ) from None
            continue
        # The libraries would fill what is missing with random numbers, without a word.
        if missing := sorted(loaded["missing_keys"]):
            raise InputError(
                f"{source}: {len(missing)} tensor(s) of the {kind.__name__} are missing, first {missing[0]}; get the model again"
            )
        return network
    raise AssertionError("there is at least one place")


def identify_vae(vae: AutoencoderKL, source: str) -> VaeIdentity:
    """What `dataset.json` says of a VAE, so that the trainer can tell whether it has the same one."""
    return VaeIdentity(
        source=source,
        sha256=weights_sha256(vae.state_dict()),
        # As JSON has it, and without what starts with _: versions, and the folder it came from.
        config=json.loads(json.dumps({name: value for name, value in sorted(vae.config.items()) if not name.startswith("_")})),
        scaling_factor=vae.config.scaling_factor,
        latent_channels=vae.config.latent_channels,
        downsampling=2 ** (len(vae.config.block_out_channels) - 1),
    )
