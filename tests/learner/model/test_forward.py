"""Teacher-forced passes: the right token at the right place, whatever else is in the batch."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import learner.model.features as features
import learner.model.forward as forward
import server.shared.model.needs as needs
from learner.model.features import FeatureCache, FeatureSpec, default_layers, extract, pool, pool_prefixes
from learner.model.forward import micro_batches, response_states, run_trunk, shared_prefix, to_tokens, token_logprobs
from learner.model.head import head_logits
from tests.learner.conftest import EOS, WORDS

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, EOS, 13]]
SPEC = FeatureSpec(meaning=(1, 3))
RESPONSES = [[20, 21, EOS], [22, EOS, 23, 24], [25]]


def logprobs(
    model: Any, prompts: list[list[int]], responses: list[list[int]], temperature: float = 1.0
) -> torch.Tensor:
    tokens = to_tokens(prompts, responses)
    with torch.no_grad():
        return token_logprobs(model, run_trunk(model, tokens)[0], tokens, temperature)


def one_by_one(model: Any, prompt: list[int], response: list[int], temperature: float) -> list[float]:
    """The definition: at each step the whole model runs on the tokens so far, unpadded."""
    found = []
    for step, token in enumerate(response):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response[:step]])).logits[0, -1] / temperature
        found.append(logits.log_softmax(0)[token].item())
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_token_given_what_came_before(model: Any, temperature: float) -> None:
    found = logprobs(model, PROMPTS, RESPONSES, temperature)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        assert found[row, : len(response)].tolist() == pytest.approx(
            one_by_one(model, prompt, response, temperature), abs=1e-5
        )
        assert not found[row, len(response) :].any()


def test_a_real_eos_counts_though_it_equals_the_pad_id(model: Any) -> None:
    tokens = to_tokens(PROMPTS, RESPONSES)
    assert tokens.response_mask.sum(dim=1).tolist() == [3, 4, 1]
    assert logprobs(model, PROMPTS, RESPONSES)[0, 2] < 0


def test_order_and_other_rows_do_not_matter(model: Any) -> None:
    together = logprobs(model, PROMPTS, RESPONSES)
    order = [2, 0, 1]
    shuffled = logprobs(model, [PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    alone = logprobs(model, PROMPTS[:1], RESPONSES[:1])
    assert torch.allclose(alone[0], together[0, :3], atol=1e-5)


def test_cut_rows_are_the_same_rows(model: Any) -> None:
    tokens = to_tokens(PROMPTS, RESPONSES)
    part = tokens[torch.tensor([2, 0])]
    assert part.input_ids.shape == (2, 7)
    assert part.response_ids.shape == (2, 3)
    with torch.no_grad():
        found = token_logprobs(model, run_trunk(model, part)[0], part, 1.0)
    assert torch.allclose(found, logprobs(model, PROMPTS, RESPONSES)[[2, 0], :3], atol=1e-5)


def test_micro_batches_hold_every_row_once() -> None:
    # Rows of 6, 5 and 7 tokens, the shortest first; a batch costs its longest row times its rows.
    tokens = to_tokens(PROMPTS, RESPONSES)

    def rows(budget: int) -> list[list[int]]:
        return [batch.tolist() for batch in micro_batches(tokens, budget, sharing=True)]

    assert rows(21) == [[1, 0, 2]]
    assert rows(20) == rows(12) == [[1, 0], [2]]
    assert rows(11) == rows(1) == [[1], [0], [2]]


@pytest.mark.parametrize(
    ("shared", "budget", "expected"),
    [
        (100, 26, [[0, 1], [2, 3]]),  # 3 tokens of a row's own, and a tenth of 100
        (100, 25, [[0], [1], [2], [3]]),
        (9, 6, [[0, 1], [2, 3]]),
        (7, 39, [[0, 1, 2], [3]]),  # too few to be computed apart: rows of 10
    ],
)
def test_a_shared_prefix_counts_a_tenth_in_a_micro_batch(shared: int, budget: int, expected: list[list[int]]) -> None:
    tokens = to_tokens([[*range(5, 5 + shared), 200 + row] for row in range(4)], [[20, 21]] * 4)
    assert [batch.tolist() for batch in micro_batches(tokens, budget, sharing=True)] == expected


def test_a_prefix_that_is_not_shared_counts_in_every_row() -> None:
    tokens = to_tokens([[*range(5, 105), 200 + row] for row in range(4)], [[20, 21]] * 4)
    assert [rows.tolist() for rows in micro_batches(tokens, 206, sharing=False)] == [[0, 1], [2, 3]]
    assert [rows.tolist() for rows in micro_batches(tokens, 205, sharing=False)] == [[0], [1], [2], [3]]
    groups = [torch.tensor([3, 1]), torch.tensor([0])]
    assert [rows.tolist() for rows in micro_batches(tokens, 206, groups, sharing=False)] == [[3, 1], [0]]


def test_features_are_the_mean_over_the_responses_own_tokens(model: Any) -> None:
    spec = FeatureSpec(*default_layers(3))
    features = extract(model, to_tokens(PROMPTS, RESPONSES), spec, 12, lambda n: None)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0, len(prompt) :].mean(dim=0) for layer in spec.words + spec.meaning])
        assert torch.allclose(features[row, :-1], expected, atol=1e-5)
        assert features[row, -1].item() == pytest.approx(torch.tensor(float(len(response))).log().item())


def test_the_surface_of_tokens_is_a_state_like_others(model: Any) -> None:
    # Token 20 has three of something, token 22 one; the table ends before token 23.
    surface = torch.zeros(23, 2, dtype=torch.uint8)
    surface[20, 0], surface[22, 1] = 3, 1
    features = extract(
        model, to_tokens(PROMPTS, RESPONSES), FeatureSpec(meaning=(1,), surface=surface), 12, lambda n: None
    )
    width = model.config.hidden_size
    assert features.shape == (3, width + 3)
    # Rates over three, four and one tokens; those past the table count as its last row.
    assert features[:, width:-1].tolist() == [[1.0, 0.0], [0.0, 0.75], [0.0, 1.0]]


def test_prefix_features_end_where_the_whole_answers_begin() -> None:
    states = torch.tensor([[[1.0], [3.0], [8.0]]])
    prefixes, counts = pool_prefixes(states)
    assert prefixes.flatten().tolist() == [0.0, 1.0, 2.0]
    assert counts.tolist() == [0, 1, 2]
    pooled = pool(states, torch.ones(1, 3, dtype=torch.bool))
    assert pooled[0].tolist() == pytest.approx([4.0, 1.098612], abs=1e-6)


def test_response_states_are_those_of_the_token_itself(model: Any) -> None:
    tokens = to_tokens([[5, 6]], [[7, 8]])
    hidden = torch.arange(4.0).view(1, 4, 1)
    assert response_states([hidden], tokens).flatten().tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[5, 6, 7], [5, 6, 8]], 2),
        ([[5, 6], [5, 6, 8]], 2),  # a whole prompt
        ([[5, 6], [5, 6]], 2),  # and no further: what follows are responses
        ([[5, 6], [6, 6]], 0),
        ([[5, 6]], 0),  # a single row
    ],
)
def test_shared_prefix(prompts: list[list[int]], expected: int) -> None:
    assert shared_prefix(to_tokens(prompts, [[9, 9]] * len(prompts))) == expected


def test_a_shared_prefix_changes_neither_values_nor_gradients(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    tokens = to_tokens([[*start, 3], [*start], [*start, 14, 15]], [[20, 21, 2], [22], [23, 24, 25, 2]])

    def run(least: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        monkeypatch.setattr(forward, "MIN_SHARED", least)
        model.zero_grad()
        hidden, states = run_trunk(model, tokens, (1, 3))
        logprobs = token_logprobs(model, hidden, tokens, 0.85)
        logprobs.sum().backward()
        return logprobs.detach(), states, [p.grad.clone() for p in model.parameters()]

    plain, shared = run(10), run(9)
    assert torch.allclose(plain[0], shared[0], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain[1], shared[1], strict=True))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain[2], shared[2], strict=True))


@pytest.mark.parametrize("positions", [1, 3, 8])
def test_logits_are_computed_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    tokens = to_tokens(PROMPTS, RESPONSES)
    at_once: list[int] = []

    def counting(model: Any, hidden: torch.Tensor) -> torch.Tensor:
        at_once.append(len(hidden))
        return head_logits(model, hidden)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        at_once.clear()
        logprobs = token_logprobs(model, run_trunk(model, tokens)[0], tokens, 0.85)
        logprobs.square().sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in model.parameters()]

    monkeypatch.setattr(forward, "head_logits", counting)
    # Eight response tokens: all at once, and not computed again.
    whole = run()
    assert at_once == [8]
    monkeypatch.setattr(needs, "LOGIT_BYTES", positions * WORDS * 4)
    pieces = run()
    # In the backward pass the last piece comes first.
    forwards = {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[positions]
    assert at_once == (forwards if positions == 8 else forwards + forwards[::-1])
    assert torch.allclose(pieces[0], whole[0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(pieces[1], whole[1], strict=True))


def test_pieces_of_logits_are_not_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = to_tokens(PROMPTS, RESPONSES)
    hidden = run_trunk(model, tokens)[0].detach().requires_grad_()

    def kept() -> int:
        """Numbers that the graph holds for the backward pass."""
        held: list[int] = []
        with saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor):
            token_logprobs(model, hidden, tokens, 1.0)
        return sum(held)

    assert kept() > 8 * WORDS
    monkeypatch.setattr(needs, "LOGIT_BYTES", 2 * WORDS * 4)
    assert kept() < 8 * WORDS


def test_long_rows_use_fused_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = to_tokens(PROMPTS, RESPONSES)
    found = []
    for columns in (tokens.input_ids.shape[1], tokens.input_ids.shape[1] - 1):
        monkeypatch.setattr(forward, "EAGER_COLUMNS", columns)
        hidden, _ = run_trunk(model, tokens)
        found.append((model.config._attn_implementation, token_logprobs(model, hidden, tokens, 1.0)))
    assert [name for name, _ in found] == ["eager", "sdpa"]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


@pytest.mark.parametrize(
    ("hidden_layers", "expected"),
    [
        (30, ((0, 1, 2, 4), (12, 24, 30))),
        (80, ((0, 3, 5, 11), (32, 64, 80))),
        (12, ((0, 1, 2, 4), (5, 10, 12))),
        (2, ((0,), (1, 2))),
        (1, ((0,), (1,))),
    ],
)
def test_default_layers(hidden_layers: int, expected: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert default_layers(hidden_layers) == expected


def test_the_cache_computes_an_answer_once(model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 2)
    pairs = list(zip(PROMPTS, RESPONSES, strict=True))
    read: list[int] = []
    extracted: list[int] = []

    def counting(*arguments: Any) -> torch.Tensor:
        extracted.append(len(arguments[1]))
        return extract(*arguments)

    monkeypatch.setattr(features, "extract", counting)
    first = FeatureCache.open(tmp_path, "sha", SPEC, "float32").get(pairs[:2], model, SPEC, 2, read.append)
    # A second process finds what the first computed and computes the rest. An answer that comes twice is computed once.
    asked = [*pairs[::-1], pairs[-1]]
    again = FeatureCache.open(tmp_path, "sha", SPEC, "float32").get(asked, model, SPEC, 2, read.append)
    assert torch.equal(again[-3:-1].flip(0), first)
    assert torch.equal(again[0], again[-1])
    assert extracted == [2, len(pairs) - 2]
    # Another reference's features are not these.
    FeatureCache.open(tmp_path, "other", SPEC, "float32").get(pairs[:1], model, SPEC, 2, read.append)
    assert extracted == [2, len(pairs) - 2, 1]


def test_an_interrupted_extraction_keeps_its_results(
    model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 2)
    pairs = list(zip(PROMPTS, RESPONSES, strict=True))
    calls: list[int] = []

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract(*arguments)

    monkeypatch.setattr(features, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.open(tmp_path, "sha", SPEC, "float32").get(pairs, model, SPEC, 2, lambda n: None)
    FeatureCache.open(tmp_path, "sha", SPEC, "float32").get(pairs, model, SPEC, 2, lambda n: None)
    assert calls == [2, len(pairs) - 2, len(pairs) - 2]
