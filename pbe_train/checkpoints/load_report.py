"""The load report: where the weights of a run came from, tensor by tensor, and under what licence they are (start.json).

PretrainedModel ──make_report──▶ LoadReport ──write_report──▶ start.json of the run ──read_report──▶ exports, cards, the app
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pbe_core.files import write_atomically
from pbe_core.words import noun
from pbe_train.checkpoints.pretrained import PretrainedModel
from pbe_train.checkpoints.trainer_checkpoint import run_folder_of
from pbe_train.config import ModelSettings
from pbe_train.model.schedulers import SCHEDULE

REPORT_FILE = "start.json"
OPEN_RAIL = "creativeml-openrail-m"
# Of Stable Diffusion 2.x and XL, under the name that the hub gives it.
OPEN_RAIL_PLUS = "openrail++"
GUESSED = ", as Stable Diffusion's, if that is what it was"
UNSAID = (
    "prediction as the settings say, since the model does not: Stable Diffusion 2-base, 2-1-base, 2-inpainting and XL predict "
    "the noise (epsilon), 2 and 2-1 the velocity (v_prediction)"
)


@dataclass(frozen=True)
class LoadReport:
    """Where the weights of a new run are from."""

    source: str
    """File or folder of the pretrained model."""
    kind: str
    loaded: dict[str, int]
    """Part of the model -> tensors that were loaded into it."""
    new: list[str]
    """What the pretrained model does not have, in words."""
    aside: dict[str, int]
    """What it has and the new model has no use for -> tensors; 0 for what was not opened."""
    licence: str | None
    """Licence of its weights, by the name that the hub gives it; null where it is not known."""
    licence_guessed: bool = False
    """Whether that is the licence of what is published in this layout, and nothing says that this is such a model."""
    otherwise: list[str] = field(default_factory=list)
    """Settings that differ from those it was trained with."""

    def lines(self) -> str:
        """The report as a person reads it."""
        loaded = ", ".join(f"{count} {noun(count, 'tensors')} of the {part}" for part, count in self.loaded.items())
        aside = ", ".join(f"{what} ({count or 'not opened'})" for what, count in self.aside.items())
        return (
            f"start: {self.source} ({self.kind})\n"
            f"  loaded      {loaded}\n"
            f"  new         {'; '.join(self.new) or 'nothing'}\n"
            f"  left aside  {aside or 'nothing'}\n"
            f"  licence     {self.licence or 'not known'}{GUESSED if self.licence_guessed else ''}"
            + "".join(f"\n  otherwise   {difference}" for difference in self.otherwise)
        )


def make_report(source: PretrainedModel, new: list[str], model: ModelSettings) -> LoadReport:
    """The report on a pretrained model whose U-Net and conditioner were loaded in full."""
    conditioner = {"conditioner": len(source.conditioner)} if source.conditioner else {}
    same = {"vision encoder, that of model.encoder": source.encoder, "VAE, that of the dataset": source.vae}
    painting = source.metadata.get("painting")
    # Metadata is a stranger's: what is no table says nothing.
    had = {**(painting if isinstance(painting, dict) else {}), **source.trained_with}
    differences = [
        f"{name} {getattr(model, name)}, where it was trained with {had[name]}; is that meant?"
        for name in ("tokens", "reference_geometry", "mask_to_latent")
        if had.get(name, getattr(model, name)) != getattr(model, name)
    ]
    differences += [
        f"{name} of the noise schedule {SCHEDULE[name]}, where it was trained with {value}; is that meant?"
        for name, value in source.schedule.items()
        if value != SCHEDULE[name]
    ]
    newer = bool(source.unet_config.get("use_linear_projection"))
    if newer and source.prediction is None:
        differences.append(UNSAID)
    run = source.kind == "run of this trainer"
    known = (read_report(Path(source.where)) or {}) if run else source.metadata
    is_known = run or "licence" in known
    return LoadReport(
        source=source.where,
        kind=source.kind,
        loaded={"U-Net": len(source.unet), **conditioner},
        new=new,
        aside={what: len(tensors) for what, tensors in same.items() if tensors} | source.aside,
        licence=known.get("licence") if is_known else OPEN_RAIL_PLUS if newer else OPEN_RAIL,
        licence_guessed=bool(known.get("licence_guessed")) if is_known else True,
        otherwise=differences,
    )


def write_report(report: LoadReport, run: Path) -> None:
    """Leave the report in a run folder, as start.json."""
    write_atomically(run / REPORT_FILE, (json.dumps(asdict(report), indent=1) + "\n").encode())


def read_report(checkpoint: Path) -> dict[str, Any] | None:
    """The start.json of the run that a checkpoint folder is of, or of exported weights; null where there is none."""
    for folder in filter(None, (checkpoint, run_folder_of(checkpoint))):
        try:
            content = json.loads((folder / REPORT_FILE).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return None
