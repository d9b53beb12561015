"""The judges in the repository: small, independent of the conditioner's encoder, and as good as the README says."""

import json

import numpy as np
import pytest
import torch

from tiny_world import train_judges
from tiny_world.kinds import KINDS, instance
from tiny_world.make_questions import Question, questions
from tiny_world.measure import (
    WEIGHTS,
    colour_leak,
    in_another_pattern,
    in_other_colours,
    load_vae,
    megabytes,
    named_judge,
    reconstructed,
    share_recognised,
)
from tiny_world.train_vae import to_tensor

FRESH_SEED = 23
COUNT = 64
LEAST = {"shape": 0.8, "look": 0.95}


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return list(questions(COUNT, FRESH_SEED, "validation"))


@pytest.fixture(scope="module")
def recoloured() -> list[np.ndarray]:
    return [each.photo for each in questions(COUNT, FRESH_SEED, "validation", in_other_colours)]


@pytest.fixture(scope="module", params=train_judges.JUDGES)
def name(request) -> str:
    return request.param


def test_weights_are_small_of_another_kind_than_the_encoder_and_name_no_machine(name: str) -> None:
    assert megabytes(WEIGHTS / "judges" / name) < 0.7
    config = json.loads((WEIGHTS / "judges" / name / "config.json").read_text())
    assert config["model_type"] == "resnet"
    assert not config.get("_name_or_path")
    assert "/" not in json.dumps(config)
    assert named_judge(name).encoder_hashes == frozenset()


def test_judges_recognise_fresh_individuals_also_through_the_autoencoder(name: str, asked: list[Question]) -> None:
    judge = named_judge(name)
    photos = [each.photo for each in asked]
    assert share_recognised(judge, asked, photos) >= LEAST[name]
    views = reconstructed(load_vae(), to_tensor(photos)).permute(0, 2, 3, 1)
    assert share_recognised(judge, asked, list(((views + 1) * 127.5).to(torch.uint8).numpy())) >= LEAST[name] - 0.06


def test_what_is_not_there_is_not_recognised(name: str, asked: list[Question]) -> None:
    """The grey of a region that nobody painted."""
    judge = named_judge(name)
    assert share_recognised(judge, asked, [np.where(each.mask[..., None], np.uint8(127), each.photo) for each in asked]) < 0.4


def test_the_judge_of_shapes_sees_no_colour_and_hardly_a_pattern(asked: list[Question], recoloured: list[np.ndarray]) -> None:
    judge = named_judge("shape")
    assert colour_leak(judge, [each.photo for each in asked[:4]]) < 1e-5
    in_patterns = [each.photo for each in questions(COUNT, FRESH_SEED, "validation", in_another_pattern)]
    for disguised in (in_patterns, recoloured):
        assert not any(np.array_equal(photo, each.photo) for photo, each in zip(disguised, asked, strict=True))
        assert share_recognised(judge, asked, disguised) >= LEAST["shape"] - 0.1


def test_the_judge_of_looks_sees_colours(asked: list[Question], recoloured: list[np.ndarray]) -> None:
    """Otherwise the test above would pass for any judge that sees nothing."""
    judge = named_judge("look")
    assert colour_leak(judge, [each.photo for each in asked[:4]]) > 0.1
    assert share_recognised(judge, asked, recoloured) < 0.5


def test_a_finished_judge_gives_what_the_network_in_training_gave() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(3, 3, 64, 64)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (train_judges.MEAN, train_judges.STD))
    shares = torch.tensor(train_judges.GREY)[:, None, None] / std
    grey = (pictures * shares).sum(1, keepdim=True) / shares.sum()
    for channels, shown in ((3, pictures), (1, grey)):
        network = train_judges.tiny_judge(channels).eval()
        with torch.no_grad():
            wanted = network(train_judges.normalised(shown)).last_hidden_state
            found = train_judges.finished_judge(network)((pictures - mean) / std).last_hidden_state
        torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
        other = train_judges.tiny_judge(channels).eval()
        train_judges.go_on_from(other, train_judges.finished_judge(network))
        with torch.no_grad():
            torch.testing.assert_close(other(train_judges.normalised(shown)).last_hidden_state, wanted, atol=0.02, rtol=0.02)


def test_kernels_are_exact_in_half_precision_times_what_the_judge_sees_of_each_channel() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 0, 1000)
    rounded = train_judges.significant(values, train_judges.KERNEL_BITS)
    torch.testing.assert_close(rounded, values, atol=2**-20, rtol=2**-8)
    for share in train_judges.GREY:
        assert torch.equal((rounded * share).half().double(), rounded.double() * share)


def test_no_individual_of_the_judges_is_one_that_is_asked_for() -> None:
    splits = ("train", "validation")
    asked_for = {instance(0, split, kind, number).phase for split in splits for kind in range(len(KINDS)) for number in range(24)}
    learnt_from = [train_judges.look_individual(index, 0) for index in range(0, 1024, 7)]
    learnt_from += [train_judges.shape_individual(index, 0) for index in range(0, 4096, 61)]
    assert not asked_for & {each.phase for each in learnt_from}
    assert {each.kind for each in learnt_from} == set(range(len(KINDS)))


def test_families_share_two_colours_and_individuals_of_kinds_are_of_their_kind() -> None:
    first = train_judges.OF_KINDS
    family = [train_judges.look_individual(first + member, 0) for member in range(train_judges.FAMILY)]
    assert len({(each.first, each.second) for each in family}) == 1
    assert len({(each.kind, each.pattern_of, each.phase) for each in family}) == train_judges.FAMILY
    stranger = train_judges.look_individual(first + train_judges.FAMILY, 0)
    assert stranger.first != family[0].first
    assert train_judges.look_individual(5, 0).pattern_of is None
