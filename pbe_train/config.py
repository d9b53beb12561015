"""Settings of the trainer: the `train:` section of a config file. Defaults are the paper's wherever it names a number.

The ablations of the paper are one setting each: `model.pretrained` (prior), `augmentation.preset`, `model.tokens` (bottleneck)
and `condition_dropout`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from pbe_core.settings import Group, Program
from pbe_core.storage import is_url, public_url
from pbe_core.words import number_of
from schemas.dataset import leave_out

# Diffusion times of the model: 0 to 999.
TIMESTEPS = 1000
# The split that is trained on, and the one whose samples are held out, for their loss and for pictures.
TRAIN_SPLIT, VALIDATION_SPLIT = "train", "validation"
MaskMode = Literal["bilinear", "nearest"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Prediction = Literal["epsilon", "v_prediction"]
# What 1 means in the U-Net's mask channel: `keep`, as published, or `repaint`, as in Stable Diffusion's inpainting models.
MaskChannel = Literal["keep", "repaint"]
TokenMode = Literal["class", "all"]
ReferenceGeometry = Literal["squash", "pad"]
AugmentationPreset = Literal["paper", "strong", "none"]
# Where something is kept: beside the model, or in the CPU's memory.
Place = Literal["device", "cpu"]
LoraTarget = Literal["attention", "feed_forward", "convolutions", "mapper"]


class UNetSettings(Group):
    """Sizes of a U-Net that is trained from scratch; read only where model.pretrained is not set."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level, from the full latent resolution downwards; each level halves the resolution."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Whether a level has transformer blocks (self-attention, and the reference through cross-attention)."""
    layers_per_block: int = Field(2, ge=1)
    """Residual blocks of a level on the way down."""
    attention_heads: int = Field(8, ge=1)
    """Heads of each attention layer."""
    norm_groups: int = Field(32, ge=1)
    """Groups of the group normalisations; must divide every entry of block_out_channels."""
    cross_attention_dim: int = Field(768, ge=1)
    """Width of a condition token."""

    @model_validator(mode="after")
    def _levels_agree(self) -> "UNetSettings":
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {number_of(len(self.attention), 'level')}, block_out_channels {len(self.block_out_channels)}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_groups or channels % self.attention_heads:
                raise ValueError(
                    f"block_out_channels {channels} is not divisible by norm_groups {self.norm_groups} and by "
                    f"attention_heads {self.attention_heads}"
                )
        return self


class ModelSettings(Group):
    """The networks."""

    pretrained: str | None = None
    """The start: a Stable Diffusion 1.x or Paint by Example model, as a folder or hub id in diffusers' layout or as a .ckpt or
    .safetensors file in the original one, or a run of this trainer (docs/weights.md); null = from scratch."""
    unet: UNetSettings = UNetSettings()
    """Sizes of a U-Net from scratch."""
    encoder: str
    """Folder or hub id (owner/name, or owner/name/subfolder) of the CLIP vision model; it stays frozen."""
    vae: str
    """Folder or hub id (owner/name, or owner/name/subfolder) of the VAE; must be the one that made the dataset's latents."""
    tokens: TokenMode = "class"
    """Content bottleneck: `class` conditions on the encoder's class token alone, `all` on every token (bottleneck off)."""
    reference_geometry: ReferenceGeometry = "squash"
    """How a reference comes into the encoder's square: `squash` stretches it to fill the square, as published; `pad` keeps its
    aspect, in the middle, and pads it with the encoder's mean colour. A model sees references as it was trained to."""
    conditioner_blocks: int = Field(5, ge=0)
    """Transformer blocks between the encoder's tokens and the U-Net."""
    mask_to_latent: MaskMode = "bilinear"
    """How a mask shrinks to latent resolution: `bilinear` without antialias (as published) or `nearest` (as in diffusers)."""
    mask_channel: Literal["keep"] | None = None
    """What 1 means in the mask that the U-Net sees. Null: what it means in the start, `repaint` in an inpainting model and `keep`
    in any other. `keep`: as published, so that exports in the published layouts can hold the run; the mask of an inpainting model
    is turned within its first layer, which is exact but for the outermost latent cells."""
    attention: Literal["fused", "plain"] = "fused"
    """How the U-Net's attention is computed: by PyTorch's fused kernels, or by plain matrix products, which on a CPU are faster
    for the few tokens of small latents; their memory grows with the square of the tokens."""
    one_token_shortcut: bool = True
    """Under `tokens: class`, compute the attention to the one condition token as the linear map that it is; same output, less
    arithmetic. False computes the whole attention. Without effect under `tokens: all`."""
    channels_last: bool = True
    """Keep the U-Net's activations and kernels with channels innermost in memory, which tensor cores take without reordering."""
    compile: bool = False
    """Compile U-Net and conditioner with torch.compile: minutes at the start of a run, less time for each step."""
    gradient_checkpointing: bool = False
    """Recompute the U-Net's activations in the backward pass: about a third more arithmetic for far less memory."""
    train: tuple[str, ...] = ()
    """Parts that are trained while the rest stays frozen, by names in the weights' dotted names: `conditioner`, `attentions`,
    `attn2`, `unet.up_blocks`; empty = all but the vision encoder."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What holds the weights during training. `bf16` takes half the memory for weights and gradients: steps are rounded up or
    down at random, so that small ones count on average; or, with optimizer.place cpu, fp32 copies there are trained."""


