"""The editing library: `PaintByExample.from_pretrained(model)(image, mask, reference)`.

    image, mask, reference ──read──▶ arrays ──cut a window around the region──▶ view ──paint──▶ view ──paste──▶ edited photo

Files, Pillow's pictures and arrays go in, Pillow's pictures come out: RGB of 8 bits, with the photo's colour profile. Every byte
outside the mask is the photo's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from pbe_core.buckets import Form, Shape, by_shape
from pbe_core.errors import InputError
from pbe_core.images import AnyMask, AnyPhoto
from pbe_core.images.crop import Size, Window, cut_mask, cut_view, paste, resize
from pbe_train.checkpoints.from_pretrained import load_model
from pbe_train.checkpoints.lora_merge import AnyLora, MergedLora, merge_loras
from pbe_train.data.latents import to_tensor
from pbe_train.editing.placing import check_compiler, choose_way, find_device, place
from pbe_train.editing.reading import Picture, check_mask, read_mask, read_photo, whole_number, with_profile
from pbe_train.editing.speed import PLAIN, TYPES, Precision, Way
from pbe_train.model.pipeline import References, Run, SamplingSettings, check_guidance, check_size
from pbe_train.model.sampling import (
    EVERYWHERE,
    GUIDANCE,
    PUBLISHED_SCHEDULER,
    PUBLISHED_STEPS,
    SCHEDULER,
    STEPS,
    check_interval,
    check_published,
)
from pbe_train.model.schedulers import Scheduler

# One for all edits, or one each; whole numbers of any kind.
Seeds = int | np.integer | Sequence[int | np.integer] | np.ndarray
# Called after each denoising step with its number, from 1, of how many, and a function that makes the photos as the model expects
# them to become.
Watch = Callable[[int, int, Callable[[], list[AnyPhoto]]], None]


@dataclass(frozen=True)
class Preview:
    """Where a call is."""

    step: int
    """Steps done, from 1."""
    steps: int
    """Of these edits; some schedulers take more than they are asked for."""
    first: int
    """Which edit of the call is the first of those that are painted together, from 0."""
    photos: Callable[[], list[Image.Image]]
    """Makes the photos as the model now expects them to become; takes the VAE's decoder."""


