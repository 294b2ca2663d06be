"""The fitted score: standardised on reference answers, on disk and back, clipped to what votes covered."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import learner.reward.linear_reward_model as linear_reward_model
from learner.model.features import FeatureSpec
from learner.reward.likelihood import A, B
from learner.reward.linear_heads import VoteTensors
from learner.reward.linear_reward_model import LinearRewardModel, evaluate
from learner.reward.standardiser import Mix, Standardiser, mixes, standardiser, usual_mix
from learner.settings import RewardSettings


def model(**changes: object) -> LinearRewardModel:
    whole = LinearRewardModel(
        spec=FeatureSpec(meaning=(1, 2)),
        standardiser=Standardiser(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])),
        weights=torch.tensor([1.0, -1.0]),
        members=torch.tensor([[1.0, 0.0], [0.5, -1.0]]),
        member_bias=torch.tensor([0.0, 1.0]),
        bias=0.5,
        low=-3.0,
        high=4.0,
        thumb_bar=0.25,
        bad_bar=-1.0,
        eta=0.5,
        temperature=0.4,
        l2=1.0,
        prompt_mean=torch.zeros(1),
        prompt_scale=torch.zeros(1),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_the_score_by_hand() -> None:
    # (2 - 1) * 2 * 1 + 1.5 * -1 + 0.5
    assert model().scores(torch.tensor([[2.0, 1.5]])).tolist() == [1.0]
    assert model().clipped(torch.tensor([-9.0, 1.0, 9.0])).tolist() == [-3.0, 1.0, 4.0]


def test_the_members_scores_by_hand() -> None:
    # (2 - 1) * 2 = 2 and 1.5: 2 * 1, and 2 * 0.5 - 1.5 + 1.
    assert model().member_scores(torch.tensor([[2.0, 1.5]])).tolist() == [[2.0], [0.5]]


def test_members_agree_on_the_reference_and_keep_their_differences() -> None:
    features = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    after = model().standardised(features, features[:, :1])
    assert after.member_scores(features).mean(dim=1).tolist() == pytest.approx([0, 0], abs=1e-5)
    # They share one unit: a member with larger differences keeps them.
    sd = model().scores(features).std()
    assert torch.allclose(after.member_scores(features).std(dim=1) * sd, model().member_scores(features).std(dim=1))


def test_members_differ_where_votes_say_little(make_votes: Callable[..., VoteTensors]) -> None:
    """Members differ by noise along a direction that no voted answer took; along the voted one they agree."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 0.02, 0.0])
    pairs = [(2 * i, 2 * i + 1, A if features[2 * i, 0] > features[2 * i + 1, 0] else B) for i in range(100)]
    fitted = LinearRewardModel.fit(features, make_votes(pairs), FeatureSpec(meaning=(1,)), RewardSettings(), generator)
    known, unknown = fitted.member_scores(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])).unbind(dim=1)
    assert known.mean() > 5 * known.std()
    assert unknown.std() > known.std()


def test_standardised_scores_have_mean_0_and_sd_1_and_probabilities_stay() -> None:
    features = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    before, after = model(), model().standardised(features, features[:, :1])
    scores = after.scores(features)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)
    sd = before.scores(features).std().item()
    for bar in ("thumb_bar", "bad_bar", "low", "high"):
        margin = before.scores(features[:1]).item() - getattr(before, bar)
        assert (after.scores(features[:1]).item() - getattr(after, bar)) * sd == pytest.approx(margin, abs=1e-4)
    assert after.eta * sd == pytest.approx(before.eta)
    assert after.temperature * sd == pytest.approx(before.temperature)


def test_a_prompt_lets_expect_what_reference_answers_to_such_prompts_scored() -> None:
    generator = torch.Generator().manual_seed(0)
    features, prompts = torch.randn(200, 3, generator=generator), torch.randn(200, 2, generator=generator)
    # Answers have half of what their prompt has, in another unit.
    features[:, :2] += prompts
    prompts = 10 * prompts + 5
    head = {"weights": torch.tensor([1.0, -1.0, 0.2]), "members": torch.randn(2, 3, generator=generator)}
    scaling = Standardiser(torch.zeros(3), torch.ones(3))
    after = model(standardiser=scaling, **head).standardised(features, prompts)
    expected, scores = after.prompt_features(prompts) @ after.weights[:-1], after.scores(features)
    assert expected.mean().item() == pytest.approx(0, abs=1e-4)
    # The least squares line, whose residuals and predictions are uncorrelated.
    assert (expected * (scores - expected)).mean().item() == pytest.approx(0, abs=1e-4)
    assert 0.4 < 1 - ((scores - expected).var() / scores.var()).item() < 0.6
    # Where answers have the opposite of their prompt, nothing is expected.
    assert model(standardiser=scaling, **head).standardised(-features, prompts).prompt_scale.tolist() == [0.0, 0.0]


def test_a_constant_score_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match="same score"):
        model(weights=torch.zeros(2)).standardised(torch.randn(5, 2), torch.randn(5, 1))


def test_each_kind_of_features_has_its_variance_and_length_as_much_as_all_layers() -> None:
    features = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)) * 7 + 3
    # Two early layers and one late one, of two states each, three counts, and the length.
    spec = FeatureSpec((0, 1), (5,), torch.zeros(1, 3, dtype=torch.uint8))
    assert spec.sizes(10) == (4, 2, 3)

    def variances(mix: Mix) -> list[float]:
        kinds = standardiser(features, spec, mix)(features).split([4, 2, 3, 1], dim=1)
        return [kind.square().sum(dim=1).mean().item() for kind in kinds]

    # A standard normal cut at 2 has the variance 0.92.
    assert variances(Mix(0.5, 0.5, 0.3)) == pytest.approx([0.5, 0.5, 0.3, 0.92], abs=0.05)
    assert variances(Mix(1.0, 0.0, 0.0)) == pytest.approx([1.0, 0.0, 0.0, 0.92], abs=0.05)


