"""One face for every kind of VAE: callers see pixels in [-1, 1] and latents, and never ask which class is behind them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pbe_core.errors import InputError
from pbe_core.taef2 import Taef2
from pbe_core.vae_kinds import AUTOENCODER_DC, AUTOENCODER_TINY, KINDS, QWEN, TAEF2, TAEF2_CONFIG, VaeSizes, vae_sizes
from schemas.dataset import Normalisation

CLASSES: dict[str, Any] = {kind: Taef2 if kind == TAEF2 else getattr(diffusers, kind) for kind in KINDS}


class Posterior(NamedTuple):
    """What a picture may be in latents: normalised, not scaled."""

    mean: Float[Tensor, "batch channels h w"]
    deviation: Float[Tensor, "batch channels h w"] | None
    """Null for a deterministic VAE: the mean is all."""

    def stacked(self) -> Float[Tensor, "batch stored h w"]:
        """As shards hold it: the mean, then the deviation where there is one."""
        return self.mean if self.deviation is None else torch.cat([self.mean, self.deviation], dim=1)


class Autoencoder:
    """A VAE, whichever class it is.

    Its latents are the network's own as `normalisation` changes them: that of the configuration, or the one recorded with a
    dataset or run (`normalise`). Times the scaling factor they are what a diffusion model sees.

    Args:
        network: of one of `CLASSES`.

    Raises:
        InputError: another class, or a configuration that cannot be followed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        kind = next((name for name, known in CLASSES.items() if type(network) is known), type(network).__name__)
        try:
            self.sizes = vae_sizes(kind, getattr(network, "config", TAEF2_CONFIG))
        except ValueError as error:
            raise InputError(f"the config of this VAE: {error}") from None
        self.normalisation = self.sizes.normalisation

    @classmethod
    def unloaded(cls, sizes: VaeSizes) -> "Autoencoder":
        """One of these sizes with random weights, on torch's default device."""
        network: nn.Module = Taef2() if sizes.kind == TAEF2 else CLASSES[sizes.kind].from_config(dict(sizes.config))
        return cls(network.eval().requires_grad_(False))

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's, without what diffusers notes about versions and places."""
        own = getattr(self.network, "config", TAEF2_CONFIG)
        return {name: value for name, value in sorted(own.items()) if not name.startswith("_")}

    def normalise(self, recorded: Normalisation | None) -> "Autoencoder":
        """Take the normalisation that a dataset or run was made with, whatever the configuration says now."""
        self.normalisation = recorded
        return self

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Posterior:
        """RGB in [-1, 1], sides multiples of `sizes.downsampling` -> latents, unscaled."""
        mean, deviation = self._encode(pixels)
        if self.normalisation is None:
            return Posterior(mean, deviation)
        shift, spread = _planes(self.normalisation, mean)
        return Posterior((mean.float() - shift) / spread, None if deviation is None else deviation.float() / spread)

    def _encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor | None]:
        """The network's own mean and, if it has one, deviation."""
        kind = self.sizes.kind
        if kind == AUTOENCODER_TINY:
            return self.network.encode(pixels).latents, None
        if kind == AUTOENCODER_DC:
            return self.network.encode(pixels).latent, None
        if kind == TAEF2:
            return self.network.encode((pixels + 1) / 2), None
        if kind == QWEN:  # A picture is a film of one frame.
            frame = self.network.encode(pixels[:, :, None]).latent_dist
            return frame.mean[:, :, 0], frame.std[:, :, 0]
        own = self.network.encode(pixels).latent_dist
        return own.mean, own.std

    def decode(self, latents: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Latents, unscaled -> RGB in [-1, 1], not clamped."""
        if self.normalisation is not None:
            shift, spread = _planes(self.normalisation, latents)
            latents = (latents.float() * spread + shift).to(latents.dtype)
        if self.sizes.kind == TAEF2:
            return self.network.decode(latents) * 2 - 1  # type: ignore[no-any-return]
        if self.sizes.kind == QWEN:
            return self.network.decode(latents[:, :, None]).sample[:, :, 0]  # type: ignore[no-any-return]
        return self.network.decode(latents).sample  # type: ignore[no-any-return]

    def halves(self) -> list[list[nn.Module | None]]:
        """The networks that `encode` calls, and those that `decode` calls."""
        first, last = (getattr(self.network, name, None) for name in ("quant_conv", "post_quant_conv"))
        return [[self.network.encoder, first], [last, self.network.decoder]]

    def compile_encoder(self, shapes: int = 1) -> None:
        """Leave the encoder to torch.compile, which makes a program for each of so many shapes of pictures."""
        allow_programs(shapes)
        self.network.encoder.compile(dynamic=False)

    def to(self, *args: Any, **options: Any) -> "Autoencoder":
        """Move or cast the network in place, as `nn.Module.to` does; kernels of films have no layout but their own."""
        if self.sizes.kind == QWEN:
            options.pop("memory_format", None)
        self.network.to(*args, **options)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's."""
        yield from self.network.parameters()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def state_dict(self) -> dict[str, Tensor]:
        """The network's tensors under its own names."""
        tensors: dict[str, Tensor] = self.network.state_dict()
        return tensors


def _planes(normalisation: Normalisation, like: Tensor) -> tuple[Float[Tensor, "channels 1 1"], Float[Tensor, "channels 1 1"]]:
    shift, spread = (
        torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]
        for values in (normalisation.shift, normalisation.spread)
    )
    return shift, spread


def allow_programs(shapes: int) -> None:
    """Let torch.compile make a program for each of so many shapes: after eight it gives up, and runs the others uncompiled."""
    if shapes > 1:
        import torch._dynamo.config as limits  # Takes seconds, which who compiles nothing need not wait.

        # With gradients and without, and some that are none of ours.
        limits.recompile_limit = max(limits.recompile_limit, 2 * shapes + 8)
