"""``vllmlite serve`` as a program: OpenAI's client, signals, sockets, options, and packages that it does not import."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from native import needs_native_cpu
from served import PATIENCE, ROOT, Program, program

from vllmlite import LLM, SamplingParams

PROMPT = "The Debian Project is"
MESSAGES = [{"role": "user", "content": "What is dpkg?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def server() -> Iterator[Program]:
    with program(
        "--served-model-name", "demo", "second", "--api-key", "sesame", "--max-model-len", "512"
    ) as running:
        yield running


def test_openais_client_runs_unmodified(server: Program) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client (Debian: python3-openai)")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "second"]
    assert client.models.retrieve("second").id == "second"
    expected = LLM(dtype="float32", max_model_len=512, device="cpu").generate(PROMPT, GREEDY, use_tqdm=False)
    text = expected[0].outputs[0].text
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    assert whole.choices[0].text == text
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens == 12
    pieces = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text
    chat = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2, user="me", seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert (
        "".join(entry.token for entry in answer.choices[0].logprobs.content)
        == answer.choices[0].message.content
    )
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == answer.choices[0].message.content
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    extra = client.chat.completions.create(
        **chat, extra_body={"top_k": 5, "min_tokens": 12, "ignore_eos": True}
    )
    assert extra.usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError, match="temperature=-1") as caught:
        client.completions.create(model="demo", prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_metrics_count_under_vllms_names(server: Program) -> None:
    pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    key = {"authorization": "Bearer sesame"}
    body = {"prompt": PROMPT, "max_tokens": 7, "temperature": 0}

    def read() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
        families = list(text_string_to_metric_families(text))
        return {s.name + s.labels.get("finished_reason", ""): s.value for f in families for s in f.samples}

    before = read()
    for _ in range(3):
        httpx.post(f"{server.url}/v1/completions", json=body, headers=key, timeout=PATIENCE)
    after = read()
    grown = {
        name: after[name] - before[name] for name in after if name.startswith("vllm") and "bucket" not in name
    }
    assert grown["vllm:generation_tokens_total"] == 21
    assert grown["vllm:prompt_tokens_total"] == 12
    assert grown["vllm:request_success_totallength"] == 3
    assert (
        grown["vllm:time_to_first_token_seconds_count"]
        == grown["vllm:e2e_request_latency_seconds_count"]
        == 3
    )
    assert grown["vllm:inter_token_latency_seconds_count"] == 18
    assert grown["vllm:request_generation_tokens_sum"] == grown["vllm:request_params_max_tokens_sum"] == 21
    assert grown["vllm:request_params_n_count"] == grown["vllm:request_params_n_sum"] == 3
    bounds = set(re.findall(r'le="([^"]*)"', httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text))
    assert "16384.0" in bounds and all(
        "." in bound for bound in bounds - {"+Inf"}
    )  # as prometheus_client has them
    assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0


def serve(script: str) -> tuple[subprocess.Popen[str], IO[str]]:
    """Start ``script`` as a program that serves; return the process and its standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, "serve", "--port", "0", "--no-engine-process"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    return process, process.stderr


@needs_native_cpu
def test_serving_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import atexit, sys; from vllmlite.cli import main\n"
        "heavy = ('torch', 'transformers', 'xgrammar')\n"
        "atexit.register(lambda: print('loaded', [name for name in heavy if name in sys.modules], file=sys.stderr))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process, log = serve(script)
    lines = []
    for line in log:
        lines.append(line)
        if " at http" in line:
            url = line.split(" at ")[1].split(",")[0]
            body = {"messages": MESSAGES, "max_tokens": 3}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 200
            assert httpx.get(f"{url}/metrics", timeout=PATIENCE).status_code == 200
            process.terminate()
    assert process.wait(30) == 0, lines
    log.close()
    assert lines[-1] == "loaded []\n"


def test_a_dead_engine_ends_the_program() -> None:
    script = (
        "import sys; from vllmlite.cli import main; from vllmlite.runner.runner import ModelRunner\n"
        "def fail(self, schedule): raise RuntimeError('the device is on fire')\n"
        "ModelRunner.launch = fail; sys.exit(main(sys.argv[1:]))"
    )
    process, log = serve(script)
    line = next(line for line in log if " at http" in line)
    url = line.split(" at ")[1].split(",")[0]
    reader = threading.Thread(target=log.read)
    reader.start()
    try:
        for _ in range(3):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT}, timeout=30)
            assert answer.status_code in (500, 503)
        assert process.wait(30) == 1
    finally:
        process.kill()
        reader.join()
        log.close()