def test_the_mixes_are_of_the_features_that_there_are() -> None:
    counts = torch.zeros(1, 3, dtype=torch.uint8)
    both, late = FeatureSpec((0,), (5,), counts), FeatureSpec(meaning=(5,))
    assert mixes(both) == [(1, 0, 0), (1, 0, 1), (0, 1, 0), (0, 1, 1), (0.5, 0.5, 0), (0.5, 0.5, 1)]
    assert mixes(late) == [(1, 1, 0)]
    assert (usual_mix(both), mixes(FeatureSpec(meaning=(5,), surface=counts))[-1]) == ((0.5, 0.5, 0.3), (1, 1, 1))


@pytest.mark.parametrize(("column", "kind"), [(0, 0), (40, 1), (80, 2)])
def test_votes_choose_the_mix(make_votes: Callable[..., VoteTensors], column: int, kind: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # 40 states of an early layer, 40 of a late one, and 4 counts; the taste is one of them.
    features = torch.randn(400, 85, generator=generator)
    better = (features[::2, column] > features[1::2, column]).tolist()
    votes = make_votes([(2 * i, 2 * i + 1, A if won else B) for i, won in enumerate(better)])
    spec = FeatureSpec((0,), (1,), torch.zeros(1, 4, dtype=torch.uint8))
    scale = LinearRewardModel.fit(features, votes, spec, RewardSettings(), generator).standardiser.scale
    words, meaning, surface, _ = [bool(part.any()) for part in scale.split([40, 40, 4, 1])]
    assert (words, meaning, surface)[kind]
    # The surface is left out where votes are not about it, and one kind of layers where they are not about the surface.
    assert surface == (kind == 2)
    assert kind == 2 or words != meaning


def test_some_of_many_votes_choose_the_mix(
    make_votes: Callable[..., VoteTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, int]] = []

    def noted(scaling: Standardiser, features: torch.Tensor, votes: VoteTensors, *_: Any) -> torch.Tensor:
        seen.append((float(scaling.scale.square().sum()), len(votes)))
        return torch.tensor([2.0, 3.0 * (len(votes) == 300), 1.0])

    monkeypatch.setattr(linear_reward_model, "validated", noted)
    monkeypatch.setattr(linear_reward_model, "SCALING_VOTES", 60)
    features, votes = torch.randn(600, 9), make_votes([(2 * i, 2 * i + 1, A) for i in range(300)])
    spec = FeatureSpec((0,), (1,))
    fitted = LinearRewardModel.fit(features, votes, spec, RewardSettings(l2_grid=(1, 2, 4)), torch.Generator())
    assert [count for _, count in seen] == [60, 60, 60, 300]
    assert (fitted.l2, seen[3][0]) == (4.0, seen[0][0])


def test_equal_lengths_say_nothing() -> None:
    features = torch.randn(50, 3)
    features[:, -1] = 4.158883
    spec = FeatureSpec(meaning=(1,))
    assert not standardiser(features, spec, usual_mix(spec))(features)[:, -1].any()


def test_a_model_of_an_earlier_version_sees_no_surface(tmp_path: Path) -> None:
    model().save(tmp_path)
    tensors = load_file(tmp_path / "head.safetensors")
    del tensors["surface"]
    save_file(tensors, tmp_path / "head.safetensors")
    description = json.loads((tmp_path / "reward_model.json").read_text())
    layers = {"layers": description.pop("meaning"), **description}
    del layers["words"]
    (tmp_path / "reward_model.json").write_text(json.dumps(layers))
    spec = LinearRewardModel.load(tmp_path).spec
    assert (spec.words, spec.meaning, spec.surface.shape[1]) == ((), (1, 2), 0)


def test_what_was_saved_loads_again(tmp_path: Path) -> None:
    model().save(tmp_path)
    loaded = LinearRewardModel.load(tmp_path)
    features = torch.randn(4, 2)
    assert torch.equal(loaded.scores(features), model().scores(features))
    assert torch.equal(loaded.member_scores(features), model().member_scores(features))
    assert (loaded.spec.meaning, loaded.low, loaded.eta) == ((1, 2), -3.0, 0.5)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_taste_is_learned_and_beats_length(make_votes: Callable[..., VoteTensors]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 13, generator=generator)
    better = (features[::2, 0] + features[::2, 1] > features[1::2, 0] + features[1::2, 1]).tolist()
    pairs = [(2 * i, 2 * i + 1, A if won else B) for i, won in enumerate(better)]
    train, held_out = make_votes(pairs[:120]), make_votes(pairs[120:])
    fitted = LinearRewardModel.fit(features, train, FeatureSpec(meaning=(1,)), RewardSettings(), generator)
    figures = evaluate(fitted, features, held_out)
    assert figures.accuracy > 0.8 > 0.65 > figures.longer_wins
    scores = fitted.scores(features[:240])
    assert 0.01 < (scores < fitted.low).float().mean().item() < 0.03
    assert 0.01 < (scores > fitted.high).float().mean().item() < 0.03


def test_a_very_short_answer_is_no_shorter_than_two_standard_deviations() -> None:
    standard = Standardiser(torch.zeros(2), torch.ones(2))(torch.tensor([[9.0, -10.0], [0.0, 1.5], [0.0, 7.0]]))
    assert standard.tolist() == [[9.0, -2.0], [0.0, 1.5], [0.0, 2.0]]
