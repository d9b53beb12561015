"""Judges see what the programs see that published numbers come from, whatever is beside a picture; other files are refused."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from pbe_core.errors import InputError
from pbe_core.images import AnyPhoto
from pbe_core.judges.inception import BLOCKS, POOLS, Inception, folded, prepare_clean, prepare_legacy
from pbe_core.judges.judge import Judge, load_judge
from pbe_core.judges.mobilenet import mobilenet
from pbe_core.judges.transformers_judges import CLIP_MEAN, CLIP_STD, Preparation, positions_for
from pbe_core.vae import load_network, weights_sha256
from tests.compat.judge_files import inception_tensors, mobilenet_tensors
from tests.hub_server import HubServer

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}


def photo(height: int, width: int, seed: int = 0) -> AnyPhoto:
    """Smooth, with sharp edges and noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse, np.int16) + random.integers(-9, 10, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 :] = (255, 0, 120)
    return pixels.clip(0, 255).astype(np.uint8)


PHOTOS = [photo(120, 160), photo(90, 61, 1), photo(300, 299, 2)]


@functools.cache
def _inception(seed: int) -> dict[str, Tensor]:
    return inception_tensors(seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One judge of each kind, small or with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    torch.save(_inception(1), folder / "inception.pth")
    save_file({name: value.half() for name, value in mobilenet_tensors().items()}, folder / "mobilenet.safetensors")
    torch.manual_seed(0)
    clip = CLIPVisionConfig(**VISION, image_size=56, projection_dim=24)
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**VISION, image_size=70)).save_pretrained(folder / "dinov2")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2])).save_pretrained(folder / "resnet")
    return folder


WHERE = {
    "inception-clean": "inception.pth",
    "inception-legacy": "inception.pth",
    "mobilenet": "mobilenet.safetensors",
    "clip": "clip",
    "dinov2": "dinov2",
    "resnet": "resnet",
}


@pytest.fixture(scope="module")
def judges(files: Path) -> dict[str, Judge]:
    return {kind: load_judge(f"{kind}={files / where}") for kind, where in WHERE.items()}


def test_inception_is_that_of_torch_fidelity():
    """What torch-fidelity 0.4.0 gives with these weights; `python -m tests.compat.judges` compares all features."""
    recorded = [6.8662024, 9.9215183, 1.668681, 0.0495706, 0.0, 2.5348167]
    pictures = np.random.default_rng(5).integers(0, 256, (2, 3, 299, 299), np.uint8)
    network = Inception()
    network.load_state_dict(_inception(1), strict=False)
    with torch.inference_mode():
        inputs = (torch.from_numpy(pictures).float() - 128) / 128
        plain = network.eval()(inputs[:1])
        seen = folded(network)(inputs.to(memory_format=torch.channels_last))
    assert (seen[:1] - plain).abs().max() <= 1e-5 * plain.max()
    assert seen[0, [0, 400, 1000, 1300, 1900, 2047]].tolist() == pytest.approx(recorded, abs=1e-5 * 27.9)
    assert seen.double().sum(1).tolist() == pytest.approx([5269.934175, 5247.726764], rel=1e-6)


def test_pools_of_inception():
    """Padding counts in no mean; the last block alone has a maximum beside its convolutions."""
    corner = torch.zeros(1, 1, 5, 5)
    corner[..., 0, 0] = 9
    assert POOLS["average"](corner)[0, 0, 0, :3].tolist() == [9 / 4, 9 / 6, 0]
    assert POOLS["maximum"](corner)[0, 0, :3, 0].tolist() == [9, 9, 0]
    pools = {name: paths["branch_pool"][0] for name, (paths, _) in BLOCKS.items()}
    assert [name for name, pool in pools.items() if pool == "maximum"] == ["Mixed_7c"]
    assert [name for name, pool in pools.items() if pool == "halving"] == ["Mixed_6a", "Mixed_7a"]


