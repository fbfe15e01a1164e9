"""Command-line clients of a server: ``bench serve`` and ``chat --url``."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from fake_server import FakeServer
from served import Program, program
from starlette.responses import Response

from vllmlite.cli import main
from vllmlite.cli.bench_load import Timing, brings_tokens
from vllmlite.cli.bench_plot import distributions
from vllmlite.cli.report import quantiles


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    traces = str(tmp_path_factory.mktemp("traces"))
    with program("--api-key", "sesame", "--max-model-len", "512", "--profile-dir", traces) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")


def bench(
    capsys: pytest.CaptureFixture[str], server: Program, *arguments: str, status: int = 0
) -> dict[str, object]:
    assert main(["bench", "serve", "--base-url", server.url, *arguments]) == status
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def statistics_of(result: dict[str, object], name: str) -> set[str]:
    """The names of the statistics in ``result`` for the times called ``name``."""
    end = f"_{name}_ms"
    return {key.removesuffix(end) for key in result if key.endswith(end)}


@pytest.mark.parametrize(
    "options", [[], ["--chat", "--max-concurrency", "2"], ["--request-rate", "50", "--num-warmups", "3"]]
)
def test_bench_counts_requests_and_tokens(
    capsys: pytest.CaptureFixture[str], server: Program, options: list[str]
) -> None:
    small = ["--num-prompts", "6", "--random-input-len", "4:9", "--random-output-len", "5"]
    result = bench(capsys, server, *small, *options)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 30)
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert statistics_of(result, name) == {"mean", "median", "p90", "p99"}


def test_bench_reads_and_draws_prompts_from_files(
    capsys: pytest.CaptureFixture[str], server: Program, tmp_path: Path
) -> None:
    talk = [{"conversations": [{"from": "human", "value": "What is dpkg?"}, {"from": "gpt", "value": "x"}]}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    files = ["--dataset-path", str(tmp_path / "talk.json"), "--plot", str(tmp_path / "plot.svg")]
    saved = tmp_path / "result.json"
    result = bench(
        capsys, server, *files, "--save-result", str(saved), "--num-prompts", "3", "--random-output-len", "4"
    )
    assert result["completed"] == 3
    root = ET.parse(tmp_path / "plot.svg").getroot()
    assert sum(element.get("class") == "curve" for element in root.iter()) == 3
    assert [entry["output_tokens"] for entry in json.loads(saved.read_text())["requests"]] == [4, 4, 4]


def test_bench_checks_latency_goals(capsys: pytest.CaptureFixture[str], server: Program) -> None:
    small = ["--num-prompts", "4", "--input-len", "8", "--output-len", "3", "--metric-percentiles", "25,99.9"]
    fast = bench(capsys, server, *small, "--goodput", "ttft:60000", "e2el:60000")
    assert fast["request_goodput"] == fast["request_throughput"]
    assert statistics_of(fast, "ttft") == {"mean", "median", "p25", "p99.9"}
    slow = bench(capsys, server, *small, "--goodput", "ttft:60000", "tpot:0.000001")
    assert (slow["request_goodput"], slow["completed"]) == (0, 4)
    refused = bench(capsys, server, *small, "--extra-body", '{"mirostat": 2}', status=1)
    assert "mirostat" in str(refused["first_error"])
    for wrong in (["--goodput", "itl:5"], ["--extra-body", "[]"], ["--metric-percentiles", "50,101"]):
        assert main(["bench", "serve", *wrong]) == 2
        assert wrong[1] in capsys.readouterr().err


PIECES = (
    ({"text": "", "finish_reason": None}, True),  # half a character
    ({"text": "", "finish_reason": "length"}, False),
    ({"text": "a", "finish_reason": "length"}, True),
    ({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, False),
    ({"delta": {"role": "assistant", "content": "a"}}, True),
    ({"delta": {"reasoning_content": "a"}}, True),
    ({"delta": {"content": ""}}, True),
    ({"delta": {}, "finish_reason": "stop"}, False),
)


@pytest.mark.parametrize(("choice", "counts"), PIECES)
def test_bench_recognises_events_with_tokens(choice: dict[str, object], counts: bool) -> None:
    assert brings_tokens(choice) is counts


def test_plots_have_readable_axes() -> None:
    plot = distributions("a <model>\x1b\ud800", {"TTFT": [12.0, 17.02, 26.4], "ITL": [0.0042], "E2E": []})
    texts = [
        "".join(element.itertext()) for element in ET.fromstring(plot).iter() if element.tag.endswith("text")
    ]
    assert texts[:2] == ["a <model>\ufffd\ufffd", "share of all"]
    first = texts[texts.index("0%") : texts.index("TTFT, s") + 1]
    assert first[5:] == ["0", "10", "20", "30", "TTFT, s"]
    assert [text for text in texts if text.startswith("p50")] == ["p50 17.0", "p50 4.20"]
    assert texts[texts.index("ITL, ms") - 1] == "5" and texts[-1] == "E2E, ms"


def test_bench_works_with_a_server_that_sends_few_fields(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with closing(FakeServer()) as fake:
        fake.answers("a", "b", "c")
        fake.last_wait = 0.4
        common = ["bench", "serve", "--chat", "--num-prompts", "3", "--base-url", fake.url]
        assert main(common) == 0
        out, err = capsys.readouterr()
        result = json.loads(out.splitlines()[-1])
        assert (result["total_input_tokens"], result["total_output_tokens"], result["completed"]) == (0, 9, 3)
        assert result["mean_e2el_ms"] >= 400 and 0 < 2 * result["mean_tpot_ms"] <= result["mean_e2el_ms"]
        assert f"[{'#' * 30}] 3 of 3 prompts done\n" in err
        fake.refusal = Response('data: {"error": {"message": "a step failed"}}\n\n')
        assert main(common) == 1
        assert json.loads(capsys.readouterr().out)["first_error"] == "a step failed"


def test_bench_reports_failed_requests(capsys: pytest.CaptureFixture[str], server: Program) -> None:
    result = bench(capsys, server, "--num-prompts", "2", "--random-input-len", "2000", status=1)
    assert result["failed"] == 2 and str(result["first_error"]).startswith("400: ")
    assert main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 1
    assert main(["bench", "serve", "--request-rate", "0"]) == 2
    assert main(["bench", "serve", "--num-warmups", "-1"]) == 2
    assert main(["bench", "serve", "--random-prefix-len", "-1"]) == 2


def test_percentiles_are_by_nearest_rank() -> None:
    found = quantiles([*range(1, 1001)], (55, 99.9, 100))
    assert found == {"mean": 500.5, "p55": 550, "p99.9": 999, "p100": 1000}
    assert Timing(ttft=0.1, latency=0.3, output_tokens=1).tpot == 0
    assert Timing(ttft=0.1, latency=0.3, output_tokens=3).tpot == pytest.approx(0.1)


def test_chat_with_a_server(
    capsys: pytest.CaptureFixture[str], server: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("What is dpkg?\nAnd apt?\n"))
        assert main(["chat", "--max-tokens", "8", "--temperature", "0", *arguments]) == status
        return capsys.readouterr().out

    there = say("--url", server.url)
    assert there == say("--dtype", "float32", "--max-model-len", "512", "--device", "cpu")
    assert len(there.splitlines()) == 2
    say("--url", server.url, "--api-key", "wrong", status=1)
    say("--url", "http://127.0.0.1:9", status=1)
    say("--url", server.url, "--threads", "1", status=2)


def test_profiles_are_in_chrome_trace_format(server: Program) -> None:
    import httpx

    def post(path: str, **body: object) -> httpx.Response:
        return httpx.post(
            server.url + path, json=body, headers={"authorization": "Bearer sesame"}, timeout=30
        )

    assert post("/stop_profile").status_code == 409
    assert post("/start_profile").status_code == 200
    assert post("/v1/completions", prompt="Debian", max_tokens=5).status_code == 200
    file = post("/stop_profile").json()["file"]
    found = json.loads(Path(file).read_text())["traceEvents"]
    names = [event["name"] for event in found]
    assert names.count("step") >= 5 and names.count("launch") == names.count("collect") == names.count("step")
    for event in found:
        assert event["ph"] == "X" and event["dur"] > 0 and event["ts"] >= 0
