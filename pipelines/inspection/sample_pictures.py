"""Pictures of a sample's parts: photo with box and window, view, reference, decoded latents; and all of them in one picture.

Functions that decode latents load PyTorch and diffusers, which takes seconds; the others do without.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float16, UInt8

from pbe_core.errors import InputError
from pbe_core.images.crop import Rectangle, Window, cut_view
from pbe_core.images.decode import PhotoError, decode_photo
from pbe_core.images.sheets import PINK, WHITE, Colour, Picture, frame, outline, sheet, tint
from pbe_core.sample_codec import Sample
from pipelines.config import SourceSettings
from pipelines.dataset.samples import decode_segmentation
from pipelines.photos import read_photo
from schemas.dataset import DatasetInfo
from schemas.sample import SampleRecord

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def photo_source(info: DatasetInfo, photos: Path | None = None) -> SourceSettings:
    """Where a dataset's photos are: where the build had them, or in another photo folder or photo store."""
    told = info.settings["source"]
    if photos is None or str(photos) == told["photos"]:
        return SourceSettings(**told)
    return SourceSettings(**{**told, "photos": photos})


def photos_of(samples: Sequence[Sample], info: DatasetInfo, photos: Path) -> Iterator[Picture]:
    """The photo of each sample, one after the other, turned as the sample was cut from it.

    Raises:
        InputError: a photo is not there any more, or cannot be decoded.
    """
    source = photo_source(info, photos)
    for sample in samples:
        try:
            photo, _ = read_photo(sample.record.model_dump(), source)
        except PhotoError as error:
            raise InputError(f"{photos}: photo {sample.record.photo_id} of the dataset cannot be shown: {error}") from None
        yield photo


def cut_recorded_view(photo: Picture, sample: Sample) -> UInt8[np.ndarray, "size size 3"]:
    """The view of a sample, cut from its photo once more, to be looked at: antialiased, whatever `views.resize` was."""
    return cut_view(photo, Window(*sample.record.window), sample.masks.shape[-1])


def photo_with_box(photo: Picture, record: SampleRecord) -> Picture:
    """The photo with the box (pink) and the view's window (white)."""
    return frame(frame(photo, Window(*record.window).rectangle().pixels(), WHITE), Rectangle(*record.box).pixels())


def view_with_box(view: Picture, record: SampleRecord, colour: Colour = PINK) -> Picture:
    """The view with the box."""
    return frame(view, Rectangle(*record.box_in_view).pixels(), colour)


def view_with_mask(view: Picture, sample: Sample, number: int) -> Picture:
    """The view with one of its masks (pink) and the box (white)."""
    return view_with_box(tint(view, sample.masks[number]), sample.record, WHITE)


def reference_with_outline(sample: Sample) -> Picture:
    """The reference with the outline of the object's own pixels, where these are known."""
    reference = decode_photo(sample.reference, frame="stored")
    counts = sample.record.reference_mask
    if counts is None:
        return reference
    return outline(reference, decode_segmentation(counts, reference.shape[1], reference.shape[0]))


def trace_sheet(sample: Sample, photo: Picture | None, decoded: Sequence[Picture] = ()) -> Picture:
    """All parts of a sample in one picture.

    Args:
        sample: the sample.
        photo: the one that it was cut from, as it was turned; its part is left out where it is not there.
        decoded: latent.npy, then masked.npy as the VAE decodes them; left out where there are none.
    """
    record = sample.record
    parts: list[tuple[str, Picture]] = []
    views: list[tuple[str, Picture]] = []
    if photo is not None:
        parts.append(("photo: box, window", photo_with_box(photo, record)))
        views.append(("view, cut from the photo", cut_recorded_view(photo, sample)))
    if sample.view is not None:
        views.append(("view.jpg", decode_photo(sample.view, frame="stored")))
    if decoded:
        views.append(("latent.npy, decoded", decoded[0]))
    outlined = ", outlined" if record.reference_mask is not None else ""
    parts += [*views, (f"ref.jpg{outlined}", reference_with_outline(sample))]
    rows, captions = [parts], [f"{record.key}  {record.label_name}  {record.split}"]
    for number, (kind, mask) in enumerate(zip(record.mask_kinds, sample.masks, strict=True)):
        row: list[tuple[str, Picture]] = [("mask.json", np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255)]
        if views:
            row.append((f"{views[0][0]}: box, region", view_with_mask(views[0][1], sample, number)))
        if decoded:
            row.append(("masked.npy, decoded", decoded[1 + number]))
        rows.append(row)
        captions.append(f"mask {number}: {kind}, {mask.mean():.0%} of the view")
    return sheet(
        [[picture for _, picture in row] for row in rows],
        captions=captions,
        titles=[[title for title, _ in row] for row in rows],
        cell=min(512, max(256, sample.masks.shape[-1])),
    )


def load_recorded_vae(info: DatasetInfo, source: str | None = None) -> "AutoencoderKL":
    """The VAE that made a dataset's latents.

    Args:
        info: of the dataset.
        source: folder or hub id, where the VAE is not any more where the build had it.

    Raises:
        InputError: it cannot be loaded, or has other weights than the one that made the latents.
    """
    from pbe_core.vae import load_vae, weights_sha256

    chosen = source or info.vae.source
    try:
        vae = load_vae(chosen)
    except InputError as error:
        raise InputError(f"{error}; give the dataset's VAE with --vae") from None
    found = weights_sha256(vae.state_dict())
    if found != info.vae.sha256:
        raise InputError(
            f"{chosen}: the weights of this VAE have the hash {found[:12]}..., those that made the latents "
            f"{info.vae.sha256[:12]}...; give the dataset's VAE with --vae"
        )
    return vae


def decode_means(
    vae: "AutoencoderKL", posteriors: Float16[np.ndarray, "pictures two_channels height width"]
) -> list[UInt8[np.ndarray, "size size 3"]]:
    """What the VAE makes of the means of posteriors (mean, then standard deviation; unscaled). RGB, 0-255."""
    import torch

    means = torch.from_numpy(posteriors[:, : posteriors.shape[1] // 2].astype(np.float32))
    with torch.inference_mode():
        # One at a time: a picture of 512 px takes Stable Diffusion's decoder more than a GB.
        decoded = [vae.decode(mean[None]).sample[0] for mean in means]
    return [((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy() for pixels in decoded]


def views_of(samples: Sequence[Sample], info: DatasetInfo, vae: str | None = None) -> list[Picture]:
    """The view of each sample without its photo: view.jpg where the dataset keeps it, else decoded from its latent.

    Args:
        samples: of one dataset.
        info: of the dataset.
        vae: where its VAE is, if not where the build had it.

    Raises:
        InputError: latents must be decoded, and the VAE is not there or another one.
    """
    decoder = load_recorded_vae(info, vae) if any(sample.view is None for sample in samples) else None
    return [
        decode_means(decoder, sample.latent[None])[0] if sample.view is None else decode_photo(sample.view, frame="stored")
        for sample in samples
    ]
