"""An export of a run: weights in another's layout, or as a small checkpoint of our own, with a model card; whole or absent."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from pbe_core.autoencoder import Autoencoder
from pbe_core.errors import InputError
from pbe_core.files import file_sha256, sweep, sync, temporary_folder
from pbe_core.storage import is_url
from pbe_core.vae_kinds import AUTOENCODER_KL
from pbe_core.words import number_of
from pbe_train.checkpoints.diffusers_format import check_diffusers, write_diffusers
from pbe_train.checkpoints.ldm_format import check_ldm, write_ldm
from pbe_train.checkpoints.load_report import GUESSED, OPEN_RAIL, OPEN_RAIL_PLUS, REPORT_FILE, make_report, read_report
from pbe_train.checkpoints.lora_merge import MergedLora
from pbe_train.checkpoints.networks import read_pretrained
from pbe_train.checkpoints.pretrained import METADATA_FILE, metadata_beside, tensors_of
from pbe_train.checkpoints.trainer_checkpoint import locate_checkpoint, read_state, run_folder_of, save_weights
from pbe_train.data.references import PADDING
from pbe_train.model.pipeline import Run

CARD = Path(__file__).with_name("model_card.md.jinja")
# Blocks of the mapper in the original code, which it does not read from the file.
PUBLISHED_BLOCKS = 5


def export(run: Run, model: Path, folder: Path, file: str, form: str, weights: str, loras: Sequence[MergedLora] = ()) -> None:
    """Write one export.

    Args:
        run: loaded from `model`.
        model: run folder or checkpoint folder; with `loras` any model.
        folder: of the export.
        file: name of the file in it, for `ldm`.
        form: `diffusers`, `ldm` or `weights`.
        weights: which weights were loaded, where the run keeps both.
        loras: those that were added to its weights.

    Raises:
        InputError: the layout cannot hold this run, or the folder holds something else.
    """
    if form != "weights":
        if run.settings.model.tokens != "class":
            raise InputError(
                f"--format {form}: the run conditions on all tokens of the encoder, other programs on the class token; "
                "--format weights holds it"
            )
        check_vae(run.vae, form)
        check_mask_channel(run, form)
    parts = tensors_of(run)
    if form == "diffusers":
        check_diffusers(run)
    elif form == "ldm":
        check_ldm(run, parts)
    checkpoint = locate_checkpoint(model)
    kept, report = "model", None
    if checkpoint:
        kept = "ema" if weights == "ema" and (checkpoint / "ema.safetensors").is_file() else "model"
        # Exported weights do not tell by their name what they are.
        kept = metadata_beside(checkpoint, "model.safetensors").get("weights", kept)
        report = read_report(checkpoint)
    else:
        run, report = as_start(run, str(model))
    metadata = metadata_of(run, report)
    if loras:
        metadata["loras"] = [{"name": Path(lora.source).name, "weight": lora.weight, "sha256": lora.sha256} for lora in loras]
    with new_export(folder, {"format": form, "step": run.step, "weights": kept, "run": str(model), **metadata}) as partial:
        if form == "diffusers":
            write_diffusers(run, parts, partial)
        elif form == "ldm":
            write_ldm(run, parts, partial / file, metadata)
        else:
            save_weights(partial, run.step, run.settings, run.identity, run.model.kept())
            if report:
                # As the settings name it: the folder that it was found in is nobody else's concern.
                report = {**report, "source": run.settings.model.pretrained}
                (partial / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        name = file if form == "ldm" else folder.name
        # Evaluations are of the run as it was trained.
        evaluations = _read_evaluations(run_folder_of(checkpoint) if checkpoint and not loras else None)
        told = [f"{Path(lora.source).name}, weight {lora.weight:g}, `{lora.sha256[:12]}`" for lora in loras]
        if checkpoint and read_state(checkpoint).identity.base_sha256:
            told.insert(0, "that of this run")
        card = model_card(run, kept, form, name, evaluations, report, told)
        (partial / "README.md").write_text(card, encoding="utf-8")


def as_start(run: Run, source: str) -> tuple[Run, dict[str, Any]]:
    """A published model as a run of no steps that began from it, and the report on that: so its licence goes with it."""
    report = asdict(make_report(read_pretrained(source), [], run.settings.model))
    model = run.settings.model.model_copy(update={"pretrained": source})
    return replace(run, settings=run.settings.model_copy(update={"model": model})), report


def check_vae(vae: Autoencoder, form: str) -> None:
    """Refuse a VAE that neither layout can hold.

    The original code knows one kind; diffusers' pipeline asks its VAE for a distribution, and scales its latents but shifts none.

    Raises:
        InputError: with what it is.
    """
    other = vae.sizes.kind != AUTOENCODER_KL
    what = vae.sizes.kind if other else "an AutoencoderKL whose latents are shifted"
    if other or vae.normalisation:
        raise InputError(
            f"--format {form}: the run's VAE is {what}, with which the programs of this layout cannot paint; paint with the run "
            "itself (pbe edit --model RUN), or train with an AutoencoderKL without shift_factor, latents_mean and latents_std"
        )


def check_mask_channel(run: Run, form: str) -> None:
    """Refuse a U-Net that sees 1 where it repaints. Raises InputError: with the reason."""
    if run.identity.mask_channel == "repaint":
        raise InputError(
            f"--format {form}: the run began from an inpainting model, whose U-Net sees 1 where it repaints; the programs of "
            "this layout show it 1 where it keeps, and no weights make up for that at the border of a view: --format weights "
            "holds it, this project paints with it (pbe edit --model RUN), and a run that begins from it with "
            "--model.mask_channel keep turns it but for the border, and can be exported"
        )


def check_free(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier export of this program. Raises InputError: with what is there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not there:
        return
    try:
        known = {METADATA_FILE, *json.loads((folder / METADATA_FILE).read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--out {folder}: is not empty, and no export of this program; give another folder") from None
    if foreign := there - known:
        raise InputError(f"--out {folder}: {min(foreign)} is not of the earlier export and would be lost; give another folder")


@contextmanager
def new_export(folder: Path, metadata: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; after the block it takes that name, with `metadata` and a list of all its files.

    An earlier export goes only when the new one is whole and on disk. On an exception nothing has changed.

    Raises:
        InputError: the place holds something else.
    """
    folder = folder.absolute()  # `.` has no name.
    sweep(folder.parent, folder.name)
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written to ({error.strerror}); give another place") from None
    with temporary_folder(folder.parent, folder.name) as partial, temporary_folder(folder.parent, folder.name) as earlier:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listed = {str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
        (partial / METADATA_FILE).write_text(json.dumps({**metadata, "files": listed}, indent=1) + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        if folder.exists():
            folder.rename(earlier / "export")
        partial.rename(folder)
        sync(folder.parent)


def metadata_of(run: Run, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """What no tensor of an export says; with it the export paints as its run. `report` is the run's start.json, or null."""
    model, licence = run.settings.model, licence_of(run, report)
    return {
        "painting": {
            "view_size": run.identity.view_size,
            "mask_to_latent": model.mask_to_latent,
            "reference_geometry": model.reference_geometry,
            "guidance_dropout": run.settings.condition_dropout,
            **({"buckets": run.identity.buckets} if run.identity.buckets else {}),
        },
        "conditioner_blocks": model.conditioner_blocks,
        "encoder_layers": run.model.conditioner.model.config.num_hidden_layers,
        "licence": licence,
        "licence_guessed": licence is not None and bool((report or {}).get("licence_guessed")),
    }


def licence_of(run: Run, report: Mapping[str, Any] | None) -> str | None:
    """The licence of what a run was made of; null where it is not known, or was made of nothing."""
    licence: str | None = report.get("licence") if report and run.settings.model.pretrained else None
    return licence


def _read_evaluations(run_folder: Path | None) -> dict[str, str]:
    found = {}
    for path in sorted(run_folder.glob("evaluat*.json")) if run_folder else []:
        try:
            found[path.name] = json.dumps(json.loads(path.read_bytes()), indent=1)
        except (OSError, ValueError):
            continue
    return found


def model_card(
    run: Run,
    weights: str,
    form: str,
    name: str,
    evaluations: Mapping[str, str],
    report: Mapping[str, Any] | None,
    loras: Sequence[str] = (),
) -> str:
    """The text of README.md; arguments as of `export`, and `name` of its folder or file, `evaluations` by file name as JSON.

    `loras` tells of each LoRA that is in the weights.
    """
    settings, licence = run.settings.model_dump(mode="json"), licence_of(run, report)
    dataset_card = Path(settings["dataset"]) / "README.md"
    card = ModelCard.from_template(
        ModelCardData(
            license=licence or "other",
            library_name="diffusers" if form == "diffusers" else None,
            tags=["paint-by-example", "image-to-image", "inpainting"],
        ),
        template_path=str(CARD),
        run=run,
        weights=weights,
        form=form,
        name=name,
        evaluations=evaluations,
        report=report,
        loras=loras,
        settings=settings,
        settings_text=yaml.safe_dump(settings, sort_keys=False),
        dataset_card=dataset_card if not is_url(settings["dataset"]) and dataset_card.is_file() else None,
        licence=licence,
        open_rail={OPEN_RAIL: "", OPEN_RAIL_PLUS: "++"}.get(licence or ""),
        guessed=GUESSED if (report or {}).get("licence_guessed") else "",
        number_of=number_of,
        published_blocks=PUBLISHED_BLOCKS,
        # diffusers shrinks a mask to latent resolution by nearest neighbour, the original code without antialias.
        program="The pipeline" if form == "diffusers" else "The original code",
        shrinks="nearest" if form == "diffusers" else "bilinear",
        padding=PADDING,
    )
    return str(card)
