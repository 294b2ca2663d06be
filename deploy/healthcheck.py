"""Ends with 0 while the server on this machine can answer. The standard library alone: it runs every few seconds."""

import http.client
import os
import sys

PORT = int(os.environ.get("PREFLOOP_METRICS_PORT", "9464"))

try:
    # Not urllib, which would ask a proxy that is set for the network.
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=4)
    connection.request("GET", "/healthz")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"127.0.0.1:{PORT}/healthz: {error}")
