"""The imported preferences that the reward model of a round may follow."""

from learner.model.features import TokenPair
from learner.reward.prior import ImportedPreferences
from learner.round.alignment.votes_stage import read_answers
from learner.round.workspace import Workspace
from server.store.learning.imports import ImportedPreference

# With fewer there is nothing to fit.
LEAST = 20


def read_imports(work: Workspace) -> ImportedPreferences | None:
    """Features of the answers of imported preferences; None if there are too few that this model can read."""
    limit = work.settings.reward.imported
    pairs = [pair for one in work.store.imports.preferences(limit) if (pair := encoded(work, one))] if limit else []
    if len(pairs) < LEAST:
        return None
    answers = [answer for pair in pairs for answer in pair]
    return ImportedPreferences(read_answers(work, answers, "reading imported preferences"))


def encoded(work: Workspace, preference: ImportedPreference) -> tuple[TokenPair, TokenPair] | None:
    """The chosen answer and the rejected one after the prompt; None if this model cannot read them."""
    try:
        prompt = work.encode_chat(preference.prompt)
        chosen, rejected = (work.text.answer(text) for text in (preference.chosen, preference.rejected))
    except ValueError:
        return None
    if len(prompt) + max(len(chosen), len(rejected)) > work.longest:
        return None
    return (prompt, chosen), (prompt, rejected)