def test_an_engine_process_that_is_killed_ends_the_program() -> None:
    with program() as running:
        server = running.process.pid
        (engine,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        os.kill(int(engine), signal.SIGKILL)
        assert running.process.wait(30) == 1


def test_sigterm_drains_and_exits_0() -> None:
    with program("--shutdown-timeout", "600") as running:
        body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert running.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health", timeout=PATIENCE)


def test_the_shutdown_deadline_aborts_open_requests() -> None:
    with program("--shutdown-timeout", "1") as running:
        body = {
            "prompt": PROMPT,
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
            "n": 8,
            "temperature": 1,
        }
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert running.process.wait(60) == 0
        assert rest[-1] == "data: [DONE]"
        assert "shutting down" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert not any("Traceback" in line for line in running.log)


def test_a_unix_socket_systemd_and_a_file_of_options(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(
        f"uds: {tmp_path}/http\nmax-model-len: 128\nserved-model-name: [one, two]\napi-key-file: {tmp_path}/keys\n"
    )
    (tmp_path / "keys").write_text("first\nsecond\n")
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/vllmlite.api-key").write_text("third\n")
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        with program(
            "--config", str(tmp_path / "server.yaml"), NOTIFY_SOCKET=str(tmp_path / "notify"), **credentials
        ) as running:
            assert manager.recv(100) == b"READY=1"
            with httpx.Client(
                transport=httpx.HTTPTransport(uds=str(tmp_path / "http")), timeout=PATIENCE
            ) as client:
                assert client.get("http://x/v1/models").status_code == 401
                for key in ("first", "second", "third"):
                    models = client.get(
                        "http://x/v1/models", headers={"authorization": f"Bearer {key}"}
                    ).json()
                    assert [model["id"] for model in models["data"]] == ["one", "two"]
                    assert models["data"][0]["max_model_len"] == 128
            assert running.stop(signal.SIGINT) == 0
            assert manager.recv(100) == b"STOPPING=1"
    assert not (tmp_path / "http").exists()


def test_the_server_ends_without_its_service_manager(tmp_path: Path) -> None:
    with program(NOTIFY_SOCKET=str(tmp_path / "nowhere")) as running:
        assert running.stop() == 0
    assert sum("cannot send" in line for line in running.log) == 2


def test_tls(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    import ssl

    with program("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)) as running:
        assert running.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{running.url}/health", verify=trusted, timeout=PATIENCE).status_code == 200
    asked = ("--ssl-ca-certs", str(certificate), "--ssl-cert-reqs", "2")
    with program("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), *asked) as running:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.url}/health", verify=trusted, timeout=PATIENCE)
        trusted.load_cert_chain(certificate, key)
        assert httpx.get(f"{running.url}/health", verify=trusted, timeout=PATIENCE).status_code == 200


@pytest.fixture
def same_logging() -> Iterator[None]:
    """Restore the logging configuration that a server changes."""
    yield
    for name in ("uvicorn", "uvicorn.access", "vllmlite"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def test_a_key_in_the_environment_and_paths_without_a_line() -> None:
    arguments = ("--disable-access-log-for-endpoints", "/health, /ping", "--max-model-len", "128")
    with program(*arguments, VLLM_API_KEY="sesame") as running:
        assert httpx.get(running.url + "/v1/models", timeout=PATIENCE).status_code == 401
        key = {"authorization": "Bearer sesame"}
        assert httpx.get(running.url + "/v1/models", headers=key, timeout=PATIENCE).status_code == 200
        for path in ("/health?x=1", "/ping", "/version"):
            assert httpx.get(running.url + path, timeout=PATIENCE).status_code == 200
        assert running.stop() == 0
        running.close()
        lines = "".join(running.log)
    assert "GET /version" in lines and "GET /health" not in lines and "GET /ping" not in lines


@pytest.mark.usefixtures("same_logging")
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--prot", "1"], 2, "did you mean --port"),
        (["--port", "99999"], 2, "port=99999"),
        (["a", "--model", "b"], 2, "given twice"),
        (["--ssl-keyfile", "/dev/null"], 2, "ssl_certfile"),
        (["--ssl-ciphers", "AES"], 2, "ssl_certfile"),
        (["--ssl-ciphers", "none", "--ssl-certfile", "x"], 2, "has no cipher"),
        (["--default-chat-template-kwargs", "[1]"], 2, "must be a mapping"),
        (["--api-key-file", "/nowhere"], 1, "api_key_file='/nowhere': cannot be read"),
        (["--chat-template", "/nowhere"], 1, "neither a template, nor the name of one, nor a readable file"),
        (["--middleware", "vllmlite.nothing.Here"], 1, "cannot be imported"),
        (["--nnodes", "2"], 2, "nnodes=2: must divide"),
        (["--headless"], 1, "node_rank=0: node 0 has the engine and is not headless"),
    ],
)
def test_bad_options_are_refused_by_name(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllmlite.cli import main

    assert (
        main(["serve", "--port", "0", *arguments] if "--port" not in arguments else ["serve", *arguments])
        == status
    )
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("same_logging")
def test_a_port_in_use_is_reported_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    from vllmlite.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "/nowhere", "--port", str(port)]) == 1
    assert "Address already in use" in capsys.readouterr().err