class AugmentationSettings(Group):
    """Strong augmentation of the reference."""

    preset: AugmentationPreset = "paper"
    """`paper`: flip, rotation, blur and the random affine map that the published run calls elastic; `strong`: ours, which changes
    pose, shape, light and quality and erases backgrounds; `none`: no augmentation."""


class ReferenceDraw(Group):
    """Which references a sample is shown, where the dataset has some from other photos (docs/own-data.md)."""

    cross_photo: float = Field(1.0, ge=0, le=1)
    """Share of the samples whose reference is from another photo, of those that have one there; the others', and all where there
    is none, is the crop of their own photo. Drawn anew in each epoch, as is which one of several."""
    per_sample: int = Field(1, ge=1, le=16)
    """References from other photos that a sample is shown at once, the mean of whose class tokens is the condition; where there
    are fewer, some come twice, augmented otherwise. More than 1 takes model.tokens: class."""


class OptimizerSettings(Group):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-5, gt=0)
    """Learning rate after the warm-up; constant from there, as in the paper, but for the cool-down."""
    warmup_steps: int = Field(10_000, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    cooldown: float = Field(0.0, ge=0, le=1)
    """Share of all steps, the last ones, over which the learning rate falls linearly to 0; 0 = none, as in the paper."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    gradient_clip: float = Field(0.0, ge=0)
    """Largest norm of the gradient over all parameters; 0 = no clipping."""
    state: Literal["fp32", "8bit"] = "fp32"
    """What holds AdamW's two moments: 8 bytes a weight, or 2, in blocks of 256 with a scale each."""
    place: Place = "device"
    """Where moments lie and a step is computed: beside the model, or in the CPU's memory, with fp32 copies of bf16 weights."""


class LoraSettings(Group):
    """Train small matrices beside the weights of `model.pretrained`, which stay as they are (Hu et al., LoRA, 2021).

    A layer's output W x becomes W x + alpha / rank * B A x, where A has `rank` rows and B begins as 0.
    """

    rank: int = Field(16, ge=1)
    """Rows of A; memory and size on disk grow with it, and what can be learnt."""
    alpha: float | None = Field(None, gt=0)
    """Strength, relative to the rank; null = the rank, so that alpha / rank is 1."""
    targets: tuple[LoraTarget, ...] = Field(("attention",), min_length=1)
    """Which layers get them: `attention`, the projections of the U-Net's attention; `feed_forward`, the linear layers behind it;
    `convolutions` of the U-Net's residual blocks and between its levels; `mapper`, the linear layers between vision encoder and
    U-Net, which other programs' LoRA loaders know nothing of. Queries and keys of the attention to one token have no effect and
    get none."""

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[LoraTarget, ...]) -> tuple[LoraTarget, ...]:
        # In one order, so that runs which name the same layers are the same.
        return tuple(target for target in get_args(LoraTarget) if target in targets)

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


class LoaderSettings(Group):
    """How samples reach the model. Of these, window alone changes the order; on_corrupt only what no run could have read."""

    workers: int = Field(4, ge=0)
    """Processes per rank that read and augment; 0 = in the training process itself."""
    window: int = Field(16, ge=1)
    """Shards whose samples are shuffled together; memory and open files grow with it."""
    on_corrupt: Literal["stop", "replace"] = "stop"
    """What to do with a sample that cannot be read: stop, or put another one, drawn from the whole split, into its place."""
    max_corrupt_samples: int = Field(100, ge=0)
    """Samples that may be replaced, each counted once, before the run stops and names them."""
    cache: Path | None = None
    """Folder for shards and tables of a remote dataset, shared by a machine's processes; null = ~/.cache/paint-by-example."""
    cache_gb: float = Field(50, gt=0)
    """Bytes of shards kept there, in units of 10^9; those that were not used for longest go first."""


class PictureSettings(Group):
    """Pictures of fixed held-out samples, painted with fixed noise during training."""

    every: int = Field(1000, ge=0)
    """Steps between pictures; 0 = none."""


