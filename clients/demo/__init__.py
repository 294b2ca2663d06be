"""`make demo`: the whole loop before one's eyes, nothing mocked.

A server is started, a simulated voter with a stated taste votes over gRPC, the learner runs one round, the server swaps
to the new policy under live streams, and the same held-out questions are answered before and after. Whatever goes wrong
ends it with one sentence and exit code 1: a failed call, a broken stream, a wait that gets nowhere, a learner that
fails or refuses twice, a new version that is not the one serving. What was done by then is kept, and the next run goes
on from there.
"""
