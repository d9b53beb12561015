"""Two nodes of ComfyUI over the library: one loads a model, one paints references into the masked regions of photos.

    model folder or hub id ──Loader──▶ PBE_MODEL ─┐
    IMAGE photos, MASK, IMAGE references ─────────┴─Edit──▶ IMAGE

ComfyUI's pictures are tensors [batch, height, width, 3] of floats, 0-1; its masks [batch, height, width], 1 = repaint, as here.
Torch and diffusers are loaded when a node first runs: ComfyUI waits for the imports of all nodes when it starts.
"""

from typing import TYPE_CHECKING, Any

from pbe_train.model.sampling import GUIDANCE, SCHEDULER, STEPS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from pbe_train import PaintByExample
    from pbe_train.editing.paint_by_example import Preview

MODEL = "PBE_MODEL"
# Of those that the library takes, its default and the usual ones.
SCHEDULERS = [
    SCHEDULER,
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
]


class PaintByExampleLoader:
    """A model, kept by ComfyUI until an input changes."""

    CATEGORY, FUNCTION = "Paint by Example", "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """What ComfyUI asks for."""
        told = "folder of a run or an export, a .ckpt, or a hub id; empty: the tiny world's small model"
        return {
            "required": {
                "source": ("STRING", {"default": "", "tooltip": told}),
                "precision": (["fp32", "fp16", "bf16"],),
                "device": (["auto", "cpu", "cuda"], {"tooltip": "auto: the first GPU, else the CPU"}),
                "offload": ("BOOLEAN", {"default": False, "tooltip": "on the GPU only the network that works: for small GPUs"}),
            }
        }

    def load(self, source: str, precision: str, device: str, offload: bool) -> tuple["PaintByExample"]:
        """The model. Raises InputError, which ComfyUI shows: no such model or device."""
        from importlib.resources import files

        from pbe_train import PaintByExample

        named = source.strip() or str(files("tiny_world").joinpath("weights/model"))
        there = None if device == "auto" else device
        return (PaintByExample.from_pretrained(named, precision=precision, device=there, offload=offload),)  # type: ignore[arg-type]


class PaintByExampleEdit:
    """Photos with the masked regions repainted; all other values stay bit for bit as they came."""

    CATEGORY, FUNCTION = "Paint by Example", "edit"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("edited",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """What ComfyUI asks for."""
        return {
            "required": {
                "model": (MODEL,),
                "photo": ("IMAGE",),
                "mask": ("MASK", {"tooltip": "of the photo's size; one for all photos, or one each"}),
                "reference": ("IMAGE", {"tooltip": "the object, cropped closely; a batch is several pictures of one object"}),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**64 - 1, "tooltip": "of the first photo; the next has the next"},
                ),
                "guidance": ("FLOAT", {"default": GUIDANCE, "min": 1.0, "max": 30.0, "step": 0.1}),
                "steps": ("INT", {"default": STEPS, "min": 1, "max": 1000}),
                "scheduler": (SCHEDULERS,),
            }
        }

    def edit(
        self, model: "PaintByExample", photo: "Tensor", mask: "Tensor", reference: "Tensor",
        seed: int, guidance: float, steps: int, scheduler: str,
    ) -> tuple["Tensor"]:  # fmt: skip
        """The edited photos, [batch, height, width, 3], 0-1.

        Raises:
            InputError: what does not fit together; ComfyUI shows its sentence.
            InterruptProcessingException: ComfyUI's, once somebody has pressed cancel.
        """
        import numpy as np
        import torch

        from pbe_core.errors import InputError

        masks = mask.cpu().float().reshape(-1, *mask.shape[-2:])  # Some nodes give one mask without its batch.
        if len(masks) not in (1, len(photo)):
            raise InputError(f"{len(masks)} masks for {len(photo)} photos: give one for all, or one each")
        masks = masks.expand(len(photo), -1, -1)
        photos, references = pictures(photo), pictures(reference)
        follow = watch(len(photos))
        edited = []
        for number, (one, region) in enumerate(zip(photos, masks.numpy(), strict=True)):
            how = {"seed": (seed + number) % 2**64, "guidance": guidance, "steps": steps, "scheduler": scheduler}
            painted = model(one, region, references, callback=lambda now, number=number: follow(number, now), **how)
            edited.append(torch.from_numpy(np.array(painted, np.float32) / 255))
        # Other nodes' pictures have finer values than 8 bits.
        return (torch.where(masks[..., None] > 0.5, torch.stack(edited), photo.cpu().float()),)


def pictures(batch: "Tensor") -> list["np.ndarray"]:
    """The library's pictures, uint8 [height, width, 3], of a batch of ComfyUI's; pictures of 8 bits come through as they were."""
    return list((batch.cpu().float().clamp(0, 1) * 255).round().byte().numpy())


def watch(photos: int) -> Any:
    """What is called after each step with a photo's number: moves ComfyUI's progress bar on, and heeds its cancel button."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:  # Outside ComfyUI, as in the tests.
        return lambda number, now: None
    bar = ProgressBar(photos)

    def follow(number: int, now: "Preview") -> None:
        throw_exception_if_processing_interrupted()
        bar.update_absolute(number * now.steps + now.step, photos * now.steps)

    return follow


NODE_CLASS_MAPPINGS = {"PaintByExampleLoader": PaintByExampleLoader, "PaintByExampleEdit": PaintByExampleEdit}
NODE_DISPLAY_NAME_MAPPINGS = {"PaintByExampleLoader": "Load Paint by Example", "PaintByExampleEdit": "Paint by Example"}
