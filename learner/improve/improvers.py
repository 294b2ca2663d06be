"""The improvers by the names that settings have for them."""

from learner.improve.base import Improver
from learner.improve.dpo.trainer import DPO
from learner.improve.dpo.votes import WeighedVotes
from learner.improve.ppo.trainer import PPO
from learner.improve.rloo.trainer import RLOO
from learner.settings import LearnerSettings


def make_improver(settings: LearnerSettings, votes: WeighedVotes | None) -> Improver:
    """The improver that is set; `votes` are for one that trains on them."""
    match settings.improver:
        case "ppo":
            return PPO(settings.ppo, settings.policy)
        case "rloo":
            return RLOO(settings.rloo, settings.policy)
        case "dpo":
            assert votes is not None, "DPO trains on votes"
            return DPO(settings.dpo, settings.policy, votes)
