"""The account of a start: every tensor of its source was loaded, or is left aside for a reason, and what is new has a name."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pbe_core.files import write_atomically
from pbe_core.words import noun
from pbe_train.checkpoints.source import Source
from pbe_train.config import ModelSettings

START_FILE = "start.json"
OPEN_RAIL = "creativeml-openrail-m"
GUESSED = ", as Stable Diffusion's, if that is what it was"


@dataclass(frozen=True)
class Account:
    """Where the weights of a new run are from."""

    source: str
    """File or folder of the start."""
    kind: str
    """What it is."""
    loaded: dict[str, int]
    """Part of the model -> tensors that were loaded into it."""
    new: list[str]
    """What the source does not have, in words."""
    aside: dict[str, int]
    """What it has and the model has no use for -> tensors; 0 for what was not opened."""
    licence: str | None
    """Licence of the source's weights, by the name that the hub gives it; null where it is not known."""
    licence_guessed: bool = False
    """Whether that is the licence of what is published in this layout, and nothing says that this is such a model."""
    otherwise: list[str] = field(default_factory=list)
    """What this run sees otherwise than the source was trained to."""

    def lines(self) -> str:
        """The account as a person reads it."""
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


def account_for(source: Source, new: list[str], model: ModelSettings) -> Account:
    """The account of a source whose U-Net and conditioner were loaded in full."""
    conditioner = {"conditioner": len(source.conditioner)} if source.conditioner else {}
    same = {"vision encoder, that of model.encoder": source.encoder, "VAE, that of the dataset": source.vae}
    licence, guessed = _licence_of(source)
    told = source.record.get("painting")
    # A record is a stranger's file: what is no table says nothing.
    had = {**(told if isinstance(told, dict) else {}), **source.trained_with}
    differences = [
        f"{name} {getattr(model, name)}, where it was trained with {had[name]}; is that meant?"
        for name in ("tokens", "reference_geometry", "mask_to_latent")
        if had.get(name, getattr(model, name)) != getattr(model, name)
    ]
    return Account(
        source=source.where,
        kind=source.kind,
        loaded={"U-Net": len(source.unet), **conditioner},
        new=new,
        aside={what: len(tensors) for what, tensors in same.items() if tensors} | source.aside,
        licence=licence,
        licence_guessed=guessed,
        otherwise=differences,
    )


def write_account(account: Account, run: Path) -> None:
    """Leave the account in a run folder, as start.json."""
    write_atomically(run / START_FILE, (json.dumps(asdict(account), indent=1) + "\n").encode())


def read_account(checkpoint: Path) -> dict[str, Any] | None:
    """What start.json says of the run that a checkpoint folder is of; null where there is none."""
    path = checkpoint.parent.parent / START_FILE
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _licence_of(source: Source) -> tuple[str | None, bool]:
    """The licence, and whether it is a guess."""
    run = source.kind == "run of this trainer"
    told = (read_account(Path(source.where)) or {}) if run else source.record
    if run or "licence" in told:
        return told.get("licence"), bool(told.get("licence_guessed"))
    return OPEN_RAIL, True
