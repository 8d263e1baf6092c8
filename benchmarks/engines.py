"""Try a draft in every engine: does it load, is greedy text the target's own, what does it bring.

    make engines
    python benchmarks/engines.py [--engines vllm,llama.cpp] [--prompts 25] [--tokens 64]

vLLM and llama.cpp are set up in environments of their own in the cache folder (llama.cpp is
compiled: half an hour on two cores) and run as servers on loopback. Each engine is compared with
itself without the draft, on held-out prompts of HumanEval and IFBench:

1. in float32, greedy text with the draft against the target alone. Where two texts differ, the
   margin between the target's first and second choice there shows whether it was a tie.
   Acceptance is what the engine itself reports; ours stands beside it, on the same prompts;
2. as people run the engine (vLLM in bfloat16, llama.cpp q8_0, OpenVINO int8, PyTorch float32),
   tokens/s in turn with and without the draft. The best γ is chosen on one half of the prompts and
   judged on the other.

An engine that cannot do it is a row with its own message. Answers are kept in --work; a killed run
resumes. The exit status is 1 if a text differs without a tie.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from engine_servers import PACKAGES, servers
from lossless import open_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdraft_hf._progress import Progress
from fastdraft_hf._ties import first_difference, greedy_margin
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import Models, Setting, load_engine
from fastdraft_hf.eval.journal import Journal
from fastdraft_hf.eval.metrics import acceptance_rate, tokens_per_second
from fastdraft_hf.eval.prompts import EvaluationPrompt, draw_prompts
from fastdraft_hf.eval.speed import judge
from fastdraft_hf.export.openvino import cached_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.target.resolve import resolve_target

# A path of `eval.bench`, and its baseline here: the target alone through the same kernels.
PATHS = {
    "transformers": "alone",
    "ours": "ours",
    "openvino": "openvino-alone",
    "ours-openvino": "ours-openvino",
}
NAMES = {
    "transformers": ("transformers, stock", "transformers"),
    "ours": ("transformers, our loop", "transformers"),
    "openvino": ("OpenVINO GenAI", "openvino-genai"),
    "ours-openvino": ("OVModelForCausalLM, our loop", "optimum-intel"),
}
EXACT_GAMMA = 3
# (prompt, γ, longest answer) -> record
Decode = Callable[[EvaluationPrompt, int, int], DecodingRecord]


@contextlib.contextmanager
def opened(
    engine: str, target: Path, draft: Path, gammas: list[int], exact: bool, work: Path, tokens: int
) -> Iterator[Decode]:
    """Start an engine with the target and the draft."""
    if engine in PACKAGES:
        with servers(engine, target, draft, [0, *gammas], exact, work) as running:
            yield lambda prompt, gamma, longest: running[gamma].client.decode(
                prompt.task, prompt.key, prompt.ids, longest
            )
        return
    if exact:
        alone = "ours-openvino-alone" if engine == "ours-openvino" else PATHS[engine]
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        ways = {
            name: open_path(name, target, draft, model, tokens)
            for name in (engine, "alone" if engine == "ours" else alone)
        }
        without = ways[[*ways][-1]]
        yield lambda prompt, gamma, longest: (ways[engine] if gamma else without)(prompt, gamma)
        return
    models = Models(str(target), str(draft))
    if "openvino" in engine:
        models = Models(
            str(target),
            target_openvino=str(cached_openvino(target, "int8")),
            draft_openvino=str(cached_openvino(draft, "int8")),
        )
    settings = {gamma: Setting(engine, gamma) for gamma in gammas}
    settings[0] = Setting(PATHS[engine])
    decode = load_engine(models, list(settings.values()))
    yield lambda prompt, gamma, longest: decode(settings[gamma], prompt, longest)


def run(
    decode: Callable[[], contextlib.AbstractContextManager[Decode]],
    name: str,
    prompts: list[EvaluationPrompt],
    gammas: list[int],
    tokens: int,
    journal: Journal,
) -> dict[int, list[DecodingRecord]]:
    """Answer every prompt with every γ in turn; the order is reversed on every second prompt."""
    labels = {
        (number, gamma): f"{name}/{tokens}/{gamma}/{prompt.task}/{prompt.key}"
        for number, prompt in enumerate(prompts)
        for gamma in (gammas if number % 2 else gammas[::-1])
    }
    due = {key: label for key, label in labels.items() if label not in journal}
    if due:
        with (
            decode() as answer,
            Progress(name, len(labels), "answers", done=len(labels) - len(due)) as bar,
        ):
            for gamma in gammas:
                answer(prompts[0], gamma, 16)  # compiles and allocates
            for (number, gamma), label in due.items():
                journal.add(label, answer(prompts[number], gamma, tokens))
                bar.advance(1)
    return {g: [journal[labels[n, g]] for n in range(len(prompts))] for g in gammas}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="embedded:smollm2-135m-instruct")
    shipped = Path(__file__).parents[1] / "model_cards" / "SmolLM2-135M-Instruct-FastDraft"
    parser.add_argument("--draft", type=Path, default=shipped)
    parser.add_argument("--engines", default=",".join([*PATHS, *PACKAGES]), help="some of them")
    parser.add_argument("--prompts", type=int, default=25, help="of each of the two task sets")
    parser.add_argument("--timed", type=int, default=6, help="prompts of each set that are timed")
    parser.add_argument("--tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--gammas", default="2,4", help="values of γ that are timed")
    parser.add_argument("--work", type=Path, default=Path("runs/engines"))
    args = parser.parse_args()
    quiet_libraries()
    engines = args.engines.split(",")
    if unknown := [name for name in engines if name not in {*PATHS, *PACKAGES}]:
        parser.error(f"--engines: no engine {unknown[0]}; known: {', '.join([*PATHS, *PACKAGES])}")
    gammas = [int(gamma) for gamma in args.gammas.split(",")]
    args.work.mkdir(parents=True, exist_ok=True)
    target, draft = resolve_target(args.target).path, args.draft.resolve()
    prompts = draw_prompts(
        AutoTokenizer.from_pretrained(target), ["humaneval", "ifbench"], args.prompts, 300, 0
    )
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    journal = Journal(args.work / "records.jsonl")

    def measure(engine: str, exact: bool, some: list[EvaluationPrompt], ways: list[int]) -> dict:
        def open_engine() -> contextlib.AbstractContextManager[Decode]:
            used = [gamma for gamma in ways if gamma]
            return opened(engine, target, draft, used, exact, args.work, args.tokens)

        name = f"{engine}, {'float32' if exact else 'timed'}"
        return run(open_engine, name, some, ways, args.tokens, journal)

    ours = measure("ours", True, prompts, [0, EXACT_GAMMA])[EXACT_GAMMA]
    print(f"{describe_machine(machine())}; {len(prompts)} prompts, {args.tokens} tokens, greedy\n")
    print(
        f"| engine | version | equal texts | ties | faults | acceptance (γ = {EXACT_GAMMA}) | ours "
        "| target alone, tokens/s | with the draft | best γ | speed-up |"
    )
    print("|" + "---|" * 11)
    faults = 0
    for engine in engines:
        label, package = NAMES.get(engine) or (engine, PACKAGES[engine][0])
        version = PACKAGES[engine][1] if engine in PACKAGES else importlib.metadata.version(package)
        try:
            exact = measure(engine, True, prompts, [0, EXACT_GAMMA])
            timed = measure(engine, False, prompts[: 2 * args.timed], [0, *gammas])
        except (RuntimeError, OSError) as error:
            print(f"| {label} | {package} {version} | {' '.join(str(error).split())[-160:]} |")
            continue
        ties = wrong = 0
        for prompt, one, two in zip(prompts, exact[0], exact[EXACT_GAMMA], strict=True):
            if (at := first_difference(one.tokens, two.tokens)) is None:
                continue
            long_enough = at < min(len(one.tokens), len(two.tokens))
            tie = long_enough and greedy_margin(reference, [*prompt.ids, *one.tokens[:at]]).tie
            ties, wrong = ties + tie, wrong + (not tie)
        faults += wrong
        ways = {Setting(engine, g): list(zip(timed[g], timed[0], strict=True)) for g in gammas}
        found = judge(ways)
        gamma = found.best.num_assistant_tokens
        print(
            f"| {label} | {package} {version} | {len(prompts) - ties - wrong} | {ties} | {wrong} "
            f"| {acceptance_rate(exact[EXACT_GAMMA]):.3f} | {acceptance_rate(ours):.3f} "
            f"| {tokens_per_second(timed[0]):.1f} | {tokens_per_second(timed[gamma]):.1f} "
            f"| {gamma} | {found.ratio.value:.2f}x ({found.ratio.low:.2f} to "
            f"{found.ratio.high:.2f}) |",
            flush=True,
        )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
