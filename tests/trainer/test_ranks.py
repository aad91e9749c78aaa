"""Two processes that share a run end with the weights that one would have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer import one_of_several
from tests.trainer.samples import reserved_port


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "kto"])
def test_two_processes_train_what_one_does(
    tiny_model_dir: Path, tmp_path: Path, method: str
) -> None:
    with reserved_port() as port:
        _train_as_two(tiny_model_dir, tmp_path, method, port)
    _, steps = one_of_several.train(tiny_model_dir, method)
    (weights, found), (others, others_found) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert found == others_found
    assert all(torch.equal(each, others[name]) for name, each in weights.items())
    # Adam makes steps of gradients that are rounding errors too, so weights are not compared.
    for (loss, norm, validation), step in zip(found, steps, strict=True):
        assert loss == pytest.approx(step.loss, rel=1e-3)
        assert norm == pytest.approx(step.gradient_norm, rel=1e-3)
        assert validation == pytest.approx(step.validation_loss, rel=1e-3)


def _train_as_two(model: Path, folder: Path, method: str, port: int) -> None:
    several = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, one_of_several.__file__, str(model), str(folder), method],
            env={**os.environ, **several, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