class ValidationSettings(Group):
    """The loss on fixed held-out samples with fixed noise: a curve that compares from step to step and from run to run."""

    every: int = Field(1000, ge=0)
    """Steps between two measurements; 0 = none. Where the dataset has no validation split, no loss is measured, pictures show
    samples of the training split, and a line says so."""


class TrainSettings(Program):
    """Train Paint by Example on a dataset of shards."""

    dataset: Path
    """Dataset folder that a build left (it holds dataset.json), or its URL: s3://bucket/dataset."""
    storage: dict[str, Any] = Field({}, exclude=True)
    """Options for that URL, as fsspec takes them for its protocol: {"endpoint_url": "https://..."}. Written to no file."""
    out: Path = Path("runs/tiny")
    """Run folder: settings, checkpoints, metrics, pictures."""
    seed: int = 0
    """Seed of every random choice of the training."""
    steps: int = Field(1_100_000, ge=1)
    """Optimizer steps, counted from the start of the run (a resumed run goes on to the same number)."""
    global_batch: int = Field(64, ge=1)
    """Samples per optimizer step, over all ranks."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches that a rank's share of an optimizer step is cut into."""
    prediction: Prediction = "epsilon"
    """What the U-Net predicts: the noise, as published and as Stable Diffusion 1.x does, or the velocity (Salimans & Ho 2022),
    whose error weighs high noise far more, where layout and background are decided: for short trainings from scratch."""
    condition_dropout: float = Field(0.2, ge=0, le=1)
    """Probability, per sample, that the condition is replaced by the learned null vector."""
    max_nonfinite_steps: int = Field(20, ge=0)
    """Steps whose gradient is not finite change nothing and are counted; beyond so many the run stops and names their samples."""
    model: ModelSettings
    """The networks."""
    lora: LoraSettings | None = None
    """Train a LoRA beside the weights of model.pretrained, and nothing else (docs/fine-tuning.md); null = train all weights."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Strong augmentation of the reference."""
    references: ReferenceDraw = ReferenceDraw()
    """Which references a sample is shown."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its schedule."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of the moving average of the weights; 0 = no average, as published."""
    ema_place: Place = "device"
    """Where that average lies: beside the model, or in the CPU's memory, to which the weights then go after each step."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward pass, whatever model.weights is. `auto`: bf16 on a GPU, fp16 on one that lacks it, fp32
    on the CPU. With fp16 the loss is scaled, and a step whose gradient overflows is skipped."""
    cuda_graph: bool = False
    """Record a whole step, from the batch to the moving average, as one CUDA graph, and repeat it: the host then launches one
    thing a step. On a GPU, with AdamW and the average in fp32 there; the same numbers (docs/training.md)."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per rank; null = the machine's cores shared out evenly."""
    loader: LoaderSettings = LoaderSettings()
    """How samples reach the model."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics."""
    wandb: str | None = None
    """Project of Weights & Biases that the metrics go to as well; needs the package `wandb` and its own login. Null = none."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints that are kept."""
    pictures: PictureSettings = PictureSettings()
    """Pictures of held-out samples during training."""
    validation: ValidationSettings = ValidationSettings()
    """The loss on held-out samples during training."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint in `out`, if any; `never`: start anew; or a run folder or a checkpoint folder."""

    _dataset_url: str | None = PrivateAttr(None)

    @property
    def dataset_url(self) -> str | None:
        """The URL, where `dataset` was given as one."""
        return self._dataset_url

    @model_validator(mode="wrap")
    @classmethod
    def _url_is_kept_whole(cls, values: Any, handler: ModelWrapValidatorHandler["TrainSettings"]) -> "TrainSettings":
        settings = handler(values)
        # As a path, s3://bucket would lose a slash.
        if isinstance(values, dict) and is_url(values.get("dataset")):
            settings._dataset_url = str(values["dataset"])
        return settings

    @model_validator(mode="after")
    def _tokens_have_a_mean(self) -> "TrainSettings":
        if self.references.per_sample > 1 and self.model.tokens == "all":
            raise ValueError(
                "references.per_sample above 1 takes model.tokens: class; all tokens of two photos do not correspond"
            )
        return self

    @model_validator(mode="after")
    def _weights_fit_the_arithmetic(self) -> "TrainSettings":
        if self.model.weights == "bf16" and self.precision not in ("auto", "bf16"):
            raise ValueError(f"model.weights bf16 is computed in bf16, not in precision {self.precision}; set precision to bf16")
        return self

    @model_validator(mode="after")
    def _lora_is_all_that_is_trained(self) -> "TrainSettings":
        if self.lora and self.model.train:
            raise ValueError("model.train chooses among the model's own weights, and beside a LoRA none is trained; leave it out")
        return self

    @model_validator(mode="after")
    def _steps_can_be_recorded(self) -> "TrainSettings":
        wanted = {
            "optimizer.state fp32": self.optimizer.state == "fp32",
            "optimizer.place device": self.optimizer.place == "device",
            "model.weights fp32": self.model.weights == "fp32",
            "ema_place device": self.ema_place == "device" or not self.ema_decay,
        }
        lacking = [name for name, fits in wanted.items() if not fits]
        if self.cuda_graph and lacking:
            raise ValueError(
                f"cuda_graph records what a GPU computes by itself, and takes {' and '.join(lacking)}; or set it to false"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without what runs before it did not have, so that they go on."""
        return leave_out(write(self), {"references": ReferenceDraw().model_dump()})

    @field_serializer("dataset")
    def _dataset_as_given(self, _: Path) -> str:
        return self.shown_dataset

    @property
    def shown_dataset(self) -> str:
        """Folder or URL of the dataset; a URL without its password."""
        return public_url(self.dataset_url) if self.dataset_url else str(self.dataset)

    def over(self, dataset: str, storage: Mapping[str, Any]) -> "TrainSettings":
        """The same settings over the dataset at another place, a folder or a URL with its options."""
        url = dataset if is_url(dataset) else None
        return self.model_copy(update={"dataset": Path(dataset), "dataset_url": url, "storage": dict(storage)})


# What a resumed run may change: where it writes, how far it goes and how it is watched. Everything else defines the run.
# `dataset`, `model.encoder` and `model.vae` are places; what lies there is compared by hash. `model.pretrained` is the place of
# the start, which is read no more, or of a LoRA's base, which is compared by hash as well. `accumulation` and the loader's
# processes only say how the same step is computed.
CHANGEABLE = {
    "dataset",
    "out",
    "steps",
    "accumulation",
    "ema_place",
    "model.pretrained",
    "model.encoder",
    "model.vae",
    "model.attention",
    "model.one_token_shortcut",
    "model.channels_last",
    "model.compile",
    "model.gradient_checkpointing",
    "cuda_graph",
    "precision",  # What it comes to is part of the run's identity.
    "threads",
    "loader.workers",
    "loader.on_corrupt",
    "loader.max_corrupt_samples",
    "loader.cache",
    "loader.cache_gb",
    "log_every",
    "wandb",
    "checkpoint_every",
    "keep_last",
    "pictures",
    "validation",
    "max_nonfinite_steps",
    "resume",
}

# Settings in checkpoints of the version before, by group: new names; those that only say how a run is watched; and those that are
# constants now, with their values.
RENAMED = {
    "": {"guidance_dropout": "condition_dropout", "most_skipped": "max_nonfinite_steps", "checkpoints_kept": "keep_last"},
    "loader": {"on_damage": "on_corrupt", "most_replaced": "max_corrupt_samples"},
}
DROPPED = {
    "": ("watchdog_minutes",),
    "pictures": ("split", "guidance", "scheduler", "count", "sampling_steps"),
    "validation": ("samples", "split"),
}
STRONG = {"erase": 0.3, "light": 0.5, "gamma": 0.3, "colour": 0.3, "resolution": 0.3, "blur": 0.2, "compression": 0.2}
CONSTANT: dict[str, dict[str, Any]] = {
    "": {"split": "train", "timesteps": "uniform"},
    "optimizer": {"betas": [0.9, 0.999]},
    "augmentation": {"flip": 0.5, "rotate": 0.5, "blur": 0.3, "elastic": 0.3}
    | {"strong": STRONG | {"flip": 0.5, "affine": 0.8, "elastic": 0.3}},
}
# Settings that came later, with what a checkpoint was trained with that does not have them.
ADDED: dict[str, dict[str, Any]] = {
    "": {"ema_place": "device", "cuda_graph": False},
    "model": {"train": [], "weights": "fp32"},
    "optimizer": {"state": "fp32", "place": "device"},
}


def with_names_of_today(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, also of one that the version before wrote; what has no meaning today stays."""
    today = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for group in (*RENAMED, *DROPPED, *CONSTANT, *ADDED):
        values = today.get(group, {}) if group else today
        for name, value in ADDED.get(group, {}).items():
            values.setdefault(name, value)
        for name, new in RENAMED.get(group, {}).items():
            if name in values:
                values[new] = values.pop(name)
        constants = CONSTANT.get(group, {})
        for name in (*DROPPED.get(group, ()), *(name for name in constants if values.get(name) == constants[name])):
            values.pop(name, None)
    return today
