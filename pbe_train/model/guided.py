"""One prediction of a denoising step: what the model says of the reference, away from what it says without one."""

from jaxtyping import Float, Shaped
from torch import Tensor

from pbe_train.model.paint_model import PaintByExampleModel


class Guided:
    """The model's predictions for some edits that are painted together, step after step.

    Args:
        model: in eval mode.
        masked: masked-image latents, scaled.
        mask_channel: 1 - mask.
        condition: tokens of the references.
    """

    def __init__(
        self,
        model: PaintByExampleModel,
        masked: Float[Tensor, "batch channels height width"],
        mask_channel: Float[Tensor, "batch 1 height width"],
        condition: Float[Tensor, "batch tokens features"],
    ) -> None:
        self.model, self.masked, self.mask_channel, self.condition = model, masked, mask_channel, condition
        self.nothing = model.conditioner.uncond_vector.to(condition).expand_as(condition)

    def __call__(
        self, noisy: Float[Tensor, "batch channels height width"], time: Shaped[Tensor, ""], guidance: float
    ) -> Float[Tensor, "batch channels height width"]:
        """What is predicted at a timestep: `null + guidance * (condition - null)`, in fp32.

        Args:
            noisy: latents with noise, scaled as the model takes them.
            time: the timestep of all of them; some samplers stop between two whole ones.
            guidance: 1 = the condition alone, which costs half.
        """
        times = time.to(noisy.device).expand(len(noisy))
        predicted = self._under(self.condition, noisy, times)
        if guidance != 1:
            without = self._under(self.nothing, noisy, times)
            predicted = without + guidance * (predicted - without)
        return predicted

    def _under(self, condition: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        return self.model.predict(noisy, self.masked, self.mask_channel, times, condition).float()
