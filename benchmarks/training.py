"""`make bench-training`: useful tokens a second of the training loop beside TRL's, in one run.

    python -m benchmarks.training [--device cuda] [--model smollm2-135m|1b|8b|tiny] [--rows N]

All train the same LoRA on the same rows: Sluice, TRL's SFTTrainer with padded batches, and the same
with packing. Each round visits every trainer in turn, so that a disturbance of the machine falls on
all of them. Useful tokens are those of the rows, whatever a trainer adds or spares.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import loop, models
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.packing import Item
from trainer.rendering import Rendered, render

# Hidden size, inner size, layers, heads, key heads, vocabulary: Llama 3.2 1B, and 3.1 8B.
SHAPES = {
    "tiny": (128, 512, 4, 4, 2, 2048),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}
INSTRUCTION = (
    "Is this sentence from a product review positive, negative or neutral about the product? "
    "Answer with one word."
)
# As many rows as TRL puts into a padded batch; packed rows hold about as many tokens.
BATCH = 16
ROW_TOKENS = 1024
LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Setting:
    device: torch.device
    dtype: torch.dtype
    load: Callable[[], Any]
    rows: Sequence[Rendered]
    pad: int


@dataclass(frozen=True, slots=True)
class Measured:
    """`seconds` of wall clock, `cpu` of all of the process's threads, `memory` in bytes at its peak
    on the GPU, and the mean loss."""

    seconds: float
    cpu: float
    memory: int
    loss: float


def config() -> TrainingConfig:
    return TrainingConfig.from_mapping(
        {
            "epochs": 1,
            "rank": 16,
            "alpha": 32,
            "row_tokens": ROW_TOKENS,
            "max_length": ROW_TOKENS,
            "batch_tokens": ROW_TOKENS,
            "learning_rate": LEARNING_RATE,
            "warmup": 0.0,
            "schedule": "constant",
        }
    )


def train_sluice(setting: Setting) -> Measured:
    model = models.add_adapter(setting.load(), config())
    losses: list[float] = []
    with _Clock(setting.device) as clock:
        loop.train(
            model,
            [Item((row,)) for row in setting.rows],
            [],
            config(),
            on_step=lambda progress: losses.append(progress.loss),
            should_stop=lambda: False,
        )
    return clock.measured(statistics.fmean(losses))


def train_trl(setting: Setting, *, packing: bool) -> Measured:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [
        {
            "input_ids": list(row.ids),
            "labels": [-100] * row.answer_start + list(row.answer),
        }
        for row in setting.rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=setting.device.type == "cpu",
            bf16=setting.device.type == "cuda",
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=ROW_TOKENS,
            packing=packing,
            per_device_train_batch_size=1 if packing else BATCH,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = SFTTrainer(
            models.add_adapter(setting.load(), config()),
            options,
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(PreTrainedTokenizerFast, setting.pad),
        )
        with _Clock(setting.device) as clock:
            done = trainer.train()
    return clock.measured(float(done.training_loss))


TRAINERS: Mapping[str, Callable[[Setting], Measured]] = {
    "Sluice": train_sluice,
    "TRL, padded": lambda setting: train_trl(setting, packing=False),
    "TRL, packed": lambda setting: train_trl(setting, packing=True),
}


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def __enter__(self) -> "_Clock":
        if self._gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            torch.cuda.synchronize()
        self._wall = time.perf_counter() - self._wall
        self._cpu = time.process_time() - self._cpu

    def measured(self, loss: float) -> Measured:
        memory = torch.cuda.max_memory_allocated() if self._gpu else 0
        return Measured(self._wall, self._cpu, memory, loss)


def _tokenizer(kind: Any, pad: int) -> Any:
    """A tokenizer that knows its padding and nothing else: the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    names = {f"<{number}>": number for number in range(pad + 1)}
    return kind(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="<0>")),
        pad_token=f"<{pad}>",
        eos_token=f"<{pad}>",
    )


