"""Editing photos with a trained model: cut a square around each region, paint, paste."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8

from pbe_core.images import AnyPhoto
from pbe_train.data.latents import to_tensor
from pbe_train.editing.region import AnyMask, choose_window, cut, cut_mask, paste, resize, resize_mask
from pbe_train.model.pipeline import References, Run, SamplingSettings


def edit(
    run: Run,
    photos: Sequence[AnyPhoto],
    masks: Sequence[AnyMask],
    references: Sequence[References],
    seeds: Sequence[int],
    how: SamplingSettings,
    *,
    size: int | None = None,
    blend: bool = True,
    watch: Callable[[int, int, Callable[[], list[AnyPhoto]]], None] | None = None,
) -> list[AnyPhoto]:
    """Paint references into photos.

    Args:
        run: a loaded run.
        photos: RGB, 0-255, any sizes.
        masks: True = repaint; each of its photo's size and not empty.
        references: RGB, 0-255, any sizes; for a photo several, if they show the same object.
        seeds: one per photo; a result depends on its own seed, not on what else is painted with it.
        how: guidance, steps, scheduler.
        size: side of the view the model works at; the trained one by default.
        blend: keep every byte outside the mask; otherwise the whole square around the region comes from the model.
        watch: called after each denoising step with its number, from 1, of how many, and a function that makes the photos as the
            model then expects them to become. That takes the VAE's decoder; who does not call it does not pay.
    """
    size = size or run.identity.view_size
    windows = [choose_window(mask) for mask in masks]
    views = np.stack([resize(cut(photo, window), size) for photo, window in zip(photos, windows, strict=True)])
    holes = np.stack([resize_mask(cut_mask(mask, window), size) for mask, window in zip(masks, windows, strict=True)])
    pixels = to_tensor(views).float() / 127.5 - 1
    # Mid grey, 0 in [-1, 1]: what the masked views of the training show in their region.
    pixels[torch.from_numpy(holes)[:, None].expand_as(pixels)] = 0

    def pasted(painted: UInt8[np.ndarray, "batch size size 3"]) -> list[AnyPhoto]:
        return [
            paste(photo, resize(view, window.side), mask if blend else None, window)
            for photo, view, mask, window in zip(photos, painted, masks, windows, strict=True)
        ]

    def watch_views(step: int, of: int, foreseen: Callable[[], UInt8[np.ndarray, "batch size size 3"]]) -> None:
        assert watch
        watch(step, of, lambda: pasted(foreseen()))

    return pasted(run.paint(run.encode_pixels(pixels), holes, references, seeds, how, watch_views if watch else None))
