"""Real engines for tests: a tiny random model, adapters for it, and vLLM that serves them.

    python -m tests.engines FOLDER

writes `model/` and `adapters/{first,second}/` below FOLDER. It runs in a process of its own so
that tests which never touch a model don't pay for importing torch.
"""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Self

from rollout.settings import VllmSection
from rollout.vllm import vllm_command, vllm_environment

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

ADAPTERS = ("first", "second")
START_SECONDS = 240.0
STOP_SECONDS = 30.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A random Llama of half a million weights, as transformers saves it, and what fits on it."""

    path: Path
    adapters: Mapping[str, Path]


def tiny_model(cache: Path) -> TinyModel:
    """The tiny model, made once for each cache folder and again when this file or peft changes."""
    ingredients = (
        Path(__file__).read_bytes(),
        *(metadata.version(package).encode() for package in ("torch", "transformers", "peft")),
    )
    digest = hashlib.sha256(b"\0".join(ingredients)).hexdigest()[:12]
    folder = cache / f"tiny-{digest}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            subprocess.run(
                [sys.executable, "-m", "tests.engines", f"{draft}/whole"],
                cwd=ROOT,
                check=True,
                timeout=300,
            )
            try:
                Path(draft, "whole").rename(folder)
            except OSError:
                # Another test run has made the same one meanwhile.
                if not folder.exists():
                    raise
    return TinyModel(folder / "model", {name: folder / "adapters" / name for name in ADAPTERS})


class VllmServer:
    """One vLLM, started as `sluice up` starts it, on a port of its own; a context manager.

    `url` has no path, `base` is the name that the model is served under. Adapters are loaded and
    unloaded by whoever needs them, through `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.
    """

    def __init__(self, model: Path, log: Path, *, base: str = "tiny") -> None:
        self.base = base
        self.log = log
        self._model = model
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The API server's process id, which is the id of its process group too."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start it and return once it serves its base. Raises RuntimeError with the log's end."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start it and return at once, so that several start at the same time."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                _command(self._model, self.base, self._port),
                env=_environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                # The engine process outlives a killed API process; a group ends them together.
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return once it serves its base. Raises RuntimeError with the log's end."""
        assert self._process is not None, "not launched"
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                end = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"vLLM did not start; the end of {self.log}:\n{end}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End all of its processes. A second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill(self) -> None:
        """SIGKILL for all of its processes; `start` brings it back on the same port."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def generated(self) -> float:
        """Tokens that it has generated since it was started."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        name = "vllm:generation_tokens_total{"
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _command(model: Path, base: str, port: int) -> list[str]:
    section = VllmSection(
        python=PYTHON,
        served_name=base,
        max_model_len=512,
        max_adapters=4,
        # The last one wins: a tiny model needs no GiB.
        arguments=("--kv-cache-memory-bytes", "64M"),
    )
    return vllm_command(section, model, port, gpu=False)


def _environment() -> dict[str, str]:
    # The cache stays in the checkout: the first start in a fresh one costs 20 s more.
    return vllm_environment(os.environ, ROOT / ".cache" / "vllm", gpu=False, threads=1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _build(folder: Path) -> None:
    import torch

    torch.manual_seed(20)
    vocabulary = _build_tokenizer(folder / "model")
    _build_model(folder / "model", vocabulary)
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        _build_adapter(folder / "model", folder / "adapters" / name)


def _build_tokenizer(target: Path) -> int:
    """A byte-level BPE of Python's own help texts, which every Python brings along."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(target)
    return len(fast)


def _build_model(target: Path, vocabulary: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # Wide enough that greedy answers differ between prompts and between adapters.
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(target)


def _build_adapter(model: Path, target: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    # `init_lora_weights=False` draws B at random: the adapter does something without training.
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=32,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, config).save_pretrained(str(target))


if __name__ == "__main__":
    _build(Path(sys.argv[1]))