@pytest.mark.parametrize("size", [(299, 299), (120, 160), (600, 411)])
def test_preparations_of_inception(size: tuple[int, int]):
    picture = photo(*size)
    clean, legacy = prepare_clean(picture) * 128 + 128, (prepare_legacy(picture) + 1) * 127.5
    if size == (299, 299):
        own = picture.transpose(2, 0, 1)
        assert np.abs(clean - own).max() < 1e-4
        assert np.abs(legacy - own).max() < 1e-4
    # As Pillow resizes bytes, but for its rounding; and as torch does, in numbers of numpy: each from the two nearest.
    rounded = np.asarray(Image.fromarray(picture).resize((299, 299), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)
    # Pillow clips bytes between its two passes, too: that shows at sharp edges.
    assert (np.abs(clean - rounded) <= 1.01).mean() > 0.98
    assert clean.min() >= 0
    assert clean.max() <= 255
    assert size == (299, 299) or (clean % 1 != 0).mean() > 0.5
    places = [((np.arange(299) + 0.5) * side / 299 - 0.5).clip(0) for side in size]
    rows, columns = (np.minimum(place.astype(int), side - 1) for place, side in zip(places, size, strict=True))
    below, right = (np.minimum(low + 1, side - 1) for low, side in zip((rows, columns), size, strict=True))
    down, along = (places[0] - rows)[:, None, None], (places[1] - columns)[None, :, None]
    top = picture[rows][:, columns] * (1 - along) + picture[rows][:, right] * along
    bottom = picture[below][:, columns] * (1 - along) + picture[below][:, right] * along
    assert np.abs((top * (1 - down) + bottom * down).transpose(2, 0, 1) - legacy).max() < 1e-2


def test_features_do_not_depend_on_neighbours(judges: dict[str, Judge]):
    for kind, judge in judges.items():
        prepared = np.stack([judge.prepare(picture) for picture in PHOTOS])
        size = judge.identity.input_size
        assert prepared.shape == (3, 3, size, size)
        assert prepared.dtype == np.float32
        together = judge.embed(prepared)
        assert together.shape == (3, judge.identity.width)
        assert together.dtype == np.float32
        alone = np.concatenate([judge.features([picture]) for picture in PHOTOS])
        assert np.abs(together - alone).max() <= 1e-6 * np.abs(together).max(), kind
        assert np.abs(together[0] - together[1]).max() > 1e-3 * np.abs(together).max(), kind
        assert np.array_equal(judge.features(PHOTOS), together)


def test_identities(judges: dict[str, Judge], files: Path):
    tensors = _inception(1)
    clean, legacy = judges["inception-clean"].identity, judges["inception-legacy"].identity
    assert clean.sha256 == legacy.sha256 == weights_sha256(tensors)
    assert clean.preparation != legacy.preparation
    assert clean.source == str(files / "inception.pth")
    assert (clean.input_size, clean.width) == (299, 2048)
    # Another file of the same numbers, with counters as PyTorch writes them, is the same judge under another name.
    counters = {
        f"{name.removesuffix('.weight')}.num_batches_tracked": torch.tensor(0) for name in tensors if ".bn.weight" in name
    }
    save_file({**tensors, **counters}, files / "inception.safetensors")
    other = load_judge(f"second:inception-clean={files / 'inception.safetensors'}").identity
    assert other == clean.model_copy(update={"name": "second", "source": other.source})


def test_clip_is_known_as_conditioner(judges: dict[str, Judge], files: Path, tmp_path: Path):
    """A run notes the hash of its encoder, which has no projection; in half precision it is no other network."""
    clip = judges["clip"]
    encoder = load_network(CLIPVisionModel, str(files / "clip"), "image_encoder")
    assert weights_sha256(encoder.state_dict()) in clip.encoder_hashes
    assert weights_sha256(encoder.half().state_dict()) in clip.encoder_hashes
    assert clip.identity.sha256 not in clip.encoder_hashes
    stored = load_file(files / "clip" / "model.safetensors")
    assert clip.identity.sha256 == weights_sha256(stored)
    assert not judges["dinov2"].encoder_hashes
    other = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, image_size=56, projection_dim=24))
    other.save_pretrained(tmp_path)
    assert not load_judge(f"clip={tmp_path}").encoder_hashes & clip.encoder_hashes


