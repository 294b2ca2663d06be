"""Votes and prompts in the token ids of one reference's tokenizer.

A response is stored with the token ids of the model that sampled it. After `learner rebase` they mean nothing to the
new model, but the texts do. So whatever was asked and answered under another reference is encoded from its text, as a
server with the new model would encode it: the prompt by the chat template, with the conversation's date and as many of
its turns as fit, and the answer as a text that a person wrote. What was sampled under this reference stays as it is.

With one tokenizer for both models this gives the ids that were stored, except where a model sampled a text in other
tokens than a tokenizer would split it into.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from learner.settings import LearnerSettings
from server.shared.errors import InvalidArgumentError, NotFoundError
from server.shared.model.context import context_length
from server.shared.model.prompt import Said, build_prompt
from server.shared.model.text import ChatText
from server.store.chats.records import Prompt, Response, Snapshot
from server.store.store import Store


@dataclass(frozen=True)
class AskedTurn:
    """A user's message in its conversation: `said` holds all turns that the model saw, of which `before` came before
    this one. `began` is when the conversation did, in seconds since 1970; `system` is its system prompt."""

    said: list[Said]
    before: int
    message: str
    began: float
    system: str = ""
    # The turn's number in the store.
    seq: int = 0


class TokenIds:
    """Encodes for the reference `reference_version` what other lineages asked and answered. Loads the tokenizer only if
    there is such a thing."""

    def __init__(self, store: Store, reference_version: str, settings: LearnerSettings) -> None:
        self._store, self._reference, self._settings = store, reference_version, settings
        self._directory = settings.data_dir / "policies" / reference_version
        self._origins = store.policies.origins()
        self._conversations: dict[str, dict[str, AskedTurn]] = {}
        self._prompts: dict[tuple[int, int], list[int]] = {}

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the token ids of this reference. Answers that cannot be encoded, or were deleted since,
        have none."""
        return replace(
            snapshot,
            choices=[replace(vote, a=self.response(vote.a), b=self.response(vote.b)) for vote in snapshot.choices],
            machine=[replace(vote, a=self.response(vote.a), b=self.response(vote.b)) for vote in snapshot.machine],
            thumbs=[replace(vote, response=self.response(vote.response)) for vote in snapshot.thumbs],
            corrections=[replace(vote, response=self.response(vote.response)) for vote in snapshot.corrections],
        )

    def prompts(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """The prompts with the token ids of this reference, each once; without those that cannot be encoded."""
        found: dict[tuple[int, ...], Prompt] = {}
        for prompt in prompts:
            if self._foreign(prompt.policy_version):
                encoded = self._prompt(prompt.user, prompt.conversation_id, prompt.response_id, prompt.max_tokens)
                prompt = replace(prompt, token_ids=encoded, max_tokens=self._room(prompt.max_tokens))
            if prompt.token_ids:
                found.setdefault(tuple(prompt.token_ids), prompt)
        return list(found.values())

    def response(self, response: Response) -> Response:
        """The response with the token ids of this reference; if they are not those that were sampled, without
        log-probabilities. Its spans count the sampled tokens."""
        if not self._foreign(response.policy_version):
            return response
        prompt = self._prompt(response.user, response.conversation_id, response.id, response.max_tokens)
        answer = self._answer(response) if prompt else []
        return replace(response, prompt_token_ids=prompt, token_ids=answer, logprobs=[])

    def _foreign(self, version: str) -> bool:
        ours = self._origins[self._reference]
        return self._origins.get(version, ours) != ours

    def _answer(self, response: Response) -> list[int]:
        try:
            return self._text.answer(response.text, response.finish_reason == "stop")
        except ValueError:
            return []

    def _prompt(self, user: str, conversation_id: str, response_id: str, max_tokens: int) -> list[int]:
        """Token ids of the message that was answered, after the turns before it; none if it cannot be encoded."""
        turn = self._turns(user, conversation_id).get(response_id)
        if turn is None:
            return []
        room = self._longest - self._room(max_tokens)
        # The answers of a comparison have one prompt.
        key = turn.seq, room
        if key not in self._prompts:
            self._prompts[key] = self._encoded(turn, room)
        return self._prompts[key]

    def _encoded(self, turn: AskedTurn, room: int) -> list[int]:
        def encode(messages: list[dict[str, str]]) -> list[int]:
            return self._text.prompt(messages, turn.began)

        try:
            return build_prompt(encode, turn.said[: turn.before], turn.message, room, turn.system)
        except (InvalidArgumentError, ValueError):
            return []

    def _room(self, max_tokens: int) -> int:
        """The length limit of an answer; half of the model's, as a server does by default, if it is beyond that."""
        return max_tokens if max_tokens < self._longest else self._longest // 2

    def _turns(self, user: str, conversation_id: str) -> dict[str, AskedTurn]:
        if conversation_id not in self._conversations:
            self._conversations[conversation_id] = asked_turns(self._store, user, conversation_id)
        return self._conversations[conversation_id]

    @cached_property
    def _text(self) -> ChatText:
        return ChatText.load(self._directory, self._settings.trust_remote_code)

    @cached_property
    def _longest(self) -> int:
        return context_length(self._directory, self._settings.max_model_len, self._settings.trust_remote_code)


def asked_turns(store: Store, user: str, conversation_id: str) -> dict[str, AskedTurn]:
    """The message that each response of a conversation answered, by the response's id; nothing if it was deleted."""
    try:
        conversation = store.conversations.get(user, conversation_id)
        turns = store.conversations.turns(user, conversation_id)
    except NotFoundError:
        return {}
    said, found = dict[int | None, tuple[list[Said], int]](), dict[str, AskedTurn]()
    for turn in turns:
        before, count = said.get(turn.parent, ([], 0))
        if len(before) > count:
            # Another turn continues the same one.
            before = before[:count]
        asked = AskedTurn(before, count, turn.message, conversation.create_time, conversation.system, turn.seq)
        answers = (turn.comparison.a, turn.comparison.b) if turn.comparison else (turn.response,)
        found |= {answer.id: asked for answer in answers if answer}
        if (answer := turn.answer) is not None:
            before.append((turn.message, answer))
        said[turn.seq] = before, len(before)
    return found
