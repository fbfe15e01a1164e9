"""The templates: valid as Kubernetes and KServe define their kinds, and their commands start a server that answers."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
import yaml
from hub_server import SHA, running
from served import ROOT, Program, free_port, program

from vllmlite.hub import BUILT_IN
from vllmlite.ranks.address import SECRET_VARIABLE

DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm" / "server.sbatch"
KUBERNETES = "1.33"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def sap_template(**parameters: str) -> dict[str, Any]:
    """The InferenceService that the platform makes of the template."""
    (found,) = documents("sap-ai-core/serving-template.yaml")
    names = {each["name"]: each.get("default") for each in found["spec"]["inputs"]["parameters"]}
    assert parameters.keys() <= names.keys()
    values = {name: parameters.get(name, default) for name, default in names.items()}

    def filled(text: str) -> Any:
        for name, value in values.items():
            text = text.replace(f"{{{{inputs.parameters.{name}}}}}", str(value))
        assert "{{" not in text, text
        return yaml.safe_load(text)

    template = found["spec"]["template"]
    return {
        "apiVersion": template["apiVersion"],
        "kind": "InferenceService",
        "metadata": {"name": "filled", "labels": filled(template["metadata"]["labels"])},
        "spec": filled(template["spec"]),
    }


SAP = sap_template(
    modelId="owner/tiny", modelRevision=SHA, modelName="tiny", storageUri="https://store/tiny.tar.gz"
)
GROUP = documents("leader-worker-set/server.yaml")
MANIFESTS = {
    "kubernetes": documents("kubernetes/server.yaml"),
    "runtime": documents("kserve/serving-runtime.yaml"),
    "service": documents("kserve/inference-service.yaml"),
    "sap": [SAP],
}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The pod specifications in the manifests, those of KServe reduced to what a pod has."""
    yield "kubernetes", MANIFESTS["kubernetes"][0]["spec"]["template"]["spec"]
    runtime = MANIFESTS["runtime"][0]["spec"]
    yield "runtime", {name: runtime[name] for name in ("containers", "volumes")}
    for role in ("leader", "worker"):
        yield role, GROUP[0]["spec"]["leaderWorkerTemplate"][f"{role}Template"]["spec"]
    yield "sap", {"containers": SAP["spec"]["predictor"]["containers"]}


def kserve_fields(kind: str) -> dict[str, str]:
    """Names and types of the fields of a kind, as KServe's own client has them."""
    spec = importlib.util.find_spec("kserve")
    if spec is None or spec.origin is None:
        pytest.skip("kserve is not installed")
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind).lstrip("_")
    tree = ast.parse((Path(spec.origin).parent / "models" / f"{snake}.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in found.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("openapi_types", "attribute_map")
    }
    return {values["attribute_map"][name]: kind for name, kind in values["openapi_types"].items()}


def check_kserve(value: Any, kind: str) -> None:
    """Fail unless ``value`` has KServe's fields only, with values of their kinds."""
    if kind.startswith("list["):
        assert isinstance(value, list)
        for each in value:
            check_kserve(each, kind[5:-1])
    elif kind.startswith("V1") and ("beta" in kind or "alpha" in kind):
        known = kserve_fields(kind)
        assert isinstance(value, dict)
        for name, each in value.items():
            assert name in known, f"{kind} has no {name}, only {sorted(known)}"
            check_kserve(each, known[name])
    else:
        python = {"str": str, "int": int, "bool": bool, "dict(str, str)": dict}.get(kind)
        assert python is None or isinstance(value, python), (kind, value)


FIELDS: dict[str, dict[str, Any]] = {
    "LeaderWorkerSet": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "Spec"},
    "Spec": {"replicas": int, "leaderWorkerTemplate": "Template", "startupPolicy": ("LeaderCreated", "LeaderReady")},
    "Template": {
        "size": int, "leaderTemplate": "Pod", "workerTemplate": "Pod",
        "restartPolicy": ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
    },
    "Pod": {"metadata": dict, "spec": dict},
}  # fmt: skip
"""Fields of LeaderWorkerSet's API of version v1, as far as our template uses them, and their values."""
REQUIRED = {
    "LeaderWorkerSet": {"spec"},
    "Spec": {"leaderWorkerTemplate"},
    "Template": {"workerTemplate"},
    "Pod": {"spec"},
}


def check_group(value: Any, kind: str) -> None:
    """Fail unless ``value`` has fields of :data:`FIELDS` only, and the required ones."""
    assert isinstance(value, dict) and REQUIRED[kind] <= value.keys()
    for name, each in value.items():
        assert name in FIELDS[kind], f"{kind} has no {name}"
        known = FIELDS[kind][name]
        if isinstance(known, str):
            check_group(each, known)
        elif isinstance(known, tuple):
            assert each in known
        else:
            assert isinstance(each, known)


@pytest.mark.parametrize(
    "document", [*MANIFESTS["kubernetes"], GROUP[1]], ids=lambda document: document["metadata"]["name"]
)
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    pytest.importorskip("kubernetes_validate").validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "spec"), [*pods()], ids=[name for name, _ in pods()])
def test_pods_are_valid(name: str, spec: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    pytest.importorskip("kubernetes_validate").validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("runtime", "V1alpha1ServingRuntime"),
        ("service", "V1beta1InferenceService"),
        ("sap", "V1beta1InferenceService"),
    ],
)
def test_kserves_kinds_are_valid(name: str, kind: str) -> None:
    check_kserve(MANIFESTS[name][0], kind)


