"""One prediction of a denoising step: what the model says of the reference, away from what it says without one."""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pbe_core.errors import InputError
from pbe_train.model.edit_passes import Condition, both, fixed_condition, fixed_planes, last_layers, passes_apart, whole_pass
from pbe_train.model.paint_model import PaintByExampleModel


@cache
def _compiled(one: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(one, dynamic=False)


class Guided:
    """The model's predictions for some edits that are painted together, step after step.

    Args:
        model: in eval mode.
        masked: masked-image latents, scaled.
        mask_channel: 1 - mask.
        condition: tokens of the references.
        reuse: every so-many-th step goes through the whole U-Net; those between take its deep features as they were.
        exact: each pass is diffusers' own, alone, as it always was: twice the time, and the same bits as then.
    """

    def __init__(
        self,
        model: PaintByExampleModel,
        masked: Float[Tensor, "batch channels height width"],
        mask_channel: Float[Tensor, "batch 1 height width"],
        condition: Float[Tensor, "batch tokens features"],
        reuse: int = 1,
        exact: bool = False,
    ) -> None:
        self.model, self.masked, self.mask_channel, self.condition = model, masked, mask_channel, condition
        self.nothing = model.conditioner.uncond_vector.to(condition).expand_as(condition)
        self.apart = not exact and passes_apart(getattr(model, "unet", None), masked.shape[-2], masked.shape[-1])
        compiled = getattr(model, "compiled_edits", False)
        if (reuse > 1 or compiled) and not (exact or self.apart):
            asked = "compile" if compiled else f"reuse {reuse}"
            rows, columns = masked.shape[-2:]
            raise InputError(
                f"{asked}: this works with U-Nets in Stable Diffusion's layout and latents that all of its levels halve, and "
                f"neither may be so here ({type(model.unet).__name__}, {columns}x{rows}); leave it out, or give another size"
            )
        self.reuse = reuse
        self.age = 0
        """Passes since the deep features were computed."""
        self.deep: Tensor | None = None

    def __call__(
        self, noisy: Float[Tensor, "batch channels height width"], time: Shaped[Tensor, ""], guidance: float
    ) -> Float[Tensor, "batch channels height width"]:
        """What is predicted at a timestep: `null + guidance * (condition - null)`, in fp32.

        Args:
            noisy: latents with noise, scaled as the model takes them.
            time: the timestep of all of them; some samplers stop between two whole ones.
            guidance: 1 = the condition alone, which costs half.
        """
        time = time.to(noisy.device)
        if guidance == 1:
            return self._predict(noisy, time, guided=False)
        predicted, without = self._predict(noisy, time, guided=True).chunk(2)
        return without + guidance * (predicted - without)

    def _predict(self, noisy: Tensor, time: Tensor, guided: bool) -> Tensor:
        """What is predicted under the condition; and then, where guided, without one."""
        if not self.apart:
            under = [self.condition, self.nothing] if guided else [self.condition]
            times = time.expand(len(noisy))
            given = (noisy, self.masked, self.mask_channel, times)
            return torch.cat([self.model.predict(*given, each).float() for each in under])
        through = (self.model.unet, noisy, self._planes, time[None], self._both if guided else self._alone)
        count = len(noisy) * (1 + guided)
        if self.deep is not None and self.age < self.reuse and len(self.deep) >= count:
            # Those under the condition come first, and are enough where guidance ends.
            predicted: Tensor = self._made(last_layers)(*through, self.deep[:count])
        else:
            predicted, deep = self._made(whole_pass)(*through)
            self.deep, self.age = (deep if self.reuse > 1 else None), 0
        self.age += 1
        return predicted.float()

    def _made(self, one: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(one) if self.model.compiled_edits else one

    @cached_property
    def _planes(self) -> Tensor:
        return fixed_planes(self.model.unet, self.masked, self.model.seen_mask(self.mask_channel))

    @cached_property
    def _alone(self) -> Condition:
        return fixed_condition(self.model.unet, self.condition)

    @cached_property
    def _both(self) -> Condition:
        return both(self._alone, fixed_condition(self.model.unet, self.nothing))
