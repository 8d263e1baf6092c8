"""What a reduced vocabulary saves: the full head of a trained draft against smaller ones.

    python benchmarks/reduced_vocabulary.py RUN [--sizes 4k,auto] [--paths openvino,ours-openvino]

RUN is the folder of a run. Its draft is reduced to each size by the tokens of the run's generated
sets (`auto`: as the stage chooses), exported to OpenVINO int8 under RUN/benchmark-reduced, and
answers held-out prompts greedily. All heads and the target alone take turns within a prompt; ratios
are paired, with 95% bootstrap intervals over prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdraft_hf._atomic import read_json, write_json
from fastdraft_hf._config import parse_count
from fastdraft_hf.cli.run import quiet_libraries
from fastdraft_hf.decode.records import DecodingRecord
from fastdraft_hf.eval.bench import Models, Setting, load_engine
from fastdraft_hf.eval.metrics import acceptance_rate, paired_ratio, tokens_per_second
from fastdraft_hf.eval.prompts import draw_prompts
from fastdraft_hf.export.openvino import cached_openvino, export_openvino
from fastdraft_hf.hub.card import describe_machine
from fastdraft_hf.recipe import read_recipe
from fastdraft_hf.stages.provenance import machine
from fastdraft_hf.stages.reduced_vocabulary import reduce_draft
from fastdraft_hf.stages.run import Run
from fastdraft_hf.target.resolve import stop_ids


def reduced(run: Run, size: str, folder: Path) -> tuple[str, Path]:
    """Return the words for a head and the OpenVINO folder of the draft with it."""
    draft = run.latest_model(before="reduced_vocabulary")
    words = "full"
    if size != "full":
        facts = folder / f"{size}.json"
        if not facts.exists():
            align = run.recipe.training_stages()["align"]
            sets = [run.stage_folder("generate") / one.name for one in align.sources]
            wanted = None if size == "auto" else parse_count(size)
            target, output = run.target.path, folder / size
            output.mkdir(parents=True, exist_ok=True)
            write_json(facts, reduce_draft(draft, sets, wanted, output, target=target))
        draft, found = folder / size, read_json(facts)
        words = f"{found['draft_vocab_size']:,} ({found['coverage']:.1%} of the text)"
    output = folder / f"{size}-openvino"
    export_openvino((draft, output, "int8"))
    return words, output


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that has aligned a draft")
    parser.add_argument("--sizes", default="auto", help="such as 4k,16k; auto: the stage's choice")
    parser.add_argument("--paths", default="openvino", help="of openvino, ours-openvino")
    parser.add_argument("--tasks", default="humaneval,ifbench")
    parser.add_argument("--prompts", type=int, default=8, help="of each task set")
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--new", type=int, default=48, help="new tokens at most")
    args = parser.parse_args()
    quiet_libraries()
    run = Run(read_recipe(args.run / "recipe.yaml", [f"output_dir={args.run}"]), args.run)
    tokenizer = run.chat_tokenizer()
    target = run.target.path
    ends = sorted(stop_ids(target, tokenizer))
    folder = args.run / "benchmark-reduced"
    heads = dict(reduced(run, size, folder) for size in ("full", *args.sizes.split(",")))
    print(f"{describe_machine(machine())}\n")
    print("| path | task set | scored tokens | γ | acceptance rate | tokens/s | ratio to alone |")
    print("|---|---|---|---|---|---|---|")
    for path in args.paths.split(","):
        alone = Setting(path).baseline
        drafting = [Setting(path, gamma) for gamma in args.gammas]
        # (head, setting) -> engine; each head has models of its own
        ways = {}
        for head, exported in heads.items():
            models = Models(
                target=str(target),
                target_openvino=str(cached_openvino(target, "int8")),
                draft_openvino=str(exported),
                stop_ids=ends,
            )
            settings = [*drafting, alone] if head == "full" else drafting
            engine = load_engine(models, settings)
            ways |= {(head, setting): engine for setting in settings}
        for task in args.tasks.split(","):
            prompts = draw_prompts(tokenizer, [task], args.prompts, 600, run.recipe.seed)
            found: dict[tuple[str, Setting], list[DecodingRecord]] = {way: [] for way in ways}
            for (_, setting), engine in ways.items():
                engine(setting, prompts[0], 16)  # compiles and allocates
            for number, prompt in enumerate(prompts):
                for head, setting in [*ways][:: 1 if number % 2 else -1]:
                    record = ways[head, setting](setting, prompt, args.new)
                    found[head, setting].append(record)
            base = found["full", alone]
            print(f"| {path} | {task} | alone | | | {tokens_per_second(base):.1f} | |")
            for (head, setting), records in found.items():
                if not setting.num_assistant_tokens:
                    continue
                ratio = paired_ratio(list(zip(records, base, strict=True)))
                print(
                    f"| {path} | {task} | {head} | {setting.num_assistant_tokens} "
                    f"| {acceptance_rate(records):.3f} | {tokens_per_second(records):.1f} "
                    f"| {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