def test_the_group_of_pods_is_valid() -> None:
    group, service = GROUP
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1" and group["kind"] == "LeaderWorkerSet"
    check_group(group, "LeaderWorkerSet")
    # LeaderWorkerSet makes a headless service of the group's name, by which pods find their leader.
    assert service["metadata"]["name"] != group["metadata"]["name"]
    labels = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["metadata"]["labels"]
    others = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert not service["spec"]["selector"].items() <= others.items()


def group_arguments(role: str, **variables: str) -> list[str]:
    """The arguments of a pod's server, with the variables that LeaderWorkerSet sets."""
    (container,) = GROUP[0]["spec"]["leaderWorkerTemplate"][f"{role}Template"]["spec"]["containers"]
    assert container["command"] == ["vllmlite", "serve"]
    (secret,) = [each for each in container["env"] if "valueFrom" in each]
    assert secret["name"] == SECRET_VARIABLE
    found = []
    for argument in container["args"]:
        for name, value in variables.items():
            argument = argument.replace(f"$({name})", value)
        assert "$(" not in argument
        found.append(argument)
    return found


@pytest.mark.slow
def test_the_pods_of_a_group_answer_together() -> None:
    """Leader and worker as two programs of this machine, with the arguments of their pods."""
    port = str(free_port())
    variables = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "127.0.0.1"}
    secret = {SECRET_VARIABLE: "a secret of the test, long enough"}

    def arguments(role: str, index: str) -> list[str]:
        found = group_arguments(role, LWS_WORKER_INDEX=index, **variables)
        omitted = ("--port", "--host", "--model")
        return [
            *(each.replace("29500", port) for each in found if not each.startswith(omitted)),
            "--device",
            "cpu",
        ]

    worker = subprocess.Popen(
        [sys.executable, "-m", "vllmlite", "serve", "--dtype", "float32", *arguments("worker", "1")],
        env={**os.environ, "PYTHONPATH": str(ROOT), **secret},
    )
    try:
        with program(*arguments("leader", "0"), **secret) as leader:
            body = {"model": "model", "prompt": "Debian is", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{leader.url}/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["text"].startswith(" a free operating system")
            assert leader.stop() == 0
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_a_filled_template_serves_a_tarball_from_an_object_store(tmp_path: Path) -> None:
    """SAP AI Core's way from the hub to an answer, with stand-ins on this machine."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    store, models = tmp_path / "store", tmp_path / "models"
    store.mkdir()
    with running() as hub:
        hub.repositories["owner/tiny"] = {
            file.name: file.read_bytes() for file in BUILT_IN.iterdir() if file.is_file()
        }
        command = ["download", "owner/tiny", "--revision", SHA, "--tarball", str(store / "tiny.tar.gz")]
        subprocess.run(
            [sys.executable, "-m", "vllmlite", *command],
            check=True,
            env={**environment, "HF_ENDPOINT": hub.url},
        )
    filled = sap_template(
        modelId="owner/tiny", modelRevision=SHA, modelName="my-tiny", storageUri=str(store / "tiny.tar.gz")
    )
    (container,) = filled["spec"]["predictor"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    with tarfile.open(fileobj=io.BytesIO(Path(variables["STORAGE_URI"]).read_bytes())) as archive:
        archive.extractall(models, filter="data")  # as the storage initialiser does
    arguments = [
        each.replace("/mnt/models", str(models)) for each in container["args"] if "--port" not in each
    ]
    assert container["command"] == ["vllmlite", "serve"]
    offline = variables["HF_HUB_OFFLINE"]
    program = Program(*arguments, "--device", "cpu", HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE=offline)
    try:
        url = program.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}{container['readinessProbe']['httpGet']['path']}").status_code == 200
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        body = {"model": "my-tiny", "prompt": "Debian is", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert model["id"] == "my-tiny" and answer["choices"][0]["text"].startswith(
            " a free operating system"
        )
    finally:
        program.close()


def test_the_slurm_job_runs_a_server_with_a_replica_on_each_gpu(tmp_path: Path) -> None:
    """The job's script with a stand-in for the server, which prints its arguments."""
    stand_in = tmp_path / "vllmlite"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MODEL": "/models/m",
        "SLURM_JOB_ID": "12345678",
    }
    bash = shutil.which("bash")
    assert bash is not None

    def job(**variables: str) -> list[str]:
        command = [bash, str(SLURM), "--max-queue", "9"]
        run = subprocess.run(command, env={**environment, **variables}, stdout=subprocess.PIPE, text=True)
        assert run.returncode == 0
        return run.stdout.splitlines()

    said, ran = job()
    port = 20000 + 5678
    assert said.endswith(f":{port}")
    options = f"--port {port} --model /models/m --data-parallel-size {{}} --shutdown-timeout 60 --max-queue 9"
    assert ran == "serve --host 0.0.0.0 " + options.format(1)
    assert job(SLURM_GPUS_ON_NODE="4")[1] == "serve --host 0.0.0.0 " + options.format(4)
