"""An edit as diffusers' PaintByExamplePipeline makes it: started by `edit_latency`, with a Python that has diffusers 0.36.

python edit_latency_peer.py JSON      # configurations of U-Net, encoder and VAE, view_px, threads; prints a JSON

Nothing of this project is imported: the other Python need not have it.
"""

import itertools
import json
import resource
import sys
import time

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.paint_by_example.image_encoder import PaintByExampleImageEncoder
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig


def main() -> None:
    """Make the pipeline with random weights, edit once, say how long it took."""
    given = json.loads(sys.argv[1])
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    encoder = PaintByExampleImageEncoder(CLIPVisionConfig(**given["clip"]), given["unet"]["cross_attention_dim"])
    # As the released model's configuration has it.
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    side = given["clip"]["image_size"]
    pipeline = PaintByExamplePipeline(
        vae=AutoencoderKL.from_config(given["vae"]),
        image_encoder=encoder.eval(),
        unet=UNet2DConditionModel.from_config(given["unet"]).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    px, noise = given["view_px"], np.random.default_rng(0)
    photo, reference = (Image.fromarray(noise.integers(0, 256, (px, px, 3), np.uint8)) for _ in range(2))
    mask = np.zeros((px, px), np.uint8)
    mask[px // 4 : -px // 4, px // 4 : -px // 4] = 255
    rows = []
    pipeline.unet.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    began, ends = time.perf_counter(), []
    pipeline(
        example_image=reference,
        image=photo,
        mask_image=Image.fromarray(mask),
        height=px,
        width=px,
        callback=lambda *_: ends.append((time.perf_counter(), sum(rows))),
        **({"num_inference_steps": given["few"]} if given["few"] else {}),
    )
    seconds = time.perf_counter() - began
    told = {
        "seconds": seconds,
        "steps": [(end - start, after - before) for (start, before), (end, after) in itertools.pairwise(ends)],
        "passes": sum(rows),
        "all_passes": 102,  # 50 steps, the second one made twice, of two passes each.
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    told["versions"]["transformers"] = transformers.__version__
    print(json.dumps(told))


if __name__ == "__main__":
    main()
