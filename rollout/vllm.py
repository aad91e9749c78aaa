"""How a vLLM server is started: its command line and its environment."""

from collections.abc import Mapping
from pathlib import Path

from rollout.settings import VllmSection

# After SIGTERM running requests may go on for this long before the server cuts them.
SHUTDOWN_SECONDS = 20


def vllm_command(section: VllmSection, model: Path, port: int, *, gpu: bool) -> list[str]:
    """The command line of one replica that serves `model` with adapters loaded at run time."""
    command = [str(section.python), "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "model": str(model),
        "served-model-name": section.served_name,
        "host": section.host,
        "port": str(port),
        "max-model-len": str(section.max_model_len),
        "max-loras": str(section.max_adapters),
        "max-cpu-loras": str(section.max_adapters),
        "max-lora-rank": str(section.max_rank),
        "shutdown-timeout": str(SHUTDOWN_SECONDS),
        # Without it a shadow request would wait in the same line as a client's.
        "scheduling-policy": "priority",
        "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
        "tool-call-parser": "hermes",
    }
    flags = ["enable-lora", "enable-auto-tool-choice"]
    if not gpu:
        options |= {"dtype": "float32", "max-num-seqs": "16", "kv-cache-memory-bytes": "1G"}
        flags.append("enforce-eager")
    for name, value in options.items():
        command += [f"--{name}", value]
    return [*command, *(f"--{flag}" for flag in flags), *section.arguments]


def vllm_environment(
    environ: Mapping[str, str], cache: Path, *, gpu: bool, threads: int
) -> dict[str, str]:
    """`environ` with what vLLM needs; `cache` keeps what its first start works out."""
    # It is in whole GiB and overrides --kv-cache-memory-bytes.
    kept = {name: value for name, value in environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    kept |= {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
    }
    kept.setdefault("VLLM_CACHE_ROOT", str(cache))
    if not gpu:
        kept |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # An early request stalls for half a minute on a compile otherwise.
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": str(threads),
            # Threads that wait by spinning take the cores from whatever else runs on them.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return kept
