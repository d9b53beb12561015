"""Settings of a build: the `build:` section of a config file."""

import hashlib
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, field_serializer, model_serializer, model_validator

from pbe_core.buckets import Shape, square_side
from pbe_core.errors import InputError
from pbe_core.images.decode import EndMark, Frame
from pbe_core.settings import Group, Program
from pbe_core.storage import is_url, public_url
from pipelines.readers import reader_of
from schemas.dataset import leave_out

FlagName = Literal["occluded", "truncated", "group_of", "depiction", "inside"]


SPLITS = ("train", "validation", "test")


class SourceSettings(Group):
    """Where boxes and photos come from."""

    kind: str = "open_images"
    """Format of the annotations: `open_images` (the published CSVs), `coco` (instances_*.json), `coco_panoptic` (panoptic_*.json
    and its PNGs), `boxes` (your own CSV or JSONL, docs/own-data.md), `yolo`, `voc`, `label_studio`, `cvat` (docs/formats.md), or
    that of a reader of your own, which the environment variable PBE_READERS names."""
    annotations: Path
    """open_images: folder with <split>-annotations-bbox.csv, class-descriptions-boxable.csv and, if there, the class hierarchy,
    bbox_labels_600_hierarchy.json, without which include_labels takes no class below those it names, and the photos' metadata,
    <split>-images-with-rotation.csv; other names, object masks, and what is lost without a file: docs/selection.md.
    coco: folder with instances_train*.json and instances_val*.json, Roboflow's folder, or one JSON file (docs/coco.md).
    coco_panoptic: likewise panoptic_train*.json and panoptic_val*.json, each with the folder or zip of its PNGs beside it.
    boxes: one CSV, JSONL or Parquet file; or a folder of photos, each of which is one box. yolo: data.yaml, obj.data, or their
    folder. voc: folder with Annotations, or with XML files. label_studio: its JSON. cvat: its XML, or the folder with it."""
    photos: Path
    """Folder with the photos, or photo store (docs/crawling.md); a store may also be a URL (s3://bucket/store). open_images:
    <photos>/<split>/<ImageID>.jpg, or <photos>/<split>_<first digit of ImageID>/<ImageID>.jpg. All others: as the annotations
    name them, below this folder."""
    splits: tuple[Literal["train", "validation", "test"], ...] = Field(("train", "validation"), min_length=1)
    """Which splits to build."""
    validation_share: float = Field(0.05, ge=0, lt=1)
    """Where the source has no splits of its own: the share of photos, by a hash of their id, that becomes `validation`. Refused
    where it has some."""
    unit: Literal["pixel", "fraction"] | None = None
    """boxes only, and due there: whether coordinates are px or fractions of the photo's width and height."""
    frame: Frame | None = None
    """Whether boxes were drawn on photos as viewers show them, turned as their EXIF says (`exif`), or on the pixels as `stored`.
    By default what the format says: `stored` for open_images, coco and coco_panoptic, `exif` for all others."""
    group_by: Literal["column", "folder"] = "column"
    """boxes only: which boxes show one and the same instance: those with the same text in column `group`, where there is one, or
    those whose photos are in one folder (a folder an object, a folder a video). No instance is in two splits then."""
    same_photo: Literal["drop", "report"] = "drop"
    """What to do with a photo that is there under two ids: keep one (of validation or test rather than train), or only report.
    Images of one COCO file that bear one file name are read as one photo, unless they are only to be reported."""
    survey: Path | None = None
    """Folder that `pipelines/survey.py` wrote: hashes of the photos themselves, which find more of them than the tables do."""
    max_photo_pixels: int = Field(100_000_000, gt=0)
    """Photos with more px than this, by their header, are not decoded."""
    missing_end_mark: EndMark = "accept"
    """What becomes of a JPEG that has all its pixels and lacks only its end mark: `accept` uses it, `refuse` fails it with code
    `no_end_mark`. One that lacks pixels is a `decode_error` either way."""
    storage: dict[str, Any] = Field({})
    """Options for `photos` behind a URL, as fsspec takes them for its protocol."""
    _photos_url: str | None = PrivateAttr(None)
    # What the kind's reader says. Kept here: processes on other machines need no more of a reader, and may not have it.
    _kind_frame: Frame = PrivateAttr("exif")
    _photos_by_id: bool = PrivateAttr(False)

    @property
    def photos_url(self) -> str | None:
        """URL of the photo store, where `photos` was given as one; `photos` is then each node's folder for its tables."""
        return self._photos_url

    @property
    def photo_frame(self) -> Frame:
        """The frame of the boxes: as given, or as is usual for the kind."""
        return self.frame or self._kind_frame

    @property
    def photos_by_id(self) -> bool:
        """Whether photos go by their ids, not by the names of files in the annotations."""
        return self._photos_by_id

    @property
    def photos_of(self) -> str:
        """Whose photos these are, for a photo store: ids of Open Images mean the same everywhere, others in one file alone."""
        return self.kind if self.photos_by_id else f"{self.kind}, {self.annotations.resolve()}"

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out(write(self), {"group_by": "column"})

    @model_validator(mode="wrap")
    @classmethod
    def _url_is_of_a_store(cls, values: Any, handler: ModelWrapValidatorHandler["SourceSettings"]) -> "SourceSettings":
        url = values.get("photos") if isinstance(values, dict) else None
        if not is_url(url):
            return handler(values)
        settings = handler({**values, "photos": work_folder(str(url))})
        settings._photos_url = str(url)
        return settings

    @field_serializer("photos")
    def _photos_as_given(self, photos: Path) -> str:
        return public_url(self._photos_url) if self._photos_url else str(photos)

    @model_validator(mode="after")
    def _kind_is_known(self) -> "SourceSettings":
        try:
            reader = reader_of(self.kind)
        except InputError as error:
            raise ValueError(f"source.kind: {error}") from None
        self._kind_frame, self._photos_by_id = reader.frame, reader.photos_by_id
        if reader.takes_unit and self.unit is None and not self.annotations.is_dir():
            raise ValueError(
                f"source.kind is {self.kind}, so say in which unit they are: source.unit: pixel, or source.unit: fraction"
            )
        if not reader.takes_group_by and self.group_by != "column":
            raise ValueError(f"source.group_by is for source.kind: boxes only, not for {self.kind}")
        if not reader.takes_unit and self.unit is not None:
            raise ValueError(f"source.unit is for source.kind: boxes only; the unit of {self.kind} is known")
        return self


