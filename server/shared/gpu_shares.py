"""How the engines of server and learner share the memory of one GPU."""

# The share that a round needs beside its engine: for CUDA itself and for the trainer's weights. While it trains, its
# engine sleeps, and that share is the trainer's too.
BESIDE_ENGINES = 0.05


def sum_of_shares(server: float, learner: float) -> str:
    """The two shares and their sum: `server 0.5 + learner 0.3 = 0.8`."""
    return f"server {server:g} + learner {learner:g} = {server + learner:.3g}"


def exceed(server: float, learner: float) -> bool:
    """Whether both engines and a round do not fit on one GPU, however much is free."""
    return round(server + learner + BESIDE_ENGINES, 6) > 1