def review_rows(base: BaseModel, samples: Path, count: int, *, instruction: bool) -> list[Rendered]:
    """Sentences of product reviews with their class, under an instruction or by themselves."""
    tokenizer = models.load_tokenizer(base)
    system = [{"role": "system", "content": INSTRUCTION if instruction else "Classify."}]
    lines = samples.read_text(encoding="utf-8").splitlines()[:count]
    return [
        render(
            tokenizer,
            [*system, {"role": "user", "content": row["text"]}],
            row["label"],
            stops=frozenset({tokenizer.eos_token_id}),
            max_length=ROW_TOKENS,
        )
        for row in map(json.loads, lines)
    ]


def random_rows(count: int, vocabulary: int) -> list[Rendered]:
    """Tokens by the dice: prompts of 40 to 700 of them, nothing shared, answers of 10 to 150."""
    dice = np.random.default_rng(0)
    rows: list[Rendered] = []
    for _ in range(count):
        prompt = int(np.clip(dice.lognormal(5.3, 0.7), 40, 700))
        answer = int(np.clip(dice.lognormal(3.7, 0.7), 10, 150))
        ids = dice.integers(10, vocabulary - 1, prompt + answer)
        rows.append(Rendered(tuple(int(each) for each in ids), prompt))
    return rows


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, layers, heads, key_heads, vocabulary = SHAPES[name]
    shape = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=name != "8b",
    )
    torch.manual_seed(0)
    with device:
        maker: Any = AutoModelForCausalLM
        return maker.from_config(shape, dtype=dtype, attn_implementation="sdpa")


def settings_of(options: argparse.Namespace) -> Mapping[str, Setting]:
    """What is trained, by a name for the table."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.model in SHAPES:
        vocabulary = SHAPES[options.model][-1]
        rows = random_rows(options.rows, vocabulary)
        return {
            f"{options.model}, random": Setting(
                device, dtype, lambda: random_model(options.model, device, dtype), rows, 0
            )
        }
    base = BaseModel.open(options.model, options.data_dir / "models" / options.model)
    samples = options.data_dir / "samples" / "reviews.jsonl"

    def load() -> Any:
        return models.load_base(base, device, dtype)

    return {
        name: Setting(
            device,
            dtype,
            load,
            review_rows(base, samples, options.rows, instruction=instruction),
            0,
        )
        for name, instruction in (
            ("reviews under one instruction", True),
            ("reviews by themselves", False),
        )
    }


def measure(setting: Setting, rounds: int) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {name: [] for name in TRAINERS}
    for number in range(rounds):
        for name, train in TRAINERS.items():
            found[name].append(train(setting))
            gc.collect()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            last = found[name][-1]
            print(f"  round {number + 1}, {name}: {last.seconds:.1f} s", file=sys.stderr)
    return found


def table(name: str, setting: Setting, found: Mapping[str, Sequence[Measured]]) -> str:
    """Median speeds, and each beside Sluice's."""
    tokens = sum(len(row.ids) for row in setting.rows)
    speed = {each: tokens / statistics.median(m.seconds for m in found[each]) for each in found}
    lines = [
        f"**{name}**: {len(setting.rows)} rows, {tokens:,} tokens",
        "",
        "| | useful tokens/s | Sluice's multiple of it | tokens by CPU second | loss | GPU memory |",
        "|---|---|---|---|---|---|",
    ]
    for each, runs in found.items():
        by_cpu = tokens / statistics.median(run.cpu for run in runs)
        memory = max(run.memory for run in runs)
        lines.append(
            f"| {each} | {speed[each]:,.0f} | {speed['Sluice'] / speed[each]:.2f} | {by_cpu:,.0f} "
            f"| {runs[-1].loss:.3f} | {f'{memory / 2**30:.1f} GiB' if memory else '–'} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="", help="a folder of data/models, or tiny, 1b, 8b")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch can use here", file=sys.stderr)
        return 1
    sample = (options.data_dir / "models" / "smollm2-135m" / "config.json").is_file()
    if not options.model:
        options.model = "1b" if options.device == "cuda" else "smollm2-135m" if sample else "tiny"
    options.rows = options.rows or (512 if options.device == "cuda" else 96)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name, setting in settings_of(options).items():
        print(name, file=sys.stderr)
        print(table(name, setting, measure(setting, options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    sys.exit(main())
