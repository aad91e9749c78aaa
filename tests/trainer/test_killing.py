"""A job that is killed at any instant of its writing, and resumed, ends with the same adapter."""

import os
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from rollout.artifacts import ArtifactStore
from rollout.errors import SluiceError
from tests.trainer.test_job import dataset
from trainer.config import TrainingConfig
from trainer.folders import hold
from trainer.job import Job

# Each of these changes the disk, or is about to.
_WRITING = frozenset(
    {"open", "os.rename", "os.mkdir", "os.remove", "shutil.copyfile", "shutil.rmtree"}
)


def a_job(model: Path, folder: Path, **settings: Any) -> Job:
    config = {"epochs": 4, "row_tokens": 256, "max_length": 128, **settings}
    job = Job(
        base="tiny",
        base_path=str(model),
        folder=str(folder),
        config=asdict(TrainingConfig.from_mapping(config)),
        max_rank=16,
        threads=1,
        # After every step: most of what there is to interrupt is the saving.
        checkpoint_seconds=1e-9,
    )
    job.dataset.parent.mkdir(parents=True, exist_ok=True)
    job.dataset.write_bytes(dataset().content)
    return job


def carry_out(job: Job, artifacts: str, kill_at: int, say: Any) -> None:
    """What a trainer does with a job, until the `kill_at`-th time that it touches the disk."""
    from trainer import job as jobs
    from trainer.publish import publish_bundle

    touched = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        # The root of all that this run writes is the parent of both.
        if event in _WRITING and str(Path(job.folder).parent) in str(arguments):
            touched += 1
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    steps: list[Mapping[str, Any]] = []
    jobs.carry_out(job, steps.append, lambda: False)
    digest = publish_bundle(ArtifactStore(artifacts), job.bundle).digest
    say.send((digest, touched, [line for line in steps if "progress" in line]))


def limited(job: Job, limit: int, size: int, say: Any) -> None:
    """A job on a machine that lacks something."""
    from trainer import job as jobs

    resource.setrlimit(limit, (size, size))
    try:
        jobs.carry_out(job, lambda _: None, lambda: False)
    except SluiceError as exc:
        say.send(exc.message)
    except (MemoryError, RuntimeError, OSError) as exc:
        say.send(jobs._explain(exc))


@pytest.fixture(scope="module")
def nursery() -> ForkServerContext:
    """Children are forked from a process that has loaded torch already, and no thread but one."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["trainer.job", "torch", "transformers", "peft", "trainer.loop"])
    return context


class Trainer:
    """Starts processes that do one job each."""

    def __init__(
        self, context: ForkServerContext, model: Path, root: Path, store: str = "artifacts"
    ) -> None:
        self._context = context
        self._model = model
        self.root = root
        self.artifacts = (root / store).as_uri()

    def elsewhere(self, store: str) -> "Trainer":
        """One that publishes to another store."""
        return Trainer(self._context, self._model, self.root, store)

    def job(self, name: str, **settings: Any) -> Job:
        return a_job(self._model, self.root / name, **settings)

    def attempt(self, job: Job, kill_at: int = 0) -> tuple[str, int, list[Any]] | None:
        """What came out, how often the disk was touched, and the steps; None where it was killed."""
        ended: tuple[str, int, list[Any]] | None
        ended = self._in_a_process(carry_out, job, self.artifacts, kill_at)
        return ended

    def limited(self, job: Job, limit: int, size: int) -> str | None:
        said: str | None = self._in_a_process(limited, job, limit, size)
        return said

    def _in_a_process(self, work: Callable[..., None], *arguments: Any) -> Any:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(*arguments, theirs))
        process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            return None
        finally:
            process.join()
            ours.close()


@pytest.fixture
def trainer(nursery: ForkServerContext, tiny_model_dir: Path, tmp_path: Path) -> Trainer:
    return Trainer(nursery, tiny_model_dir, tmp_path)


@pytest.mark.timeout(300)
def test_a_job_killed_at_any_instant_ends_with_the_same_bundle(trainer: Trainer) -> None:
    undisturbed = trainer.attempt(trainer.job("whole"))
    assert undisturbed is not None
    digest, touched, steps = undisturbed
    assert touched > 2 * len(steps), "each step was saved"

    seed = random.SystemRandom().getrandbits(32)
    dice = random.Random(seed)
    job = trainer.job("killed")
    for _ in range(4):
        ended = trainer.attempt(job, kill_at=dice.randrange(1, touched // 2))
        if ended is not None:
            assert ended[0] == digest, f"seed {seed}"
            break
        whole = ArtifactStore(trainer.artifacts).bundles()
        assert whole == [digest], f"half a bundle, seed {seed}"
    last = trainer.attempt(job)
    assert last is not None
    assert last[0] == digest, f"seed {seed}"
    left = {path.name for path in (trainer.root / "artifacts" / "bundles").iterdir()}
    assert {name for name in left if not name.startswith(".draft-")} == {digest}


@pytest.mark.parametrize("before_the_end", [1, 3, 6])
def test_a_job_killed_while_it_publishes_leaves_nothing_or_all_of_it(
    trainer: Trainer, before_the_end: int
) -> None:
    job = trainer.job("killed", epochs=1)
    whole = trainer.attempt(job)
    assert whole is not None
    # From the last checkpoint on it is the same each time.
    again = trainer.elsewhere("counted").attempt(job)
    assert again is not None
    killed = trainer.elsewhere("killed-there")
    assert killed.attempt(job, kill_at=again[1] - before_the_end) is None
    assert set(ArtifactStore(killed.artifacts).bundles()) <= {whole[0]}
    assert killed.attempt(job) is not None
    assert ArtifactStore(killed.artifacts).bundles() == [whole[0]]


def test_two_jobs_of_one_folder_take_turns(tmp_path: Path) -> None:
    first, had = hold(tmp_path), threading.Event()

    def wait() -> None:
        with hold(tmp_path):
            had.set()

    second = threading.Thread(target=wait)
    second.start()
    assert not had.wait(0.3)
    first.close()
    assert had.wait(60)
    second.join()


def test_a_full_disk_and_a_full_memory_are_said_and_leave_no_bundle(trainer: Trainer) -> None:
    # A checkpoint is larger than this, and an adapter too.
    job = trainer.job("full")
    said = trainer.limited(job, resource.RLIMIT_FSIZE, 20_000)
    assert said is not None
    assert "cannot write the checkpoint" in said
    assert not job.bundle.exists()
    assert list((trainer.root / "full" / "checkpoint").iterdir()) == []

    # Less than what it has already: the next allocation of any size fails.
    said = trainer.limited(trainer.job("starved"), resource.RLIMIT_AS, 1 << 20)
    assert said is not None
    assert said.startswith("out of memory")
    assert not trainer.job("starved").bundle.exists()
    # With room again the same job goes on.
    assert trainer.attempt(job) is not None
