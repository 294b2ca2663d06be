"""Is one commit faster than another? Two servers of two checkouts, measured in turn.

    git worktree add /tmp/before v0.1.0
    python benchmarks/trees.py /tmp/before . [--pairs 10] [--seconds 4]

Both checkouts run with this environment's packages, at the same time, on a random one-layer model, so that the front
end is what takes time. In turn, in bursts of a few seconds and in alternating order, each answers 64 streams, and then
acknowledges 64 clients' votes. A machine whose speed varies by a third from minute to minute varies less between two
bursts: the result is the median of the pairs' ratios, with quartiles. Prints one JSON line last.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import vote_load
from serve import IDLE_SECONDS, TEMPERATURE, TOKENS, client, grpc_server, make_tiny_model
from vote_load import Voter, run_load

CLIENTS = 64
# Enough for a second or two of a burst.
WAVES = 4
Burst = Callable[[], Awaitable[float]]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each burst of votes")
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    with tempfile.TemporaryDirectory() as work:
        # `python -m` prefers the working directory's packages to the tree's.
        os.chdir(work)
        results = await measure(trees, Path(work), arguments.pairs, arguments.seconds)
    print(json.dumps({"benchmark": "trees", "pairs": arguments.pairs, "results": results}))


async def measure(trees: dict[str, Path], work: Path, pairs: int, seconds: float) -> dict[str, dict[str, float]]:
    model = make_tiny_model(work)
    async with AsyncExitStack() as stack:
        chats: dict[str, Burst] = {}
        votes: dict[str, Burst] = {}
        for name, tree in trees.items():
            directory = work / name
            directory.mkdir()
            environment = {
                "PYTHONPATH": f"{tree / 'proto'}:{tree}",
                "PREFLOOP_MODEL": str(model),
                "PREFLOOP_DATA_DIR": str(directory / "data"),
                "PREFLOOP_METRICS_PORT": "0",
                "PREFLOOP_USER_CALLS": "1000",
                "PREFLOOP_USER_RATE": "1000000",
                "PREFLOOP_MAX_STREAMS": str(CLIENTS),
                "PREFLOOP_MAX_WAITING": str(CLIENTS),
            }
            address = await stack.enter_async_context(grpc_server(environment, directory))
            chats[name] = chat_bursts(await stack.enter_async_context(client("grpc", address, {})))
            votes[name] = vote_bursts(address, environment, seconds)
        # From the first key on, calls need one.
        return {"tokens_per_s": await compare(chats, pairs), "votes_per_s": await compare(votes, pairs)}


def chat_bursts(run: Callable[[dict[str, object]], Awaitable[dict[str, float]]]) -> Burst:
    async def burst() -> float:
        load = {"streams": CLIENTS, "tokens": TOKENS, "temperature": TEMPERATURE, "logprobs": True}
        found = await run({**load, "waves": WAVES, "seed": 0})
        await asyncio.sleep(IDLE_SECONDS)
        return found["tokens"] / found["seconds"]

    return burst


def vote_bursts(address: str, environment: dict[str, str], seconds: float) -> Burst:
    voters: list[Voter] = []

    async def burst() -> float:
        if not voters:
            command = [sys.executable, vote_load.__file__, "--voters", str(CLIENTS)]
            made = subprocess.check_output(command, env={**os.environ, **environment}, text=True, timeout=60)
            voters.extend(json.loads(made))
            # The server reads the keys again.
            await asyncio.sleep(IDLE_SECONDS)
        found = await asyncio.to_thread(run_load, address, voters, seconds)
        return found["calls"] / found["seconds"]

    return burst


async def compare(bursts: dict[str, Burst], pairs: int) -> dict[str, float]:
    """Medians of each tree, and of the ratio after / before, with its quartiles; the first pair only warms up."""
    found: list[dict[str, float]] = []
    for number in range(pairs + 1):
        names = sorted(bursts, reverse=bool(number % 2))
        found.append({name: await bursts[name]() for name in names})
        print(found[-1], file=sys.stderr, flush=True)
    ratios = [pair["after"] / pair["before"] for pair in found[1:]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: round(statistics.median(pair[name] for pair in found[1:]), 1) for name in bursts}
    return {**medians, "ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


if __name__ == "__main__":
    asyncio.run(main())
