"""Networks from folders or the hub, and the VAE's identity: a hash by which a dataset and a model agree on the one they use."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from pbe_core.autoencoder import CLASSES, Autoencoder
from pbe_core.errors import InputError
from pbe_core.network_files import find_vae, locate_network, without_pickles
from pbe_core.taef2 import load_taef2
from pbe_core.vae_kinds import is_taef2, read_vae_sizes
from pbe_core.weight_files import COUNTERS, DIFFUSERS_FILES, TRANSFORMERS_FILES, check_finite, weights_format, weights_of
from pbe_core.words import number_of
from schemas.dataset import VaeIdentity

# Numbers of positions, which older files of CLIP hold.
BUFFERS = ("position_ids", COUNTERS)
# Of CLIP's vision model, in files of transformers 4.
VISION_PREFIX = "vision_model."

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


def load_vae(source: str) -> Autoencoder:
    """A VAE in float32, in evaluation mode, without gradients.

    Args:
        source: as in `load_network`, of one of the kinds in `pbe_core.vae_kinds`; of TAEF2 the folder of its two files.

    Raises:
        InputError: as `load_network`; or a VAE of another kind, or a configuration that cannot be followed.
    """
    place = find_vae(source)
    if is_taef2(place):
        return Autoencoder(load_taef2(place).eval().requires_grad_(False))
    try:
        sizes = read_vae_sizes(place)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise InputError(f"{place / 'config.json'}: {cause}; get the file again, or give another VAE") from None
    return Autoencoder(_load(CLASSES[sizes.kind], source, place).eval().requires_grad_(False))


def load_network(kind: Any, source: str, subfolder: str) -> Any:
    """Load a network of diffusers or transformers in float32. Safetensors only, so that nothing that is loaded can run code.

    Args:
        kind: its class, with `from_pretrained`.
        source: a folder that holds the network, or a pipeline that has it in `subfolder`; or such a hub id (owner/name, or
            owner/name/folder). A relative folder is looked for here, then in the project's own tree.
        subfolder: where a pipeline keeps it.

    Raises:
        InputError: no such folder or hub id, the hub does not give it, or what is there is not such a network, or not finite.
    """
    return _load(kind, source, find_network(kind, source, subfolder))


def _load(kind: Any, source: str, inner: Path) -> Any:
    """The network whose files lie in a folder of this machine; `source` is what the user called it."""
    weights = weights_of([path.name for path in inner.iterdir()], without_pickles(_files_of(kind)))
    for name in weights:
        if name.endswith(".safetensors") and weights_format(inner / name) != "safetensors":
            raise InputError(f"{inner / name}: a pickle under the name of safetensors; get the model as .safetensors")
    # Half precision where there is nothing else, as a download with `variant="fp16"` leaves it.
    variant = "fp16" if weights and ".fp16" in weights[0] else None
    try:
        # Stored precision varies; computation and hashes start from float32.
        dtype = {"torch_dtype": torch.float32} if issubclass(kind, diffusers.ModelMixin) else {"dtype": torch.float32}
        network, loaded = kind.from_pretrained(
            str(inner), use_safetensors=True, output_loading_info=True, variant=variant, local_files_only=True, **dtype
        )
    except Exception as error:  # Whatever the libraries raise over a stranger's config.json and weights is the files' fault.
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{source}: cannot load a {kind.__name__} ({cause}); give a folder with config.json and .safetensors weights"
        ) from None
    # The libraries would fill missing tensors with random numbers, and not say so. Counts of training steps serve no computation.
    if missing := sorted(name for name in loaded["missing_keys"] if not name.endswith(COUNTERS)):
        raise InputError(f"{source}: {number_of(len(missing), 'tensor')} of the {kind.__name__} missing, first {missing[0]}")
    if left := _left_out(kind, network, loaded["unexpected_keys"]):
        raise InputError(
            f"{source}: {number_of(len(left), 'tensor')} that its config.json has no place for, first {left[0]}; get both files "
            "from one place"
        )
    check_finite(network.state_dict(), source)
    return network


def _left_out(kind: Any, network: Any, unexpected: Collection[str]) -> list[str]:
    """Tensors of this very network that its configuration leaves out, as one of fewer layers does: it would be another function.

    What files hold beside a network is no fault: CLIP's text model, a classifier.
    """
    if issubclass(kind, diffusers.ModelMixin):  # Nothing is beside these.
        return sorted(unexpected)
    parts = {name.partition(".")[0] for name in network.state_dict()}
    bare = {name: name.removeprefix(f"{kind.base_model_prefix}.").removeprefix(VISION_PREFIX) for name in unexpected}
    return sorted(key for key, name in bare.items() if name.partition(".")[0] in parts and not name.endswith(BUFFERS))


def find_network(kind: Any, source: str, subfolder: str, beside: Collection[str] = ()) -> Path:
    """The folder with the config.json and the weights of a network, on this machine; `locate_network` for its class."""
    return locate_network(kind.__name__, source, subfolder, _files_of(kind), beside)


def _files_of(kind: Any) -> tuple[str, ...]:
    """Names for the weights of a network of this class."""
    return DIFFUSERS_FILES if issubclass(kind, diffusers.ModelMixin) else TRANSFORMERS_FILES


def identify_vae(vae: Autoencoder, source: str) -> VaeIdentity:
    """What `dataset.json` says of a VAE, so that the trainer can tell whether it has the same one."""
    return VaeIdentity(
        source=source,
        sha256=weights_sha256(vae.state_dict()),
        config=json.loads(json.dumps(vae.config)),  # As JSON has it.
        scaling_factor=vae.sizes.scaling_factor,
        latent_channels=vae.sizes.latent_channels,
        downsampling=vae.sizes.downsampling,
        kind=vae.sizes.kind,
        deterministic=vae.sizes.deterministic,
        normalisation=vae.normalisation,
    )
