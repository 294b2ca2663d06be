"""The prompts of rollouts and the gate: what users asked, topped up with built-in questions if that is too little.

A user's prompt trains or is held out by the first conversation that asked it, among those that a round reads; a
built-in question by its text. So the two sides of a round never share a prompt. Built-in questions are typical of a
chat: advice, explanations, drafts, ideas.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

import torch

from learner.reward.dataset import is_judge
from learner.reward.vote_weights import cap_shares
from server.shared.model.text import UnknownTokenError
from server.store.chats.records import Prompt

# Length limit of answers to built-in questions if there are no users' prompts to take it from.
ANSWER_TOKENS = 256

Encode = Callable[[list[dict[str, str]]], list[int]]

OWN = """\
How do I start running when I have never done it?
Explain how a vaccine works to a ten-year-old.
Write a short thank-you note to a neighbour who watered my plants.
What should I think about before I adopt a cat?
Give me three ideas for a rainy afternoon with children.
Why is the sky red in the evening?
How can I tell a friend that I cannot come to the wedding?
Summarise in two sentences what inflation is.
What is the difference between a virus and a bacterium?
Suggest a name for a small bakery and say why.
How do I ask my manager for a day off?
What can I cook with eggs, rice and a tin of tomatoes?
Write the first two sentences of a story about a lighthouse.
How does a bicycle stay upright?
I cannot sleep before exams. What helps?
List the steps to change a flat tyre.
What makes a good password?
Help me choose between a laptop and a tablet for studying.
How do bees make honey?
Write a polite reminder about an unpaid invoice.
What should a first aid kit hold?
Explain compound interest with an example.
How can I make a small room look larger?
What are good questions to ask at a job interview?
Describe autumn to somebody who has never seen it.
How do I keep basil alive on a windowsill?
Why do cats purr?
Give me a one-week plan to learn the basics of chess.
How should I apologise after a quarrel with my sister?
What is a healthy breakfast that takes five minutes?
Explain what an algorithm is without using the word computer.
Write a birthday message for a colleague I hardly know.
How do tides work?
What should I pack for two days in the mountains?
I want to read more. How do I build the habit?
Name two good and two bad sides of working from home.
How do I clean a burnt pan?
Why do we have leap years?
Draft a notice that the lift is out of order until Friday.
What is the best way to learn a poem by heart?
How can I save water at home?
Explain the rules of football to a visitor from space.
My neighbour plays loud music at night. What can I do?
What does a museum curator do all day?
Write a limerick about a forgetful baker.
How do I compare two phone contracts?
What is the point of a semicolon?
How do plants drink?
Give me a simple warm-up before swimming.
How do I politely end a long phone call?
What are the first steps in planning a vegetable garden?
Why does bread rise?
Suggest a present for a grandfather who has everything.
How do I write a good subject line for an e-mail?
What happens in the body when we laugh?
Explain to a beginner what a budget is for.
How can a team make its meetings shorter?
What should I know before I travel by night train?
Turn this into plain words: the meeting is deferred until further notice.
How do I take a good photo with a phone?
Which three habits make a kitchen safer?
How does a thermos flask keep tea hot?
Help me describe my job as a nurse in one sentence.
What is a fair way to split the rent of a shared flat?
""".splitlines()


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and prompts held out; `own` is how many of them are built-in."""

    train: list[Prompt]
    held_out: list[Prompt]
    own: int = 0


def split_prompts(
    prompts: list[Prompt], judge_share: float, max_model_len: int, embeddings: float = math.inf
) -> Prompts:
    """Splits prompts by conversation. Prompts that leave no room for an answer are left out, and those with token ids
    from `embeddings` on."""
    fitting = [
        p
        for p in prompts
        if len(p.token_ids) + p.max_tokens <= max_model_len and max(p.token_ids, default=0) < embeddings
    ]
    train = [p for p in fitting if not is_judge(p.opened_by or p.conversation_id, judge_share)]
    held_out = [p for p in fitting if is_judge(p.opened_by or p.conversation_id, judge_share)]
    return Prompts(train, held_out)


def share_out(prompts: list[Prompt], user_share: float) -> list[Prompt]:
    """The newest prompts of each user, capped so that no user has a larger share of them than of the votes' weight
    (`vote_weights`)."""
    counts = Counter(prompt.user for prompt in prompts)
    totals = torch.tensor(list(counts.values()), dtype=torch.float64)
    capped = (totals * cap_shares(totals, user_share)).round().int().tolist()
    left = dict(zip(counts, capped, strict=True))
    kept = []
    for prompt in reversed(prompts):
        if left[prompt.user]:
            left[prompt.user] -= 1
            kept.append(prompt)
    return kept[::-1]


def top_up(asked: Prompts, minimum: int, judge_share: float, max_model_len: int, encode: Encode) -> Prompts:
    """Fills each side up to `minimum` with built-in questions, as far as they go. Their length limit is the median of
    the users' prompts. Questions for which `encode` raises UnknownTokenError are left out."""
    if min(len(asked.train), len(asked.held_out)) >= minimum:
        return asked
    users = asked.train + asked.held_out
    length = median_low(p.max_tokens for p in users) if users else ANSWER_TOKENS
    known = {tuple(p.token_ids) for p in users}
    sides: dict[bool, list[Prompt]] = {False: list(asked.train), True: list(asked.held_out)}
    for question in OWN:
        side = sides[is_judge(question, judge_share)]
        try:
            token_ids = encode([{"role": "user", "content": question}])
        except UnknownTokenError:
            continue
        fits = len(token_ids) + length <= max_model_len
        if fits and len(side) < minimum and tuple(token_ids) not in known:
            side.append(Prompt("", token_ids, length))
    return Prompts(sides[False], sides[True], own=sum(map(len, sides.values())) - len(users))
