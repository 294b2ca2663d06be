"""Exits with 0 if the server on this machine can answer. Standard library only: this runs every few seconds."""

import http.client
import os
import sys

PORT = int(os.environ.get("PREFLOOP_METRICS_PORT", "9464"))

try:
    # Not urllib, which would use a proxy from the environment.
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=4)
    connection.request("GET", "/healthz")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"127.0.0.1:{PORT}/healthz: {error}")