class PaintByExample:
    """A model that paints the object of a reference photo into a region of another photo.

    Args:
        run: the model and what belongs to it.
        loras: those that are in its weights, for who wants to know.
        way: the precision and layout that its networks are in.
        note: one line about it, for who looks on; null where there is nothing to say.
    """

    def __init__(self, run: Run, loras: Sequence[MergedLora] = (), way: Way = PLAIN, note: str | None = None) -> None:
        self.run = run
        self.loras = list(loras)
        self.way, self.note = way, note

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        weights: Literal["ema", "model"] = "ema",
        device: torch.device | str | None = None,
        precision: Precision | Literal["auto"] = "auto",
        channels_last: bool | None = None,
        prepacked: bool | None = None,
        compile: bool = False,
        offload: bool = False,
        loras: str | Path | Sequence[AnyLora] = (),
    ) -> "PaintByExample":
        """Load a model.

        Args:
            source: a run folder of train.py or one of its checkpoints; a Paint by Example model in diffusers' layout, as a folder
                or hub id; or a file in the original layout.
            weights: the moving average, where there is one, or the plain weights.
            device: by default the first GPU, else the CPU.
            precision: of the networks; `fp16` and `bf16` take half the memory. `auto` is what this machine edits fastest in,
                measured once for a kind of model (some seconds), and `fp32` for small models. Only `fp32` paints the same on
                every machine, but for rounding.
            channels_last: the layout of weights. By default that of `auto` is measured, too; that of `fp32` is another, and that
                of 16 bits is this.
            prepacked: on x86 CPUs, whether the U-Net's weights are packed for oneDNN: less time, and other rounding. By default
                as `channels_last`, and not with `compile`.
            compile: leave the passes to torch.compile, for GPUs: the first edit of each shape waits for a minute or more, those
                after it take less time. It needs a C++ compiler.
            offload: keep the networks in the CPU's memory, and on the GPU only the one that works: slower, for small GPUs.
            loras: LoRAs to add to its weights: each a file, a folder or a run of this trainer, with `:0.8` behind it or as a pair
                with a number for how strongly; 1 is as it was trained (docs/fine-tuning.md).

        Raises:
            InputError: there is no such model, or not a whole one; no such device, weights, precision or compiler; or a LoRA that
                is not there or not of this kind of model.
        """
        for name, value, known in (("weights", weights, ("ema", "model")), ("precision", precision, ("auto", *TYPES))):
            if value not in known:
                raise InputError(f"{name} {value!r}: give one of {', '.join(known)}")
        there = find_device(device)
        if compile:
            check_compiler(offload)
        run = load_model(source, weights, "cpu")
        # In fp32, and before they are cast: a LoRA may be smaller than what 16 bits tell apart.
        merged = merge_loras(run, [loras] if isinstance(loras, str | Path) else loras)
        way, note = choose_way(run, there, precision, channels_last, prepacked, compile)
        placed = place(run, there, way, offload)
        placed.model.compiled_edits = compile
        return cls(placed, merged, way, note)

    def check_exact(self, reuse: int = 1) -> None:
        """Refuse to paint the very pixels of the published way with networks that compute otherwise, or features that are kept.

        Raises:
            InputError: they are not in fp32, contiguous, unpacked and uncompiled, or features are to be kept.
        """
        if reuse != 1:
            raise InputError(f"exact published: no features are kept in it; leave reuse {reuse} out")
        if self.way != PLAIN or self.run.model.compiled_edits:
            told = f"{self.way}, compiled" if self.run.model.compiled_edits else str(self.way)
            raise InputError(f"exact published: the model computes in {told}; load it with precision fp32 alone, not compiled")

    def __call__(
        self,
        image: Picture | Sequence[Picture],
        mask: Picture | Sequence[Picture],
        reference: Picture | Sequence[Picture | Sequence[Picture]],
        *,
        seed: Seeds = 0,
        guidance: float = GUIDANCE,
        guidance_interval: Sequence[float] = EVERYWHERE,
        steps: int = STEPS,
        scheduler: Scheduler = SCHEDULER,
        exact_published: bool = False,
        size: Size | None = None,
        blend: bool = True,
        reuse: int = 1,
        batch_size: int = 1,
        callback: Callable[[Preview], object] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Edit a photo, or several.

        Args:
            image: a photo of any size, or a list of them: files, pictures of Pillow, or arrays.
            mask: white (True, 1.0, or 1 beside 0 alone) = repaint; of its photo's size; as many as there are photos.
            reference: what to paint, cropped closely around it; for each photo one. For one photo, a list is several references
                of one object, whose conditions are averaged; for several photos, each of their references may be such a list.
            seed: an edit depends on its own alone. One for all, or one each.
            guidance: how strongly to follow the reference; 1 = no guidance, in half the time.
            guidance_interval: where guidance works, as two shares of the schedule from 0 (noise) to 1 (the picture); a step
                elsewhere takes half the time.
            steps: of denoising.
            scheduler: of diffusers: the name of its class, a name with options, or an object whose options are to be kept.
            exact_published: paint as the published code does: PLMS of 50 steps that begins at timestep 981, guidance in each, in
                fp32. Goes with no other steps, scheduler or interval.
            size: at which the model works, px: the side of a square, or width and height. By default what it was trained at; of
                several shapes the one that is nearest to the photo's.
            blend: False also gives the window around the region as the model painted it.
            reuse: every so-many-th step goes through the whole U-Net, from 1; those between take its deep features as they were,
                which is faster and paints a little otherwise (docs/editing.md).
            batch_size: edits painted at once. More than one is faster on a GPU, and may change a result's last bit by rounding.
            callback: called after each step.

        Returns:
            A picture for a picture, a list for a list.

        Raises:
            InputError: something is missing, unreadable, or does not fit together; says which.
        """
        one = not isinstance(image, (list, tuple))
        images, masks, references, seeds = _listed(image, mask, reference, seed)
        sides = size if isinstance(size, tuple | list) else [1 if size is None else size]
        if len(sides) > 2:
            raise InputError(f"size {size}: give the side of a square, or width and height")
        for name, count in (("steps", steps), ("reuse", reuse), ("batch_size", batch_size), *(("size", side) for side in sides)):
            if whole_number(count, name) < 1:
                raise InputError(f"{name} {count}: must be 1 or more")
        size = (int(sides[0]), int(sides[1])) if len(sides) == 2 else size
        check_size(self.run, size)
        check_guidance(self.run, guidance)
        how = SamplingSettings(guidance, steps, scheduler, check_interval(guidance_interval), reuse)
        if exact_published:
            check_published(steps, scheduler, how.guidance_interval)
            self.check_exact(reuse)
            how = SamplingSettings(guidance, PUBLISHED_STEPS, PUBLISHED_SCHEDULER, exact=True)
        photos, regions, shown = _read(images, masks, references, one)
        edited: list[Image.Image] = []
        for first in range(0, len(photos), batch_size):

            def watch(step: int, of: int, made: Callable[[], list[AnyPhoto]], first: int = first) -> None:
                assert callback
                callback(Preview(step, of, first, lambda: [Image.fromarray(photo) for photo in made()]))

            part = slice(first, first + batch_size)
            given = photos[part], regions[part], shown[part], seeds[part]
            painted = edit(self.run, *given, how, size=size, blend=blend, watch=watch if callback else None)
            edited += [with_profile(photo, source) for photo, source in zip(painted, images[part], strict=True)]
        return edited[0] if one else edited


def _read(
    images: list[Picture], masks: list[Picture], references: list[list[Picture]], one: bool
) -> tuple[list[AnyPhoto], list[AnyMask], list[list[AnyPhoto]]]:
    """Photos, masks and references as arrays, each decoded once. Raises InputError for what is unreadable or does not fit."""
    photos, regions, shown = [], [], []
    for number, (image, mask, group) in enumerate(zip(images, masks, references, strict=True)):
        image_name, mask_name, reference_name = (what if one else f"{what} {number}" for what in ("image", "mask", "reference"))
        photos.append(read_photo(image, image_name))
        regions.append(read_mask(mask, mask_name))
        files = (
            picture if isinstance(picture, (str, Path)) else name for picture, name in ((mask, mask_name), (image, image_name))
        )
        check_mask(regions[-1], photos[-1], *files)
        shown.append([read_photo(each, reference_name) for each in group])
    return photos, regions, shown


def _listed(
    image: Picture | Sequence[Picture],
    mask: Picture | Sequence[Picture],
    reference: Picture | Sequence[Picture | Sequence[Picture]],
    seed: Seeds,
) -> tuple[list[Picture], list[Picture], list[list[Picture]], list[int]]:
    """The same as lists of one length, with references as a list for each photo. Raises InputError where they are not as many."""
    images, masks, given = (list(each) if isinstance(each, (list, tuple)) else [each] for each in (image, mask, reference))
    # Of one photo, a list is several references of one object.
    groups = given if isinstance(image, (list, tuple)) else [given]
    references = [list(each) if isinstance(each, (list, tuple)) else [each] for each in groups]
    several = isinstance(seed, Sequence) or (isinstance(seed, np.ndarray) and seed.ndim > 0)
    seeds = [whole_number(each, "seed") for each in (seed if several else [seed] * len(images))]  # type: ignore[union-attr]
    counts = {"images": len(images), "masks": len(masks), "references": len(references), "seeds": len(seeds)}
    if len(set(counts.values())) > 1 or not images or not all(references):
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"{found}: give as many of each, and at least one")
    return images, masks, references, seeds  # type: ignore[return-value]


def edit(
    run: Run,
    photos: Sequence[AnyPhoto],
    masks: Sequence[AnyMask],
    references: Sequence[References],
    seeds: Sequence[int],
    how: SamplingSettings,
    *,
    size: Size | None = None,
    blend: bool = True,
    windows: Sequence[Window] | None = None,
    watch: Watch | None = None,
) -> list[AnyPhoto]:
    """Paint references into photos.

    Args:
        run: a loaded run.
        photos: RGB, 0-255, any sizes.
        masks: True = repaint; each of its photo's size and not empty.
        references: RGB, 0-255, any sizes; for a photo several, if they show the same object.
        seeds: one per photo; a result depends on its own seed, not on what else is painted with it.
        how: guidance, steps, scheduler.
        size: of the view the model works at; by default what it was trained at, nearest to each photo's shape.
        blend: keep every byte outside the mask; otherwise the whole window around the region comes from the model.
        windows: what to repaint the regions in; by default those of `choose_window`.
        watch: called after each denoising step; making the photos takes the VAE's decoder.
    """
    shapes = [run.identity.view_shape(photo.shape[1], photo.shape[0], size) for photo in photos]
    windows = windows or [choose_window(mask, shape) for mask, shape in zip(masks, shapes, strict=True)]
    groups = by_shape(shapes)
    if len(groups) > 1:

        def edit_some(places: list[int], watch: Watch | None) -> list[AnyPhoto]:
            return edit(
                run,
                [photos[place] for place in places],
                [masks[place] for place in places],
                [references[place] for place in places],
                [seeds[place] for place in places],
                how,
                size=shapes[places[0]],
                blend=blend,
                windows=[windows[place] for place in places],
                watch=watch,
            )

        return _edit_groups(photos, groups, edit_some, watch)
    shape = shapes[0]
    views = np.stack([cut_view(photo, window, shape) for photo, window in zip(photos, windows, strict=True)])
    view_masks = np.stack([cut_mask(mask, window, shape) for mask, window in zip(masks, windows, strict=True)])
    pixels = to_tensor(views).float() / 127.5 - 1
    # Mid grey, 0 in [-1, 1]: what the masked images of the training show where the mask is 1.
    pixels[torch.from_numpy(view_masks)[:, None].expand_as(pixels)] = 0

    def pasted(painted: UInt8[np.ndarray, "batch view_height view_width 3"]) -> list[AnyPhoto]:
        return [
            paste(photo, resize(view, window.width, window.height), mask if blend else None, window)
            for photo, view, mask, window in zip(photos, painted, masks, windows, strict=True)
        ]

    def watch_views(step: int, of: int, foreseen: Callable[[], UInt8[np.ndarray, "batch view_height view_width 3"]]) -> None:
        assert watch
        watch(step, of, lambda: pasted(foreseen()))

    return pasted(run.paint(run.encode_pixels(pixels), view_masks, references, seeds, how, watch_views if watch else None))


def _edit_groups(
    photos: Sequence[AnyPhoto],
    groups: list[list[int]],
    edit_some: Callable[[list[int], Watch | None], list[AnyPhoto]],
    watch: Watch | None,
) -> list[AnyPhoto]:
    """Photos whose views have several shapes: those of one shape together, group after group, each as so many steps more."""
    edited = list(photos)

    def with_group(places: list[int], made: list[AnyPhoto]) -> list[AnyPhoto]:
        new = dict(zip(places, made, strict=True))
        return [new.get(place, photo) for place, photo in enumerate(edited)]

    def watched(number: int, places: list[int]) -> Watch:
        def watch_group(step: int, of: int, made: Callable[[], list[AnyPhoto]]) -> None:
            assert watch
            watch(number * of + step, len(groups) * of, lambda: with_group(places, made()))

        return watch_group

    for number, places in enumerate(groups):
        edited = with_group(places, edit_some(places, watched(number, places) if watch else None))
    return edited


def choose_window(mask: AnyMask, shape: Shape = (1, 1)) -> Window:
    """The window to repaint a region in: twice as long as the region, as in training, where a region fills about half a view.

    It is never larger than the largest of its shape in the photo, unless the region itself is, and lies inside the photo where it
    can.

    Args:
        mask: True = repaint.
        shape: whose ratio of width to height the window has; by default a square's.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    form = Form(*shape)
    least = form.holding(right - left, bottom - top)
    wide, high = form.sides(max(least, min(2 * least, form.within(width, height))))
    return Window(_start(left, right, wide, width), _start(top, bottom, high, height), wide, high)


def _start(first: int, last: int, side: int, length: int) -> int:
    """Start of a stretch of `side` px centred on [first, last), moved inside [0, length) or, if longer than that, around it."""
    start = (first + last - side) // 2
    if side > length:
        return (length - side) // 2
    return min(max(start, 0), length - side)
