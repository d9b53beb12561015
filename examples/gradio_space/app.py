"""Paint by Example as a hosted Gradio space, over the library (`pbe app` is the project's own page): photo, brush, references."""

import os
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from pbe_core.errors import InputError
from pbe_train import PaintByExample
from pbe_train.editing.reading import read_photo
from pbe_train.model.sampling import STEPS

# A run, an export, or a model of the hub, such as Fantasy-Studio/Paint-by-Example.
MODEL = os.environ.get("PBE_MODEL") or str(files("tiny_world").joinpath("weights/model"))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported.
load_model = cache(PaintByExample.from_pretrained)


def for_editor(photo: str | None) -> Image.Image | None:
    """What the editor shows of a photo: at most 1,024 px, since it hands over the strokes on a large one slowly."""
    shown = Image.fromarray(read_photo(photo)) if photo else None
    if shown:
        shown.thumbnail((1024, 1024))
    return shown


def brushed(drawn: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The mask, booleans of this width and height: where a layer of the editor's value has been painted on."""
    painted = np.any([layer[..., 3] > 127 for layer in drawn["layers"]], axis=0)
    return np.asarray(Image.fromarray(painted).resize(size, Image.Resampling.NEAREST))


def edit(
    photo: str | None, drawn: dict[str, Any] | None, references: list[str] | None, seed: float, guidance: float, steps: float,
    progress: Callable[[tuple[int, int]], object],
) -> Image.Image:  # fmt: skip
    """Paint into the photo's file: the editor's copy is smaller, and has other colours if the photo has a profile."""
    if not photo or not references or not drawn or not drawn["layers"]:
        raise InputError("something is missing: choose a photo, brush over what is to be repainted, and give a reference")
    how = {"seed": int(seed), "guidance": guidance, "steps": int(steps)}
    height, width = read_photo(photo).shape[:2]
    mask = brushed(drawn, (width, height))
    return load_model(MODEL)(photo, mask, references, **how, callback=lambda now: progress((now.step, now.steps)))


def page() -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def told(function: Callable[..., Any], *values: Any) -> Any:
        try:
            return function(*values)
        except InputError as error:
            raise gr.Error(str(error)) from None

    def run(*values: Any, progress: Any = gr.Progress()) -> Image.Image:  # noqa: B008 (Gradio's way to ask for one.)
        return told(edit, *values, progress)

    with gr.Blocks(title="Paint by Example") as blocks:
        with gr.Row():
            photo = gr.File(label="Photo", file_types=["image"], elem_id="photo")
            references = gr.File(
                label="References of one object", file_count="multiple", file_types=["image"], elem_id="references"
            )
        white = gr.Brush(default_size="auto", colors=["#ffffff"], color_mode="fixed")
        with gr.Row():
            drawn = gr.ImageEditor(
                label="Brush over what is to be repainted", sources=(), transforms=(), brush=white, elem_id="drawn"
            )
            result = gr.Image(label="Result", format="png", elem_id="result")
        with gr.Row():
            numbers = [
                gr.Number(0, label="Seed", precision=0),
                gr.Slider(1, 15, 2, label="Guidance"),
                gr.Slider(1, 100, STEPS, step=1, label="Steps"),
            ]
        photo.change(lambda file: told(for_editor, file), photo, drawn)
        gr.Button("Paint", variant="primary", elem_id="paint").click(run, [photo, drawn, references, *numbers], result)
    return blocks


if __name__ == "__main__":
    page().queue(max_size=20).launch()
