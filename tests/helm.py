"""Helm itself, which installs charts into what answers like a Kubernetes API and keeps what it is sent.

Helm comes from the wheel of helm-sdkpy, of which only the library is used: it is Helm's own code in Go.
"""

import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WHEEL = "helm-sdkpy==0.1.32"
LIBRARY = Path("helm_sdkpy") / "_lib" / "linux-amd64" / "libhelm_sdkpy.so"
GROUPS = {
    "v1": ["Secret", "Service", "ConfigMap", "PersistentVolumeClaim", "Namespace"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "batch/v1": ["CronJob"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "ray.io/v1": ["RayCluster"],
    "monitoring.coreos.com/v1": ["PrometheusRule"],
}


def plural(kind: str) -> str:
    return kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s")


class Api(BaseHTTPRequestHandler):
    """Discovery, and objects that do not exist until they are posted."""

    objects: list[Any]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        named = [group for group in GROUPS if "/" in group]
        known: dict[str, Any] = {
            "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {
                "kind": "APIGroupList",
                "groups": [
                    {
                        "name": group.partition("/")[0],
                        "versions": [{"groupVersion": group, "version": "v1"}],
                        "preferredVersion": {"groupVersion": group, "version": "v1"},
                    }
                    for group in named
                ],
            },
        }
        for group, kinds in GROUPS.items():
            known[f"/apis/{group}" if "/" in group else f"/api/{group}"] = {
                "kind": "APIResourceList",
                "groupVersion": group,
                "resources": [
                    {
                        "name": plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind,
                        "verbs": ["create", "get", "list", "patch"],
                    }
                    for kind in kinds
                ],
            }  # fmt: skip
        if path.endswith("/secrets"):
            known[path] = {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": []}
        self._answer(*((200, known[path]) if path in known else (404, missing())))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        # Helm's own record of a release is not JSON.
        if self.headers["Content-Type"] == "application/json":
            self.objects.append(json.loads(body))
        self._send(201, body, self.headers["Content-Type"])

    def do_PUT(self) -> None:
        self._send(200, self.rfile.read(int(self.headers["Content-Length"])), self.headers["Content-Type"])

    def _answer(self, status: int, body: Any) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def missing() -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}


@contextmanager
def api(directory: Path) -> Iterator[tuple[Path, list[Any]]]:
    """A kubeconfig for the API, and what is posted to it."""
    posted: list[Any] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Api,), {"objects": posted}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = directory / "kubeconfig"
    url = f"http://127.0.0.1:{server.server_port}"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "here",
                "clusters": [{"name": "here", "cluster": {"server": url}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
                "users": [{"name": "me", "user": {}}],
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    try:
        yield config, posted
    finally:
        server.shutdown()
        server.server_close()


class HelmError(Exception):
    """What Helm says about a chart that it does not install."""


def install(packages: Path, chart: Path, values: dict[str, Any], directory: Path, release: str = "live") -> list[Any]:
    """The objects that `helm install` creates, but for its own record of the release."""
    library = ctypes.CDLL(str(packages / LIBRARY))
    library.helm_sdkpy_last_error.restype = ctypes.c_char_p
    handle, result = ctypes.c_ulonglong(), ctypes.c_char_p()
    with api(directory) as (config, posted):

        def call(name: str, *arguments: Any) -> None:
            if getattr(library, f"helm_sdkpy_{name}")(*arguments):
                raise HelmError((library.helm_sdkpy_last_error() or b"").decode())

        call("config_create", b"default", str(config).encode(), b"", b"{}", ctypes.byref(handle))
        options = {"wait": False, "timeout_seconds": 30, "disable_openapi_validation": True}
        call(
            "install", handle, release.encode(), str(chart).encode(), json.dumps(values).encode(), b"",
            json.dumps(options).encode(), ctypes.byref(result),
        )  # fmt: skip
        return posted