class SelectionSettings(Group):
    """Which boxes become objects. A box is accepted if it breaks no rule. Rules and their sources: docs/selection.md."""

    min_area: float = Field(0.02, ge=0, le=1)
    """Smallest box area / photo area (paper: 0.02). A model that never saw small objects does little in small regions."""
    max_area: float = Field(0.8, ge=0, le=1)
    """Largest box area / photo area (paper: 0.8)."""
    min_side: int | None = Field(None, ge=1)
    """Shortest side of a box in px of the photo (paper: none). Asked of the photo where the tables do not say how large it is."""
    max_aspect: float | None = Field(None, ge=1)
    """Largest ratio of a box's longer side to its shorter one, in px (paper: none). Asked of the photo likewise."""
    min_object_share: float | None = Field(0.2, gt=0, le=1)
    """Smallest share of a reference's px that its object's outline covers, where `references.background: grey` makes all other px
    grey (paper: none; it cuts nothing out). Not asked where backgrounds are kept, nor of boxes without an outline."""
    reject_flags: tuple[FlagName, ...] = ("group_of", "depiction", "inside")
    """Boxes with one of these flags set are rejected: such a reference does not show one whole object (paper: none)."""
    unknown_flags: Literal["accept", "reject"] = "accept"
    """What to do with a box one of whose `reject_flags` is -1, unknown."""
    include_labels: tuple[str, ...] = ()
    """Only these classes, by name or id, each with the subtree below it in the class hierarchy; empty means all. Open Images' is
    in a file, bbox_labels_600_hierarchy.json, beside the annotations."""
    exclude_labels: tuple[str, ...] = ()
    """Not these classes nor those below them; this counts more than `include_labels`."""
    leave_out: Path | None = None
    """List of objects and photos that are rejected whatever the rules say, as the dataset viewer of `pbe app` writes it: a CSV of
    what (object or photo) and id."""
    near_duplicate_iou: float | None = Field(0.9, gt=0, le=1)
    """Of boxes of a photo that overlap this much (intersection / union), whatever the label, the largest stays (paper: none)."""
    nested_share: float | None = Field(None, gt=0, le=1)
    """Boxes of which this share lies in a larger box of the photo are rejected: a person's hand, a car's wheel (paper: none)."""
    max_per_photo: int | None = Field(None, ge=1)
    """Objects of one photo, chosen by a seeded hash (paper: all, one drawn at random in each epoch)."""
    max_per_class: int | None = Field(None, ge=1)
    """Objects of one class, chosen by a seeded hash (paper: none). Counted within each split."""
    class_smoothing: float = Field(0, ge=0, le=1)
    """How far larger classes may go beyond `max_per_class`: a class of n gets cap * (n / cap) ** class_smoothing; 0 is a hard
    cap, 1 is none (the exponential smoothing of multilingual models' sampling, Conneau et al. 2020, section 3.1: 0.3)."""
    subset: float = Field(1.0, gt=0, le=1)
    """Share of the photos, by a seeded hash: a smaller subset lies within a larger one."""
    all_reasons: bool = False
    """Write all the rules that each rejected box breaks into rejects.parquet, not the first alone."""

    @model_validator(mode="after")
    def _ordered(self) -> "SelectionSettings":
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area} is larger than max_area {self.max_area}")
        return self


