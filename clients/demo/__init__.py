"""`make demo`: runs the whole loop with nothing mocked.

It starts a server, a simulated voter with a stated taste votes over gRPC, the learner runs one round, the server swaps
to the new policy under live streams, and the same held-out questions are answered before and after. Any failure ends it
with one sentence and exit code 1: a failed call, a broken stream, a wait without progress, a learner that fails or
rejects two rounds, or a server with the wrong version. Progress is saved, and the next run resumes from it.
"""
