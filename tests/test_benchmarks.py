"""The benchmark's own parts: its stub engine answers rightly, and its sums are right."""

import http.client
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.assignments import check
from benchmarks.dataplane import main
from benchmarks.goals import Goal, goals_text, judge_goals
from benchmarks.install import SkipTarget, install_from_pypi
from benchmarks.load import ANSWER_1, STREAM_1, Endpoint, Workload, drive, send
from benchmarks.processes import Processes, StartError, free_port, measure_tree
from benchmarks.profiling import text
from benchmarks.report import Cell, Figures, Memory, table


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
    assert json.loads(ask(port, ANSWER_1.body()))["object"] == "chat.completion"
    *events, done, rest = ask(port, STREAM_1.body()).split(b"\n\n")
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


def test_our_client_holds_streams_open_and_counts_answers(processes: Processes) -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.stub", "--port", str(port)]
    pace = ["--chunks", "6", "--delay-ms", "20"]
    processes.start("stub", [*command, *pace], core=core(), ready=f"http://127.0.0.1:{port}/health")
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    streams = Workload("open@8", stream=True, connections=8, chunks=6, delay_ms=20)
    result = drive(endpoint, streams, 1, core())
    assert result.requests >= 8
    assert (result.failed, result.unfinished) == (0, 0)
    answers = Workload("answer@4", stream=False, connections=4)
    assert send(endpoint, answers, 100, core()).requests == 100


def test_a_stream_that_lacks_a_token_is_lost(processes: Processes) -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.stub", "--port", str(port)]
    command += ["--chunks", "5", "--delay-ms", "20"]
    processes.start("stub", command, core=core(), ready=f"http://127.0.0.1:{port}/health")
    longer = Workload("open@2", stream=True, connections=2, chunks=6, delay_ms=20)
    result = drive(Endpoint(f"http://127.0.0.1:{port}"), longer, 1, core())
    assert result.requests == 0
    assert result.failed > 0


def test_what_cannot_be_installed_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache").write_text("no folder can be made below a file")
    with pytest.raises(SkipTarget, match="some-gateway==1 could not be installed: "):
        install_from_pypi("some-gateway", "some-gateway==1", "some-gateway")


def test_samples_of_compiled_functions_are_charged_to_their_files() -> None:
    library = "(5afd__mypyc.cpython-311-x86_64-linux-gnu.so)"
    stacks = (
        f"serve (gateway/workers.py:52);CPyDef_fast____Answering____deliver {library};write (libc.so.6) 3\n"
        "serve (gateway/workers.py:52);uv_run (core.c:464) 1\n"
        "_worker (concurrent/futures/thread.py:81);lock_PyThread_acquire_lock (libpython.so) 9\n"
    )
    lines = [line.split() for line in text(stacks).split("\n")]
    assert ["75.0%", "_Answering._deliver", "(gateway/fast.py)"] in lines
    assert ["25.0%", "gateway/workers.py"] in lines
    assert ["of", "4", "samples"] in lines


def test_the_table_gives_the_ratio_of_cpu_time_to_each_peer() -> None:
    cells = [_cell("nginx", 40), _cell("sluice", 90), _cell("nginx", 60), _cell("sluice", 110)]
    assert ["nginx", "2.00", "(2.25)"] in [
        line.split() for line in table(Figures(cells)).split("\n")
    ]


def test_a_figure_taken_beside_other_work_is_marked() -> None:
    quiet, noisy = (table(Figures([_cell("nginx", 40, foreign=f)])) for f in (0.01, 0.2))
    assert "*" not in quiet
    assert "* other processes" in noisy


def test_a_peer_that_is_missing_is_named_with_the_reason() -> None:
    said = table(Figures([], missing={"portkey": "node is not installed"}))
    assert "portkey: not available: node is not installed" in said


@pytest.mark.parametrize(("cpu", "state"), [(43, "met"), (45, "not met")])
def test_a_goal_is_judged_by_the_ratio_within_the_run(cpu: float, state: str) -> None:
    goal = goals([_cell("vllm-router", 40), _cell("sluice", cpu)])["CPU of answer@1, ÷ vllm-router"]
    assert (goal.reached, goal.state) == (cpu / 40, state)


def test_a_goal_whose_figures_are_missing_is_not_called_met() -> None:
    everything = judge_goals(Figures([_cell("sluice", 40)]))
    assert {goal.state for goal in everything} == {"not measured"}
    assert goals_text(everything).count("not measured") == len(everything)


def test_a_disturbed_figure_makes_its_goal_doubtful() -> None:
    cells = [_cell("vllm-router", 40, foreign=0.2), _cell("sluice", 40)]
    assert goals(cells)["CPU of answer@1, ÷ vllm-router"].doubtful


def test_memory_is_compared_with_itself_earlier() -> None:
    memory = [Memory("sluice", 10_000, 60_000_000, 0), Memory("sluice", 100_000, 69_000_000, 0)]
    by_text = goals([], memory)
    assert by_text["memory after 100,000 requests, ÷ after 10,000"].state == "not met"
    assert by_text["memory of a worker after 100,000 requests"].state == "met"


def test_a_profile_charges_the_innermost_function() -> None:
    stacks = "main (a.py:1);read (gateway/wire.py:7) 30\nmain (a.py:1) 10\n"
    stacks += "run (threading.py:1);_worker (concurrent/futures/thread.py:81) 40\n"
    assert "  75.0%  gateway/wire.py" in text(stacks).splitlines()
    assert "  25.0%  main (a.py)" in text(stacks).splitlines()


@pytest.mark.parametrize("arguments", [["--only", "apache"], ["--rounds", "0"]])
def test_a_mistyped_option_says_what_there_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "there are direct, nginx" in (said := capsys.readouterr().err) or "at least 1" in said


def goals(cells: list[Cell], memory: list[Memory] | None = None) -> dict[str, Goal]:
    return {goal.text: goal for goal in judge_goals(Figures(cells, memory or []))}


def _cell(target: str, cpu: float, foreign: float = 0.0) -> Cell:
    return Cell(
        target=target,
        workload="answer@1",
        round=1,
        cpu_microseconds=cpu,
        beside_microseconds=0.0,
        per_second=10_000.0,
        p50_microseconds=0,
        p99_microseconds=400,
        mean_microseconds=100.0,
        requests=1000,
        failed=0,
        unfinished=0,
        core_busy=0.9,
        foreign=foreign,
        resident_bytes=10**7,
    )


def test_assignments_are_found_right() -> None:
    assert [text for text, good in check(20_000) if not good] == []