class ViewSettings(Group):
    """Views of the photo around each object: squares, or shapes near the photo's own."""

    size: int = Field(512, ge=16)
    """Side of a view in px; a multiple of the VAE's downsampling (8), and for training of what its U-Net halves (64)."""
    buckets: tuple[Shape, ...] | None = Field(None, min_length=1)
    """Shapes of views, width and height in px, instead of squares of `size`: [[640, 384], [512, 512], [384, 640]]. Views have the
    one whose aspect is nearest to their photo's. `pbe buckets 512` prints a list (docs/building.md). The size of photos is known
    by the tables, or by `source.survey`; where it is not, a view has the shape nearest to a square."""
    per_object: int = Field(1, ge=1)
    """Views of each object. More buy diversity with disk."""
    zoom: Literal["published", "free"] = "free"
    """How a square as high (or wide) as the photo is zoomed in. `published`, as in the paper's code: all four sides are trimmed
    alike, by up to `max_zoom` of the smallest margin between the extended box and the square; square photos are never zoomed.
    `free`, ours: the side loses up to `max_zoom` of its excess over the extended box's longer side, and the smaller square lies
    anywhere in the larger one; views are closer, objects less central, and square photos no exception."""
    max_zoom: float = Field(0.6, ge=0, le=1)
    """Largest share of that margin, or excess, that zooming in takes (paper's code: 0.6 of the margin)."""
    resize: Literal["antialiased", "published"] = "antialiased"
    """How a view comes to its size. `antialiased`: area averaging where it shrinks, cubic where it grows. `published`, as in the
    paper's code: bilinear without antialias."""
    max_enlargement: float | None = Field(None, gt=0)
    """How much larger than its window a view may be: 2 zooms in no further than to half of a view's px, and fails samples of
    photos that are smaller with code enlarged. By default as far as `max_zoom` says: small photos are resized up."""
    no_square: Literal["reflect", "reject"] = "reflect"
    """Where no square inside the photo holds the extended box: pad by reflection, or fail the sample with code no_square."""
    keep: tuple[str, ...] = ("validation",)
    """Splits whose samples keep view.jpg, the ground truth for pictures and metrics."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Width and height of all shapes that views may have, px."""
        return self.buckets or ((self.size, self.size),)

    def least_side(self, shape: Shape) -> int:
        """Px of the longer side of the smallest window that may become a view of this shape."""
        return math.ceil(max(shape) / self.max_enlargement) if self.max_enlargement else 0

    @property
    def nominal_size(self) -> int:
        """Side of the square that is as large as the largest view, px."""
        return square_side(self.shapes)

    @model_validator(mode="after")
    def _aspects_differ(self) -> "ViewSettings":
        aspects: dict[Fraction, Shape] = {}
        for shape in self.buckets or ():
            if min(shape) < 16:
                raise ValueError(f"bucket {list(shape)}: both sides must be 16 px or more")
            if (other := aspects.setdefault(Fraction(*shape), shape)) != shape or list(self.buckets or ()).count(shape) > 1:
                raise ValueError(f"buckets {list(other)} and {list(shape)} have one aspect: photos could go to either; keep one")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Written as before there were these settings, so that builds without them are the same bytes."""
        return leave_out(write(self), {"buckets": None, "max_enlargement": None})


class MaskSettings(Group):
    """Edit regions drawn for each view."""

    per_view: int = Field(2, ge=1)
    """Masks of each view (K); the trainer takes one of them at each use."""
    arbitrary_mask_prob: float = Field(0.5, ge=0, le=1)
    """Probability that a mask is an arbitrary shape of Bessel curves; otherwise it is the extended box (paper: 0.5)."""
    max_extension: float = Field(0.4, ge=0, le=1)
    """Largest share of the free space on each side that the extended box takes (paper's code: 0.4)."""
    jitter: tuple[int, int] = (1, 5)
    """Smallest and largest offset of each point along each axis in photo px (paper: 1 to 5)."""

    @model_validator(mode="after")
    def _ordered(self) -> "MaskSettings":
        if not 0 <= self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter must be two numbers with 0 <= smallest <= largest, not {list(self.jitter)}")
        return self


class ReferenceSettings(Group):
    """The crop that shows the object."""

    padding: int = Field(10, ge=0)
    """Photo px added to the box on each side (paper's code: 10)."""
    side: int = Field(224, ge=16)
    """References are shrunk until their shorter side is this many px: what CLIP sees of each side, whatever the aspect was."""
    max_side: int = Field(448, ge=16)
    """And until their longer side is this many px."""
    resize: Literal["antialiased", "published"] = "antialiased"
    """`antialiased`: shrunk as said above, their aspect kept; the trainer makes a square of it. `published`, as in the
    paper's code: that square at once, `side` x `side` px, bilinear without antialias, whatever `max_side` is. The aspect is gone
    then, so that such a dataset cannot be trained on with model.reference_geometry: pad."""
    background: Literal["keep", "grey"] = "keep"
    """`grey` paints over what is not the object, where the source has the object's mask; elsewhere the crop stays as it is.
    Objects that are too little of their reference are rejected then: selection.min_object_share."""
    others: int = Field(0, ge=0, le=16)
    """References of each object from other photos of the same instance (ref_1.jpg, ...), beside the crop of its own, at most;
    drawn by a seeded hash among the boxes of its group. A table of pairs names them itself (docs/own-data.md)."""
    frames: tuple[int, int] | None = None
    """Smallest and largest distance of frame numbers between a photo and its reference, by the digits at the end of their names
    (video_7/000123.jpg); photos of other folders and names without digits are no references then. Null: any other photo."""
    alone: Literal["own", "reject"] = "own"
    """What becomes of an object that no other photo shows: it has the crop of its `own`, or it is rejected (`no_other_photo`)."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out(write(self), {"others": 0, "frames": None, "alone": "own"})

    @model_validator(mode="after")
    def _ordered(self) -> "ReferenceSettings":
        if self.frames and not 0 <= self.frames[0] <= self.frames[1]:
            raise ValueError(f"frames must be two numbers with 0 <= smallest <= largest, not {list(self.frames)}")
        if self.frames and not self.others:
            raise ValueError("frames is about references from other photos, and references.others is 0; set it to 1 or more")
        return self


class LatentSettings(Group):
    """The VAE that encodes views and masked views."""

    vae: str = "CompVis/stable-diffusion-v1-4"
    """Folder or hub id of an AutoencoderKL or AutoencoderTiny, or of a pipeline that has one in its folder `vae`; or the folder
    of TAEF2's two files."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoder; bf16 is several times faster on GPUs. Never chosen by the machine: it changes the latents."""
    batch_size: int = Field(8, ge=1)
    """Pictures encoded at once (at least one sample's). Fixed, so that the bytes do not depend on the number of workers."""
    threads: int = Field(1, ge=1)
    """CPU threads of each encoder. Fixed for the same reason."""
    compile: bool = False
    """Whether torch.compile makes the encoder faster: worth its first minutes on GPUs. It changes the latents' last bits. All
    batches have one size then: the last one of a shard is filled up."""


class ShardSettings(Group):
    """How samples are cut into tars."""

    samples: int = Field(1000, ge=1)
    """Samples per shard; the last one of a split may hold fewer."""


class RaySettings(Group):
    """Where the work runs. Not a part of the fingerprint; a GPU's latents differ from a CPU's in the last bits."""

    address: str | None = None
    """Ray cluster to join, HOST:PORT; null joins that of RAY_ADDRESS or of this machine, or starts one of its own; `local`
    always starts its own."""
    actors: int | None = Field(None, ge=1)
    """Packing actors, each with its own VAE; null means as many as the cluster's CPUs and GPUs hold."""
    cpus_per_actor: float = Field(1, gt=0)
    """CPUs reserved for each actor."""
    gpus_per_actor: float | None = Field(None, ge=0)
    """GPUs reserved for each actor; 0.5 puts two on one GPU, 0 encodes on CPUs; null is 1 where the cluster has GPUs, else 0."""
    attempts: int = Field(3, ge=1)
    """How often a shard, or a chunk of a survey, is tried before it is given up."""


class HostSettings(Group):
    """How gently each web host is treated, by all processes of all nodes together."""

    requests_per_second: float = Field(20, gt=0)
    """To one host."""
    concurrency: int = Field(10, ge=1)
    """Requests to one host at once."""
    failures: int = Field(10, ge=1)
    """After so many failures of a host in a row a process leaves it alone for 30 s, then longer each time, while others go on;
    after four such cool-downs the host's photos are left for another run."""


class CrawlSettings(Group):
    """Getting the photos of accepted objects into a photo store (docs/crawling.md). Not a part of the fingerprint."""

    sources: tuple[str, ...] = ()
    """Where photos are, tried in this order for each: a local folder, tar files (a path with * ending in .tar), a URL with
    {split}, {image_id} or {file_name} in it (s3://, gs://, https://, http://), or {url}: the URL in the photos' metadata, and
    {thumbnail_url}. Empty: source.photos is a plain folder of photos, and nothing is crawled."""
    contact: str | None = None
    """An e-mail address or web page that tells web servers' owners whom to write to; due where a source is http or https."""
    allowed_addresses: tuple[str, ...] = ()
    """Addresses that are not public and may be asked all the same: an intranet's 10.1.0.0/16, or 127.0.0.1:8000 with its port."""
    per_host: HostSettings = HostSettings()
    workers: int | None = Field(None, ge=1)
    """Crawling processes; null means one for each CPU of the cluster, and 8 at most. They divide the limits of web hosts, and are
    never more than `per_host.concurrency` or `per_host.requests_per_second`."""
    connections: int = Field(32, ge=1)
    """Photos in flight at once in each process."""
    attempts: int = Field(4, ge=1)
    """How often a photo is asked for at each source while the failure is one that may pass."""
    total_seconds: float = Field(120, gt=0)
    """Until an answer is here, redirects included."""
    slow_bytes_per_second: int = Field(1024, ge=1)
    """An answer that comes more slowly for 10 s is given up."""
    max_bytes: int = Field(50_000_000, ge=1)
    """Of one photo, as sent and as unpacked."""
    min_side: int = Field(64, ge=1)
    """Photos whose shorter side is below this, in px, are `too_small`."""
    check_originals: bool = True
    """Whether what {url} gives must have the metadata's OriginalSize and OriginalMD5."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Words of a server's X-Robots-Tag that make a photo `opted_out`."""
    photos_per_part: int = Field(500, ge=1)
    """Photos that are stored and recorded together: what a crash may cost each process."""
    storage: dict[str, dict[str, Any]] = Field({})
    """Options for object stores by protocol, as fsspec takes them: {"s3": {"anon": true}}."""


class BuildSettings(Program):
    """All settings from boxes and photos to shards. build.py, plan.py, crawl.py and survey.py share them."""

    out: Path
    """Folder of the dataset. On a cluster, one that all nodes see. Or a URL (s3://bucket/dataset): short for `upload`."""
    upload: str | None = None
    """URL of the dataset, where each file goes once it is finished. `out` is then a folder of each node's own, for what is being
    made; not given, one below ~/.cache/paint-by-example."""
    storage: dict[str, Any] = Field({})
    """Options for `upload`, as fsspec takes them for its protocol: {"endpoint_url": "https://..."}. Not kept in the dataset."""
    seed: int = Field(0, ge=0)
    """Every random choice is a function of this and of names (object, view, mask)."""
    source: SourceSettings
    selection: SelectionSettings = SelectionSettings()
    views: ViewSettings = ViewSettings()
    masks: MaskSettings = MaskSettings()
    references: ReferenceSettings = ReferenceSettings()
    latents: LatentSettings = LatentSettings()
    shards: ShardSettings = ShardSettings()
    crawl: CrawlSettings = CrawlSettings()
    ray: RaySettings = RaySettings()

    @model_validator(mode="before")
    @classmethod
    def _url_is_for_uploading(cls, values: dict[str, Any]) -> dict[str, Any]:
        url = values.get("out") if is_url(values.get("out")) else values.get("upload")
        if not url:
            return values
        if url == values.get("out") and values.get("upload") not in (None, url):
            raise ValueError("out and upload name two URLs; give one of them, or a local folder as out")
        here = values.get("out") if values.get("out") and url != values.get("out") else work_folder(url)
        return {**values, "out": here, "upload": url}

    def told(self) -> dict[str, Any]:
        """All settings as a dataset keeps them: without what may hold keys and passwords, and without whom to write to."""
        hidden: Any = {"storage": True, "source": {"storage"}, "crawl": {"storage", "contact"}}
        told = self.model_dump(mode="json", exclude=hidden)
        told["upload"] = public_url(told["upload"]) if told["upload"] else None
        if reader_of(self.source.kind).file:
            # Whoever looks at the dataset's photos may not have this reader.
            told["source"]["frame"] = self.source.photo_frame
        told["crawl"]["sources"] = [public_url(source) for source in told["crawl"]["sources"]]
        return told


def work_folder(url: str) -> Path:
    """Where a machine keeps what belongs to a URL."""
    return Path.home() / ".cache" / "paint-by-example" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def with_absolute_paths(settings: BuildSettings) -> BuildSettings:
    """The same settings for processes that run in another folder: Ray's workers start where their cluster was started."""
    source = settings.source
    folders = {"annotations": source.annotations.resolve(), "photos": source.photos.resolve()}
    if source.survey:
        folders["survey"] = source.survey.resolve()
    changed = {"out": settings.out.resolve(), "source": source.model_copy(update=folders)}
    vae = Path(settings.latents.vae)
    if vae.is_dir():
        changed["latents"] = settings.latents.model_copy(update={"vae": str(vae.resolve())})
    return settings.model_copy(update=changed)