def test_clip_embeds_as_transformers_does(judges: dict[str, Judge], files: Path, tmp_path: Path):
    """Also out of a whole CLIP, whose text model is left alone."""
    vision = {**VISION, "image_size": 56}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, "projection_dim": 24}, projection_dim=24)).eval()
    whole.save_pretrained(tmp_path)
    judge = load_judge(f"clip={tmp_path}")
    prepared = np.stack([judge.prepare(picture) for picture in PHOTOS])
    with torch.inference_mode():
        seen = whole.vision_model(pixel_values=torch.from_numpy(prepared)).pooler_output
        expected = whole.visual_projection(seen).numpy()
    assert np.abs(judge.embed(prepared) - expected).max() < 1e-5
    assert judge.identity.width == 24


@pytest.mark.parametrize("size", [(224, 224), (300, 231), (97, 640), (1, 3), (512, 509)])
def test_clip_prepares_as_transformers_does(size: tuple[int, int]):
    picture = photo(*size) if min(size) > 9 else np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    seen = Preparation(224, 224, CLIP_MEAN, CLIP_STD)(picture)
    expected = CLIPImageProcessor()(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    assert np.abs(seen - expected).max() < 1e-5


def test_clip_is_prepared_as_its_file_says(files: Path, tmp_path: Path):
    CLIPVisionModelWithProjection.from_pretrained(files / "clip").save_pretrained(tmp_path)
    content = {"size": {"shortest_edge": 64}, "crop_size": 56, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    judge = load_judge(f"clip={tmp_path}")
    assert "bilinear" in judge.identity.preparation
    assert "short side to 64 px, centre crop of 56 px" in judge.identity.preparation
    resized = np.asarray(Image.fromarray(PHOTOS[2]).resize((64, 64), Image.Resampling.BILINEAR), np.float32)[4:60, 4:60]
    assert np.abs(judge.prepare(PHOTOS[2]) - ((resized / 255 - 0.5) / 0.25).transpose(2, 0, 1)).max() < 1.01 / 255 / 0.25
    for wrong in ({**content, "do_center_crop": False}, {**content, "crop_size": 48}, {**content, "size": "large"}, []):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"preprocessor_config\.json: (not CLIP's way|damaged)"):
            load_judge(f"clip={tmp_path}")


def test_clip_from_the_hub(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What prepares its pictures comes with it."""
    model = CLIPVisionModelWithProjection.from_pretrained(files / "clip")
    model.save_pretrained(tmp_path / "there")
    content = {"size": 60, "crop_size": 56}
    (tmp_path / "there" / "preprocessor_config.json").write_text(json.dumps(content))
    with HubServer(tmp_path / "there") as server:
        server.use(monkeypatch, tmp_path / "cache")
        judge = load_judge("clip=someone/clip")
    assert "short side to 60 px" in judge.identity.preparation
    assert judge.identity.source == "someone/clip"


def test_dinov2_is_that_of_the_published_code(judges: dict[str, Judge], files: Path):
    """The class token after the last norm, of the whole picture in 224 px, with positions stretched as published."""
    judge, model = judges["dinov2"], Dinov2Model.from_pretrained(files / "dinov2").eval()
    prepared = judge.prepare(PHOTOS[0])
    resized = np.asarray(Image.fromarray(PHOTOS[0]).resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
    assert np.abs(prepared - ((resized - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).transpose(2, 0, 1)).max() < 1e-5
    stored = model.embeddings.position_embeddings.detach()
    assert np.array_equal(positions_for(stored, 5), stored)
    model.embeddings.position_embeddings = torch.nn.Parameter(positions_for(stored, 16))
    with torch.inference_mode():
        expected = model(pixel_values=torch.from_numpy(prepared)[None]).pooler_output.numpy()
    assert np.abs(judge.features([PHOTOS[0]]) - expected).max() < 1e-5


def test_resnet_gives_the_mean_of_its_last_map(judges: dict[str, Judge], files: Path):
    """Of the whole picture; and its batch norms are at rest, so that no picture changes another's features."""
    judge, model = judges["resnet"], ResNetModel.from_pretrained(files / "resnet").eval()
    prepared = judge.prepare(PHOTOS[0])
    assert np.array_equal(prepared, judges["dinov2"].prepare(PHOTOS[0]))
    with torch.inference_mode():
        expected = model(pixel_values=torch.from_numpy(prepared)[None]).pooler_output.flatten(1).numpy()
    assert judge.identity.width == 24
    assert np.abs(judge.features(PHOTOS)[:1] - expected).max() < 1e-5


def test_positions_stretch_by_the_published_factor():
    """Cubic interpolation gives a ramp back, to 0.06: the values are the places that were looked at. 37 patches become 16."""
    down, along = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    stored = torch.cat([torch.full((1, 1, 2), 5.0), torch.stack([down, along], -1).reshape(1, -1, 2)], 1)
    used = positions_for(stored, 16)
    assert used.shape == (1, 257, 2)
    assert used[0, 0].tolist() == [5, 5]
    places = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    grid = used[0, 1:].reshape(16, 16, 2).numpy()
    assert np.abs(grid[1:-1, 0, 0] - places[1:-1]).max() < 0.06
    assert np.abs(grid[0, 1:-1, 1] - places[1:-1]).max() < 0.06
    # By the size in place of the factor, the last would be a fifth of a patch farther on.
    assert (np.arange(16) + 0.5)[-2] * 37 / 16 - 0.5 > grid[-2, 0, 0] + 0.15


def test_mobilenet_is_padded_as_tensorflow_does():
    """With stride 2 on the right and below only; how many of nine places a corner sees tells. Nothing passes 6."""
    network = mobilenet()
    halving = [number for number, layer in enumerate(network) if isinstance(layer, torch.nn.ZeroPad2d)]
    assert halving == [0, 9, 21, 33, 69]
    for number in (0, 3, 9, 21, 33, 69, 75):
        convolution = network[number + 1]
        assert isinstance(convolution, torch.nn.Conv2d)
        torch.nn.init.constant_(convolution.weight, 1 / convolution.weight[0, :, 0, 0].numel())
        torch.nn.init.zeros_(convolution.bias)
        seen = network[number : number + 2](torch.ones(1, convolution.in_channels, 14, 14))[0, 0]
        side, corners = (7, (9, 4)) if number in halving else (14, (4, 4))
        assert seen.shape == (side, side)
        assert (seen[0, 0].item(), seen[-1, -1].item()) == pytest.approx(corners)
        assert network[number + 2](9 * torch.ones(1)).item() == 6
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)


def test_mobilenet_sees_the_centre_square(judges: dict[str, Judge]):
    wide = photo(224, 321)
    prepared = judges["mobilenet"].prepare(wide)
    assert np.abs((prepared + 1) * 127.5 - wide[:, 48:272].transpose(2, 0, 1)).max() < 1e-3
    assert np.array_equal(judges["mobilenet"].prepare(wide.transpose(1, 0, 2)), prepared.transpose(0, 2, 1))


def test_the_small_real_judge(real_data: Path):
    """It knows categories of real photos, as its README says (80.8 % of 120 photos in 40 categories)."""
    judge = load_judge(f"mobilenet={real_data / 'judge' / 'mobilenet_v1_imagenet_fp16.safetensors'}")
    categories = sorted(path for path in (real_data / "caltech101").rglob("*") if len(list(path.glob("*.jpg"))) >= 5)[:12]
    if len(categories) < 8:
        pytest.skip("no Caltech-101 with 5 photos in each of 8 categories")
    paths = [path for category in categories for path in sorted(category.glob("*.jpg"))[:5]]
    features = judge.features([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    assert features.min() >= 0
    assert features.max() > 1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    asked = np.arange(len(paths)) % 5 >= 3
    nearest = (unit[asked] @ unit[~asked].T).argmax(1)
    right = np.arange(len(paths))[~asked][nearest] // 5 == np.arange(len(paths))[asked] // 5
    assert right.mean() >= 0.7


def _saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _changed(name: str, value: Tensor | None) -> bytes:
    tensors = {**_inception(1)}
    tensors.pop(name)
    return _saved(tensors if value is None else {**tensors, name: value})


FIRST = "Conv2d_1a_3x3.conv.weight"
WRONG = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "a pointer of Git LFS"),
    "page": (b"<!DOCTYPE html><html>", "an HTML page"),
    "code": (_saved({"a": Path("x")}), "no state dict of tensors alone"),
    "cut": (_saved({"a": torch.ones(90)})[:-40], "no state dict of tensors alone, damaged, or cut short"),
    "empty dict": (_saved({"epoch": 3}), "holds no named tensors"),
    "list": (_saved([torch.ones(3)]), "holds no named tensors"),
}
DAMAGED = {
    "missing": (FIRST, None, f"1 tensor missing, first {FIRST}$"),
    "shape": (FIRST, torch.ones(32, 4, 3, 3), f"1 tensor of another shape, first {FIRST}: 32 x 4 x 3 x 3, not 32 x 3 x 3 x 3$"),
    "torchvision's": ("fc.bias", torch.ones(1000), "first fc.bias: 1000, not 1008$"),
    "infinite": (
        "Mixed_7c.branch_pool.bn.bias",
        torch.full((192,), np.inf),
        r"not finite, first Mixed_7c\.branch_pool\.bn\.bias",
    ),
}


@pytest.mark.parametrize("what", [*WRONG, *DAMAGED])
def test_files_that_are_no_inception(what: str, tmp_path: Path):
    if what in WRONG:
        content, said = WRONG[what]
    else:
        name, value, said = DAMAGED[what]
        content = _changed(name, value)
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load_judge(f"inception-clean={tmp_path / 'weights.pth'}")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "weights.pth") in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("clip", "not of the form KIND=WHERE .* kinds are inception-clean, inception-legacy, clip, dinov2, resnet, mobilenet"),
        ("clip=", "not of the form KIND=WHERE"),
        ("vgg=x", "no kind vgg; kinds are inception-clean"),
        ("=x", "no kind"),
        ("a b:clip=x", "'a b' is no name"),
        (":clip=x", "'' is no name"),
        (
            "mobilenet=nowhere/x.safetensors",
            "nowhere/x.safetensors: no such file; where it comes from is described in docs/evaluation.md",
        ),
        ("mobilenet={files}", "is a folder; name the file"),
        (
            "mobilenet={files}/inception.pth",
            r"not the weights of MobileNet v1 .*: 54 tensors missing, first 1\.weight; .* too many",
        ),
        (
            "inception-legacy={files}/mobilenet.safetensors",
            "not the weights of FID's Inception v3 .* missing, first Conv2d_1a_3x3",
        ),
        ("clip={files}/dinov2", "a network of the type dinov2, not a CLIP"),
        ("resnet={files}/clip", "a network of the type clip_vision_model, not a ResNet"),
        ("dinov2={files}/clip", "a network of the type clip_vision_model, not a DINOv2"),
        ("clip={files}", r"no CLIPVisionModelWithProjection here: there is no config\.json"),
        ("clip={files}/inception.pth", "is a file; give the folder"),
    ],
)
def test_specs_that_name_no_judge(spec: str, said: str, files: Path):
    with pytest.raises(InputError, match=said) as caught:
        load_judge(spec.format(files=files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "network"), [("clip", CLIPVisionModelWithProjection), ("dinov2", Dinov2Model), ("resnet", ResNetModel)]
)
def test_damaged_folders(kind: str, network: type, files: Path, tmp_path: Path):
    tensors = load_file(files / kind / "model.safetensors")
    config = json.loads((files / kind / "config.json").read_text())
    name = next(
        name for name in tensors if name.endswith(("patch_embedding.weight", "projection.weight", "embedder.convolution.weight"))
    )
    changes = {
        "1 tensor of the .* missing, first ": {key: value for key, value in tensors.items() if key != name},
        "1 tensor with numbers that are not finite, first ": {**tensors, name: tensors[name] * np.nan},
        "cannot load a .*": {**tensors, name: torch.ones(1, 2, 3, 4)},
    }
    for said, changed in changes.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=said) as caught:
            load_judge(f"{kind}={tmp_path}")
        assert "\n" not in str(caught.value)


def test_a_configuration_of_fewer_layers_than_the_weights_have_is_no_network_of_its_own(tmp_path: Path):
    """It would judge, as another function; what a file holds beside the network (a classifier, CLIP's text model) is no fault."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    assert load_judge(f"resnet={tmp_path}").identity.width == 8
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "depths": [1, 1]}))
    with pytest.raises(InputError, match=r"10 tensors that its config\.json has no place for"):
        load_judge(f"resnet={tmp_path}")


def test_a_resnet_without_counts_of_training_steps_is_the_same_judge(tmp_path: Path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")).save_pretrained(tmp_path)
    before, path = load_judge(f"resnet={tmp_path}"), tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "num_batches" not in name}, path, {"format": "pt"})
    assert load_judge(f"resnet={tmp_path}").identity == before.identity
