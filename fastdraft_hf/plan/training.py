"""What training costs: stages pretrain, continue and align."""

from __future__ import annotations

import math

from fastdraft_hf.plan.amounts import writings
from fastdraft_hf.plan.commands import not_launched, training_devices
from fastdraft_hf.plan.job import FIXED, Job, loading
from fastdraft_hf.plan.result import StagePlan
from fastdraft_hf.recipe import Recipe, distribution_source

# Timed steps of a stage with a limit in minutes.
TIMED_STEPS = 12
# Share of a training token's FLOPs that one of evaluation costs.
FORWARD_SHARE = 1 / 3


def plan_training(job: Job, name: str) -> StagePlan:
    config = job.recipe.training_stages()[name]
    length = row_tokens(job, name)
    flops = job.draft.train_flops(length)
    online = distribution_source(job.recipe, name) == "online"
    if online:
        flops += job.target.forward_flops(length / 2)
    devices = training_devices(job.recipe, job.hardware)
    rate = job.machine.train_rate(name, job.draft, flops) * devices / job.hardware.count
    notes = []
    if devices < job.hardware.count:
        notes.append(f"on one device ({not_launched(job.recipe)})")
    if online:
        notes.append("with the target's distribution, online")
    tokens = float(config.max_train_tokens)
    step = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * length
    ) * devices
    seconds = FIXED[name] + loading(job.draft)
    if config.max_minutes is not None:
        seconds += TIMED_STEPS * step / rate
        if tokens > 60 * config.max_minutes * rate:
            tokens = 60 * config.max_minutes * rate
            notes.append(f"cut to {tokens:,.0f} tokens by max_minutes")
    if name == "align":
        rows = sum(job.sets[s.name][0] for s in config.sources if s.name in job.sets)
        if rows:
            notes.append(f"{tokens / (rows * length):.1f} passes over the texts")
    steps = tokens / step
    evaluations = math.ceil(steps / config.save_steps) if config.eval_sequences else 0
    read = evaluations * config.eval_sequences * length
    seconds += tokens / rate + read * FORWARD_SHARE / rate
    trained = 16.0 * job.draft.parameters  # weights, gradients, two moments, float32
    batch = config.per_device_train_batch_size * length
    memory = trained + job.draft.activation_bytes(batch, 4 if job.cpu else 2)
    if online:
        memory += job.weights(job.target)
    return StagePlan(
        name,
        False,
        devices,
        tokens,
        tokens * flops,
        seconds,
        job.resident(memory),
        4.0 * job.draft.parameters,
        scratch_bytes=2 * 12.0 * job.draft.parameters + tokens * token_bytes(job, name),
        notes=tuple(notes),
    )


def token_bytes(job: Job, name: str) -> float:
    """Return the bytes a token of a stage's text takes on disk while it trains."""
    if name == "align":
        return 16.0  # ids and labels, 8 bytes each
    if job.recipe.training_stages()[name].streams:
        return 0.0
    return 2.0 if job.draft.vocabulary <= 2**16 else 4.0  # token shards


def row_tokens(job: Job, name: str) -> float:
    """Return the mean length of a training sequence."""
    config = job.recipe.training_stages()[name]
    if name != "align":
        return float(config.max_length)
    read = [job.sets[s.name] for s in config.sources if s.name in job.sets]
    rows = sum(count for count, _, _ in read)
    if not rows:
        return float(config.max_length)
    tokens = sum(count * (prompt + tokens) for count, prompt, tokens in read)
    return min(float(config.max_length), tokens / rows)


def mean_rows(recipe: Recipe) -> dict[str, float]:
    """Return the mean length of a sequence of each training stage, without limits in time."""
    sets = {}
    for name, wanted in (recipe.generate.sets if recipe.generate else {}).items():
        last = writings(name, wanted)[-1]
        sets[name] = (last.rows, last.prompt + last.tokens)
    found = {}
    for stage, config in recipe.training_stages().items():
        read = [sets[s.name] for s in config.sources if s.name in sets]
        rows = sum(count for count, _ in read)
        found[stage] = float(config.max_length)
        if stage == "align" and rows:
            mean = sum(count * tokens for count, tokens in read) / rows
            found[stage] = min(found[stage], mean)
    return found
