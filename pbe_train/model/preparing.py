"""How the networks lie in memory and are run on a device. Nothing here changes what is computed, but for rounding."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pbe_train.config import ModelSettings
from pbe_train.model.paint_model import PaintByExampleModel


def prepare(model: PaintByExampleModel, settings: ModelSettings, device: torch.device) -> PaintByExampleModel:
    """The same model, on the device, in the layout and with the kernels that the settings ask for.

    Call it before the optimizer is made and before the model is wrapped for many ranks. Compilation is in place and happens at
    the first call: parameters keep their names. What was compiled once is taken from torch's cache on disk, whose place
    (TORCHINDUCTOR_CACHE_DIR) stays the user's. Each other shape of a batch is compiled anew; what is rarely called, such as
    painting during training, should be inside `uncompiled()`.
    """
    model.to(device)
    if settings.channels_last:
        # Only weights with four dimensions have this layout; activations follow the weights of the first convolution.
        model.unet.to(memory_format=torch.channels_last)
    # PyTorch prefers cuDNN's attention on Hopper, whose backward pass is reported to give NaN; flash attention takes its place.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if settings.compile:
        model.unet.compile(dynamic=False)
        model.conditioner.compile(dynamic=False)
    return model


def uncompiled() -> AbstractContextManager[object]:
    """Inside this block, a compiled model runs as if it were not, and nothing is compiled."""
    # Dynamo is imported by this call; a process that compiled nothing has no need of it.
    block: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return block


@torch.no_grad()
def laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the device of `parameter` and in its memory layout.

    For moments that are put back into an optimizer: files hold them contiguous, and a fused AdamW pairs the elements of parameter
    and moment by their places in memory, so that in another layout it would take the wrong ones, without a word.
    """
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
