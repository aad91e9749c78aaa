"""The benchmark's own parts: its stub engine answers rightly, and its sums are right."""

import http.client
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.dataplane import Cell, main, summarize, table
from benchmarks.load import WORKLOADS
from benchmarks.processes import Processes, StartError, free_port, measure_tree


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as processes:
        yield processes


def core() -> int:
    return min(os.sched_getaffinity(0))


def ask(port: int, body: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/v1/chat/completions", body)
    try:
        return connection.getresponse().read()
    finally:
        connection.close()


def test_the_fast_stub_answers_and_streams(processes: Processes) -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.stub", "--port", str(port), "--chunks", "5"]
    processes.start("stub", command, core=core(), ready=f"http://127.0.0.1:{port}/health")
    answer, stream = WORKLOADS[0], WORKLOADS[2]
    assert json.loads(ask(port, answer.body))["object"] == "chat.completion"
    *events, done, rest = ask(port, stream.body).split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    *chunks, usage = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert len(chunks) == 5
    assert usage["choices"] == []


def test_a_process_that_ends_at_once_is_an_error_with_its_last_words(
    processes: Processes,
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such engine')"]
    with pytest.raises(StartError, match=r"(?s)status 1; its log ends:.*no such engine"):
        processes.start("broken", command, core=core(), ready="tcp://127.0.0.1:1")


def test_the_children_of_a_process_are_charged_to_it(processes: Processes) -> None:
    port = free_port()
    child = (
        f"import socket; s = socket.create_server(('127.0.0.1', {port})); s.accept(); s.accept()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ready = f"tcp://127.0.0.1:{port}"
    pid = processes.start("parent", [sys.executable, "-c", parent], core=core(), ready=ready)
    alone = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert measure_tree(pid).resident_bytes > alone


def test_nothing_outlives_the_run(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.stub", "--port", str(port)]
        pid = processes.start("stub", command, core=core(), ready=f"tcp://127.0.0.1:{port}")
    assert not Path(f"/proc/{pid}").exists()


def test_the_table_gives_the_ratio_of_cpu_time_to_each_peer() -> None:
    cells = [_cell("nginx", 40), _cell("sluice", 90), _cell("nginx", 60), _cell("sluice", 110)]
    text = table(summarize(cells))
    assert text.splitlines()[-2].split() == ["nginx", "2.00", "(2.25)"]


def test_a_figure_taken_beside_other_work_is_marked() -> None:
    quiet, noisy = (table(summarize([_cell("nginx", 40, foreign=f)])) for f in (0.01, 0.2))
    assert "*" not in quiet
    assert "* other processes" in noisy


@pytest.mark.parametrize("arguments", [["--only", "apache"], ["--rounds", "0"]])
def test_a_mistyped_option_says_what_there_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "there are direct, nginx" in (said := capsys.readouterr().err) or "at least 1" in said


def _cell(target: str, cpu: float, foreign: float = 0.0) -> Cell:
    return Cell(target, "answer@1", 1, cpu, 0.0, 10_000.0, 90, 400, 1000, 0, 0.9, foreign, 10**7)
