"""What the target's passes over text cost: stages generate and logits."""

from __future__ import annotations

from fastdraft_hf.data.target_logits import stored_bytes
from fastdraft_hf.plan.amounts import busiest_rows, shards, stored_sets, writings
from fastdraft_hf.plan.commands import engine_of
from fastdraft_hf.plan.job import EXPORT_RATE, EXPORT_SECONDS, FIXED, Job, loading
from fastdraft_hf.plan.result import StagePlan
from fastdraft_hf.stages.logits import may_read_openvino


def plan_generate(job: Job) -> StagePlan:
    config = job.recipe.generate
    assert config is not None
    tokens = seconds = flops = 0.0
    notes = []
    count, devices = job.hardware.count, 1
    # Servers take text by text; processes take shard by shard, and wait for the busiest.
    by_shard = count > 1 and engine_of(job.recipe, job.hardware) != "vllm"
    size = config.rows_per_shard
    for name, wanted in config.sets.items():
        kept = 1.0  # share of instructions that a limit in time left
        for part in writings(name, wanted):
            rows = part.rows * kept
            busy = count * busiest_rows(rows, size, count) if by_shard else rows
            devices = max(devices, min(count, shards(rows, size)) if by_shard else count)
            whole = job.machine.write_seconds(job.target, busy, part.prompt, part.tokens)
            if part.max_seconds is not None and whole > part.max_seconds:
                share = part.max_seconds / whole
                kept *= share
                rows *= share
                tail = job.machine.row_seconds(job.target, part.tokens)
                whole = part.max_seconds + tail
                notes.append(f"{part.name}: cut to {rows:,.0f} rows by max_minutes")
            seconds += whole
            tokens += rows * part.tokens
            context = part.prompt + part.tokens / 2
            flops += rows * (part.prompt + part.tokens) * job.target.forward_flops(context)
            if not part.name.endswith("-instructions"):
                job.sets[name] = (rows, part.prompt, part.tokens)
    if not job.export_ready:
        export = EXPORT_SECONDS + job.target.parameters / EXPORT_RATE
        seconds += export
        notes.append(f"with {export:,.0f} s to export the target to OpenVINO, once a machine")
    longest = max((w.max_new_tokens + 200 for w in config.sets.values()), default=0)
    if job.cpu:
        memory = job.resident(job.target.parameters + 1.7e9)  # int8, GenAI's cache and buffers
    else:
        cache = config.batch_size * longest * job.target.cache_bytes()
        memory = job.resident(job.weights(job.target) + cache)
        seconds += loading(job.target)
    seconds += FIXED["generate"]
    return StagePlan(
        "generate",
        False,
        devices,
        tokens,
        flops,
        seconds,
        memory,
        4.0 * tokens,
        notes=tuple(notes),
    )


def plan_logits(job: Job) -> StagePlan:
    config = job.recipe.logits
    assert config is not None
    rows = [job.sets[name] for name in stored_sets(job.recipe) if name in job.sets]
    read = sum(count * (prompt + tokens) for count, prompt, tokens in rows)
    stored = sum(count * tokens for count, _, tokens in rows)
    openvino = job.cpu and may_read_openvino(config, "cpu")
    seconds = read / job.decoder.read_rate(job.target, 128, openvino=openvino)
    seconds += FIXED["logits"] + loading(job.target)
    batch = config.batch_tokens * job.target.width * 20.0
    memory = job.resident(job.decoder_weights(job.target) + batch + 512 * job.target.vocabulary * 8)
    return StagePlan(
        "logits",
        False,
        1,
        read,
        read * job.target.forward_flops(128),
        seconds,
        memory,
        stored_bytes(round(stored), config.top_k, job.target.vocabulary),
        notes=job.decoder_notes,
    )
