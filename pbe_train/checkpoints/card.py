"""The model card of an export: what the model is, how it was trained, what it may be used for, how it is loaded. Pure text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pbe_core.storage import is_url
from pbe_core.words import number_of
from pbe_train.checkpoints.load_report import GUESSED, OPEN_RAIL
from pbe_train.data.fitting import PADDING
from pbe_train.model.pipeline import Run

# As the original code writes down.
PUBLISHED_BLOCKS = 5

OLD_DIFFUSERS = """\
Older versions of diffusers load it in one line (tried with diffusers 0.36 and transformers 4.57):

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
```
"""
NEW_DIFFUSERS = """\
diffusers 0.38 and later keep the pipeline's class, but cannot find it by its name in `model_index.json`, here or in any other
folder. With this project installed:

```python
from pbe_train.checkpoints.pipeline_folder import load_diffusers_pipeline

pipeline = load_diffusers_pipeline("{folder}")
```
"""
ORIGINAL = """\
The original code of Paint by Example loads it as its own `model.ckpt` (`--ckpt {file}`); a .safetensors file with
`safetensors.torch.load_file` in the place of `torch.load(...)["state_dict"]`. This project starts from it with
`--model.pretrained {file}`.

Do not load it with diffusers' `from_single_file`, which takes it for Stable Diffusion inpainting (seen with diffusers
0.42.1): there the input channels have another order, and the mask has the opposite meaning.
"""
PADDING_REFERENCES = f"""\
```python
from PIL import Image, ImageOps

