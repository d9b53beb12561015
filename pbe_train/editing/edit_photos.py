"""Editing photos with a trained model: cut a square around each region, paint, paste."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8

from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.crop import Window, cut_mask, cut_view, paste, resize
from pbe_train.data.latents import to_tensor
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
    views = np.stack([cut_view(photo, window, size) for photo, window in zip(photos, windows, strict=True)])
    view_masks = np.stack([cut_mask(mask, window, size) for mask, window in zip(masks, windows, strict=True)])
    pixels = to_tensor(views).float() / 127.5 - 1
    # Mid grey, 0 in [-1, 1]: what the masked images of the training show where the mask is 1.
    pixels[torch.from_numpy(view_masks)[:, None].expand_as(pixels)] = 0

    def pasted(painted: UInt8[np.ndarray, "batch size size 3"]) -> list[AnyPhoto]:
        return [
            paste(photo, resize(view, window.side, window.side), mask if blend else None, window)
            for photo, view, mask, window in zip(photos, painted, masks, windows, strict=True)
        ]

    def watch_views(step: int, of: int, foreseen: Callable[[], UInt8[np.ndarray, "batch size size 3"]]) -> None:
        assert watch
        watch(step, of, lambda: pasted(foreseen()))

    return pasted(run.paint(run.encode_pixels(pixels), view_masks, references, seeds, how, watch_views if watch else None))


def choose_window(mask: AnyMask) -> Window:
    """The square to repaint a region in: twice as long as the region, as in training, where a region fills about half a view.

    It is never longer than the photo's short side, unless the region itself is, and lies inside the photo where it can.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    longest = max(bottom - top, right - left)
    side = max(longest, min(2 * longest, height, width))
    return Window(_start(left, right, side, width), _start(top, bottom, side, height), side)


def _start(first: int, last: int, side: int, length: int) -> int:
    """Start of a stretch of `side` px centred on [first, last), moved inside [0, length) or, if longer than that, around it."""
    start = (first + last - side) // 2
    if side > length:
        return (length - side) // 2
    return min(max(start, 0), length - side)
