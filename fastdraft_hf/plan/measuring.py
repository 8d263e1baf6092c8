"""What the stages that measure cost, and what the draft should bring."""

from __future__ import annotations

from fastdraft_hf.eval import evaluate
from fastdraft_hf.eval.bench import BASELINES, RUNTIMES, Setting
from fastdraft_hf.eval.metrics import mbsu
from fastdraft_hf.plan.acceptance import block_efficiency
from fastdraft_hf.plan.amounts import (
    EVALUATION_PROMPT,
    Answers,
    bench_answers,
    evaluation_answers,
)
from fastdraft_hf.plan.job import (
    CHECK_SECONDS,
    EXPORT_RATE,
    EXPORT_SECONDS,
    FIXED,
    MEMORY_PROCESS_SECONDS,
    Job,
    loading,
)
from fastdraft_hf.plan.result import Gain, StagePlan

# Tokens of a held-out text that trim reads (`tuning.texts`).
_TRIM_TEXT = 128


def plan_reduced_vocabulary(job: Job) -> StagePlan:
    config = job.recipe.reduced_vocabulary
    assert config is not None
    # The target reads every held-out text once; the draft twice, which is little beside it.
    read = config.texts * float(EVALUATION_PROMPT + _TRIM_TEXT)
    seconds = FIXED["reduced_vocabulary"]
    memory = 8.0 * job.draft.parameters
    if read:
        seconds += read / job.decoder.read_rate(job.target, 128) + loading(job.target)
        memory += job.decoder_weights(job.target)
    flops = read * job.target.forward_flops(128)
    disk = 4.0 * job.draft.parameters
    notes = job.decoder_notes if read else ()
    return StagePlan(
        "reduced_vocabulary",
        False,
        1,
        read,
        flops,
        seconds,
        job.resident(memory),
        disk,
        notes=notes,
    )


def plan_export(job: Job) -> StagePlan:
    config = job.recipe.export
    size = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.7}
    size |= {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
    each = EXPORT_SECONDS + job.draft.parameters / EXPORT_RATE
    openvino = list(config.openvino)
    if job.recipe.reduced_vocabulary is not None:
        openvino += [form for form in config.openvino if form != "int4"]
    seconds = len(openvino) * each + len(config.gguf) * 3.0
    forms = [*openvino, *config.gguf]
    if config.check:
        seconds += len(forms) * CHECK_SECONDS
    tokens = 0.0
    if forms and config.acceptance_texts:
        # One batch of short texts, then each form reads them; on the CPU, as exports are.
        tokens = config.acceptance_texts * 48.0
        step = job.decoder.round_seconds(job.target, job.draft, Setting("alone"))
        # A batch of eight costs about two steps of one text.
        seconds += 48 * step * 2 + loading(job.target)
        seconds += (1 + len(forms)) * tokens / job.decoder.read_rate(job.target, 24)
    disk = job.draft.parameters * sum(size[form] for form in forms)
    memory = job.resident(8.0 * job.draft.parameters)
    if tokens:
        memory += job.decoder_weights(job.target)
    flops = tokens * job.target.forward_flops(24) * (2 + len(forms))
    notes = job.decoder_notes if tokens else ()
    return StagePlan("export", False, 1, tokens, flops, seconds, memory, disk, notes=notes)


def answer_seconds(job: Job, answers: Answers, new_tokens: int) -> float:
    gamma = answers.setting.num_assistant_tokens
    efficiency = block_efficiency(job.chance, gamma) if answers.assisted else 1.0
    rounds = new_tokens / efficiency
    return job.decoder.prompt_seconds(
        job.target, EVALUATION_PROMPT, answers.setting
    ) + rounds * job.decoder.round_seconds(job.target, job.draft, answers.setting)


def plan_evaluate(job: Job) -> StagePlan:
    config = job.recipe.evaluate
    answers = evaluation_answers(job.recipe)
    count = sum(a.count for a in answers)
    tokens = float(count * config.max_new_tokens)
    seconds = sum(a.count * answer_seconds(job, a, config.max_new_tokens) for a in answers)
    kinds = evaluate.settings_of(config)
    share = sum(kind.run == evaluate.SAMPLED for kind in kinds) / len(kinds)
    sampled = share * sum(a.count for a in answers if a.assisted)
    length = EVALUATION_PROMPT + config.max_new_tokens
    read = sampled * length
    seconds += read / job.decoder.read_rate(job.target, length / 2)
    seconds += FIXED["evaluate"] + loading(job.target, job.draft, job.draft)
    memory = job.resident(4.0 * (job.target.parameters + 2 * job.draft.parameters))
    flops = (tokens + count * EVALUATION_PROMPT + read) * job.target.forward_flops(length / 2)
    return StagePlan(
        "evaluate",
        False,
        1,
        tokens,
        flops,
        seconds,
        memory,
        100.0 * tokens,
        notes=job.decoder_notes,
    )


def plan_bench(job: Job) -> StagePlan:
    config = job.recipe.bench
    answers = bench_answers(job.recipe)
    tokens = float(sum(a.count for a in answers) * config.max_new_tokens)
    seconds = sum(a.count * answer_seconds(job, a, config.max_new_tokens) for a in answers)
    warm_up = min(16, config.max_new_tokens)
    seconds += sum(answer_seconds(job, a, warm_up) for a in answers)
    if config.memory and answers:
        for name in {a.setting.name: a for a in answers}.values():
            seconds += MEMORY_PROCESS_SECONDS + loading(job.target, job.draft)
            seconds += answer_seconds(job, name, config.max_new_tokens)
    if answers:
        seconds += FIXED["bench"] + 2 * loading(job.target, job.draft)
    memory = job.resident(job.decoder_weights(job.target) + job.decoder_weights(job.draft))
    length = EVALUATION_PROMPT + config.max_new_tokens
    flops = tokens * job.target.forward_flops(length)
    return StagePlan(
        "bench", False, 1, tokens, flops, seconds, memory, 100.0 * tokens, notes=job.decoder_notes
    )


def gains(job: Job) -> list[Gain]:
    """Return what each γ of the recipe should bring, by the assumed acceptance."""
    gammas = sorted({*job.recipe.bench.num_assistant_tokens, *job.recipe.evaluate.gammas})
    cost = job.draft.parameters / job.target.parameters
    paths = job.recipe.bench.paths or ["ours"]
    found = []
    for gamma in gammas:
        efficiency = block_efficiency(job.chance, gamma)
        speed: dict[str, float] = {}
        for path in paths:
            if path.endswith("prompt-lookup"):  # no draft
                continue
            if not job.cpu and path in RUNTIMES["openvino"]:
                continue
            alone = job.decoder.round_seconds(job.target, job.draft, Setting(BASELINES[path]))
            one = job.decoder.round_seconds(job.target, job.draft, Setting(path, "", gamma))
            speed[path] = efficiency * alone / one
        found.append(Gain(gamma, efficiency, mbsu(efficiency, cost, gamma), speed))
    return found