reference = Image.open("reference.jpg").convert("RGB")
reference = ImageOps.pad(reference, (max(reference.size),) * 2, color={PADDING})
```
"""
# Who shrinks a mask to latent resolution, and how: diffusers by nearest neighbour, the original code without antialias.
MASKS = {"diffusers": ("The pipeline", "nearest"), "ldm": ("The original code", "bilinear")}
PAINTING = """\
```python
edited = pipeline(image=photo, mask_image=mask, example_image=reference, guidance_scale=5.0).images[0]  # white = repaint
```

The photo's sides are multiples of 8, its mask has the same size; the model was trained at {size} px.
"""


def write_card(
    run: Run, weights: str, form: str, name: str, evaluations: Mapping[str, Any], start: Mapping[str, Any] | None
) -> str:
    """The text of README.md.

    Args:
        run: what was exported.
        weights: which of its weights: `ema` or `model`.
        form: `diffusers` or `ldm`.
        name: of the export's folder or file.
        evaluations: file name -> content of the run's evaluations.
        start: the run's start.json, if there is one.
    """
    licence = licence_of(run, start)
    loading = (OLD_DIFFUSERS + "\n" + NEW_DIFFUSERS).format(folder=name) + "\n" + PAINTING.format(size=run.identity.view_size)
    sections = [
        _front_matter(licence, form),
        "# Paint by Example\n",
        "Paints what a reference photo shows into a region of another photo (Yang et al., *Paint by Example*, CVPR 2023).\n",
        "## Loading\n\n" + (loading if form == "diffusers" else ORIGINAL.format(file=name)),
        "## Training\n\n" + _training(run, weights, start),
        "## Measured\n\n" + _measured(evaluations),
        "## Licence\n\n" + _licence_text(run, licence, bool((start or {}).get("licence_guessed"))),
        "## Differences to know of\n\n" + _differences(run, form),
        "## All settings\n\n```yaml\n" + yaml.safe_dump(run.settings.model_dump(mode="json"), sort_keys=False) + "```\n",
    ]
    return "\n".join(sections)


def read_evaluations(run_folder: Path) -> dict[str, Any]:
    """The evaluations that lie in a run folder (`evaluat*.json`), by file name."""
    found = {}
    for path in sorted(run_folder.glob("evaluat*.json")):
        try:
            found[path.name] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
    return found


def _front_matter(licence: str | None, form: str) -> str:
    content = {"license": licence or "other", "tags": ["paint-by-example", "image-to-image", "inpainting"]}
    library = {"library_name": "diffusers"} if form == "diffusers" else {}
    return "---\n" + yaml.safe_dump({**library, **content}, sort_keys=False) + "---\n"


def _training(run: Run, weights: str, start: Mapping[str, Any] | None) -> str:
    settings, identity = run.settings, run.identity
    pretrained = settings.model.pretrained
    origin = "from scratch" if not pretrained else f"from {pretrained}" + (f" ({start['kind']})" if start else "")
    dataset = settings.model_dump(mode="json")["dataset"]
    card = Path(dataset) / "README.md"
    rows = {
        "start": origin,
        "steps": f"{run.step:,} of {number_of(settings.global_batch, 'sample')}",
        "weights": "moving average" if weights == "ema" else "of the last step",
        "dataset": f"{dataset}, fingerprint `{identity.dataset_fingerprint}`",
        "dataset's card": str(card) if not is_url(dataset) and card.is_file() else "`README.md` of the dataset",
        "size": f"{identity.view_size} px",
        "condition": f"class token of {settings.model.encoder}, {number_of(settings.model.conditioner_blocks, 'block')}",
        "predicts": settings.prediction,
        "null condition": f"with probability {settings.condition_dropout:g}",
        "VAE": f"{settings.model.vae}, weights `{identity.vae_sha256[:12]}`",
        "vision encoder": f"{settings.model.encoder}, weights `{identity.encoder_sha256[:12]}`",
    }
    return "| what | |\n| --- | --- |\n" + "".join(f"| {what} | {value} |\n" for what, value in rows.items())


def _measured(evaluations: Mapping[str, Any]) -> str:
    if not evaluations:
        return "No evaluation lies in the run's folder.\n"
    parts = [f"`{name}`:\n\n```json\n{json.dumps(content, indent=1)}\n```\n" for name, content in evaluations.items()]
    return "\n".join(parts)


def licence_of(run: Run, start: Mapping[str, Any] | None) -> str | None:
    """The licence of what a run was made of; null where it is not known, or was made of nothing."""
    licence: str | None = start.get("licence") if start and run.settings.model.pretrained else None
    return licence


def _licence_text(run: Run, licence: str | None, guessed: bool) -> str:
    if licence == OPEN_RAIL:
        kind = (
            f"a model in the layout of Stable Diffusion 1.x (licence{GUESSED})"
            if guessed
            else "one of Stable Diffusion 1.x's line"
        )
        return (
            f"The start was {kind}. Stable Diffusion 1.x and\n"
            "Paint by Example are under CreativeML Open RAIL-M, which goes\n"
            "with everything derived from them: use and sharing are free, its restrictions (attachment A) must be passed on.\n"
        )
    networks = f"vision encoder ({run.settings.model.encoder}) and VAE ({run.settings.model.vae}) in it have their own"
    if run.settings.model.pretrained is None:
        return f"Trained from scratch: U-Net and conditioner have no base weights. The {networks}.\n"
    return (
        f"Unknown: nothing is recorded of the licence of {run.settings.model.pretrained}, which this model is derived from;\n"
        f"find it out before this is shared. The {networks}.\n"
    )


def _differences(run: Run, form: str) -> str:
    lines = []
    if run.settings.condition_dropout == 0:
        lines.append("The null vector was never trained: paint with guidance 1.")
    trained, padded = run.settings.model.mask_to_latent, run.settings.model.reference_geometry == "pad"
    program, theirs = MASKS[form]
    if trained != theirs:
        lines.append(f"{program} shrinks masks to latent resolution by `{theirs}`; this model was trained with `{trained}`.")
    if padded:
        lines.append(
            "Trained with references padded to a square with the encoder's mean colour; diffusers and the original code squash "
            "them: pad each before it is given to either of them, as below (this project does it by itself)."
        )
    if form == "diffusers":
        lines.append("The pipeline draws a sample of the masked photo's latent; this project's own painting takes its mean.")
        squashed = "" if padded else ", as in training"
        lines.append(
            f"The preprocessor squashes references to a square{squashed}; the released model's preprocessor cuts the middle out."
        )
    elif (blocks := run.settings.model.conditioner_blocks) != PUBLISHED_BLOCKS:
        lines.append(
            f"The mapper has {number_of(blocks, 'block')}; the original code makes {PUBLISHED_BLOCKS}: change that there."
        )
    return ("".join(f"- {line}\n" for line in lines) or "None.\n") + ("\n" + PADDING_REFERENCES if padded else "")
