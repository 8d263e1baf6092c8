"""Distributions through the whole trainer: every way of batching against float64, every refusal."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from formulas import dense_terms, weighted
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_training import Make, Row, V, completions, with_columns
from transformers import TrainerCallback, get_scheduler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data import columns
from fastdraft_hf.train.callbacks import newest_complete
from fastdraft_hf.train.checks import NonFiniteLossError
from fastdraft_hf.train.distribution import TopK
from fastdraft_hf.train.rows import DraftCollator
from fastdraft_hf.train.trainer import DraftDistillationTrainer

SEEN = "num_input_tokens_seen"
MIXED: dict[str, float] = {"ce": 0.3, "kl": 0.5, "jsd": 0.4}


@pytest.fixture(scope="module")
def target(tiny_model: Make) -> Any:
    return tiny_model(seed=5, num_hidden_layers=1)


# --- the loss against plain float64


def reference(
    model: Any, documents: list[Row], objective: dict[str, float], temperature: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return the mean loss, its gradients and the labelled tokens, document by document.

    Args:
        model: the draft.
        documents: what is read alone, with nothing beside it: input_ids, labels and the columns.
        objective: weights by term.
        temperature: of the distributions.
    """
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    sums, count = torch.zeros((), dtype=torch.float64), 0
    for document in documents:
        positions = [t for t, label in enumerate(document["labels"]) if t and label != -100]
        count += len(positions)
        if not positions:
            continue
        hidden = exact.model(torch.tensor([document["input_ids"]])).last_hidden_state[0]
        stored = TopK(
            torch.tensor([document[columns.IDS][t] for t in positions]),
            torch.tensor([document[columns.LOG_PROBS][t] for t in positions]).double(),
            torch.tensor([document[columns.TAIL][t] for t in positions]).double(),
        )
        logits = hidden[[t - 1 for t in positions]] @ exact.lm_head.weight.T
        labels = torch.tensor([document["labels"][t] for t in positions])
        terms = dense_terms(logits, labels, objective, stored, temperature)
        sums = sums + weighted(terms, objective)
    loss = sums / count
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in exact.named_parameters()}, count


def check(
    made: DraftDistillationTrainer,
    documents: list[Row],
    objective: dict[str, float] | None = None,
    temperature: float = 1.0,
    batches: list[Any] | None = None,
) -> float:
    """Hold the trainer's whole epoch against the reference; return the loss."""
    model = made.model.train()
    expected, gradients, count = reference(model, documents, objective or MIXED, temperature)
    batches = list(made.get_train_dataloader()) if batches is None else batches
    # What `Trainer` divides by, counted by `Trainer`.
    items = int(made._get_num_items_in_batch(batches, torch.device("cpu")))
    assert items == count
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = made.compute_loss(model, batch, num_items_in_batch=items)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(float(expected), rel=2e-5)
    for name, parameter in model.named_parameters():
        wanted = gradients[name].float()
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )
    return total


def cut(row: Row, part: slice) -> Row:
    names = ("input_ids", "labels", *columns.LISTS)
    return {name: row[name][part] for name in names}


def pieces(row: Row, length: int) -> list[Row]:
    starts = range(0, len(row["input_ids"]), length)
    return [cut(row, slice(start, start + length)) for start in starts]


def filtered(rows: list[Row]) -> list[Row]:
    return [row for row in rows if any(label != -100 for label in row["labels"])]


SKIP = {"dataset_kwargs": {"skip_prepare_dataset": True}}
BATCHES: dict[str, tuple[dict[str, Any], Callable[[list[Row]], list[Row]]]] = {
    "padded": ({}, lambda rows: rows),
    "padded, as it is": (SKIP, lambda rows: rows),
    "padded to a multiple": ({"pad_to_multiple_of": 8}, lambda rows: rows),
    "cut": ({"max_length": 7}, lambda rows: [cut(row, slice(7)) for row in rows]),
    "cut at the start": (
        {"max_length": 7, "truncation_mode": "keep_end"},
        lambda rows: [cut(row, slice(max(0, len(row["input_ids"]) - 7), None)) for row in rows],
    ),
    "padding-free": ({"padding_free": True, "max_length": None}, lambda rows: rows),
    "bfd": (
        {"packing": True, "max_length": 9},
        lambda rows: [cut(row, slice(9)) for row in rows],
    ),
    "bfd, shuffled": ({"packing": True, "max_length": 30, "shuffle_dataset": True}, lambda r: r),
    "bfd_split": (
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 5},
        lambda rows: [piece for row in rows for piece in pieces(row, 5)],
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_stored_distributions_are_those_of_their_tokens(
    trainer: Make, tiny_model: Make, target: Any, case: str
) -> None:
    settings, documents = BATCHES[case]
    dataset = with_columns(completions(), target)
    made = trainer(dataset, objective=MIXED, **settings)
    check(made, documents(dataset.to_list()))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("objective", [MIXED, {"rkl": 1.0}, {"ce": 0.5, "tvd": 0.5}])
def test_other_terms_and_temperatures(
    trainer: Make, target: Any, objective: dict[str, float], temperature: float
) -> None:
    dataset = with_columns(completions(), target, temperature=temperature)
    made = trainer(dataset, objective=objective, temperature=temperature)
    check(made, dataset.to_list(), objective, temperature)


@pytest.mark.parametrize(
    "settings", [{}, {"packing": True, "max_length": 30, "per_device_train_batch_size": 3}]
)
def test_a_streamed_data_set(trainer: Make, target: Any, settings: dict[str, Any]) -> None:
    rows = entries(with_columns(completions(), target))
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    made = trainer(stream, objective=MIXED, **settings)
    first = next(iter(made.get_train_dataloader()))
    assert first["input_ids"].shape[0] == (1 if settings else 4)
    # All ten rows fit into the packs of the first batch.
    check(made, rows if settings else rows[:4], batches=[first])


# --- an online target


def notes(made: DraftDistillationTrainer) -> dict[str, float]:
    """Return the log's numbers over the whole train set, batch by batch in order."""
    made.model.train()
    for batch in made.get_train_dataloader():
        made.compute_loss(made.model, batch)
    logs = {"loss": 0.0}
    made.log(logs)
    return {name: value for name, value in logs.items() if name not in ("epoch", SEEN)}


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 30}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_online_is_what_storing_the_whole_vocabulary_is(
    trainer: Make, target: Any, dtype: str, settings: dict[str, Any]
) -> None:
    teacher = copy.deepcopy(target).to(getattr(torch, dtype))
    dataset = with_columns(completions(), teacher, k=V)
    settings = {"objective": {"ce": 0.2, "kl": 1.0, "tvd": 0.5}, **settings}
    stored = notes(trainer(dataset, **settings))
    plain = dataset.select_columns(["input_ids", "labels"])
    online = notes(trainer(plain, teacher_model=teacher, **settings))
    names = ["ce", "expected_acceptance", "kl", "loss", "mean_token_accuracy", "top1_agreement"]
    assert sorted(stored) == sorted(online) == sorted([*names, "tvd"])
    # bfloat16 rounds differently in every shape of batch.
    close = 2e-3 if dtype == "float32" else 2e-2
    for name, value in online.items():
        assert stored[name] == pytest.approx(value, rel=close, abs=close), name
    assert 0 < online["expected_acceptance"] < 1


# --- what is private in TRL, transformers


def test_the_private_hooks_are_called(
    trainer: Make, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = ["_prepare_dataset", "_set_signature_columns_if_needed"]
    hooks += ["_track_num_input_tokens", "_clip_grad_norm", "_get_grad_norm", "create_scheduler"]
    hooks += ["_get_train_sampler", "_get_num_items_in_batch"]
    spies = {}
    for name in hooks:
        real = getattr(DraftDistillationTrainer, name)
        spies[name] = mock.create_autospec(real, side_effect=real)
        monkeypatch.setattr(DraftDistillationTrainer, name, spies[name])
    made = trainer(
        with_columns(completions(), target),
        objective="kl",
        packing=True,
        max_length=12,
        max_train_tokens="40",
        per_device_train_batch_size=1,
    )
    assert type(made.data_collator) is DraftCollator
    assert made._created_lr_scheduler is False
    made.train()
    assert all(spy.called for spy in spies.values())
    assert spies["_get_grad_norm"].call_count == made.state.global_step
    assert spies["_track_num_input_tokens"].call_count == made.state.global_step
    assert made._created_lr_scheduler is True
    # A second training must have a schedule of its own: `Trainer` resets only what it knows.
    first = made.lr_scheduler
    made.train()
    assert made.lr_scheduler is not first


# --- refusals


@pytest.fixture
def no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be mapped or written before a refusal."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a dataset was mapped")

    for kind in (datasets.Dataset, datasets.IterableDataset):
        for name in ("map", "filter"):
            monkeypatch.setattr(kind, name, refuse)
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


def entries(dataset: datasets.Dataset) -> list[Row]:
    rows: list[Row] = dataset.to_list()
    return rows


# Changes of a row, and what is said of row 2, which has 5 tokens.
MISSHAPEN: dict[str, tuple[Callable[[Row], Any], str]] = {
    "one tail short": (
        lambda row: row[columns.TAIL].pop(),
        r"train dataset, row 2: target_tail_logprob has 4 entries for 5 input_ids",
    ),
    "one more id": (
        lambda row: row[columns.IDS][-1].append(7),
        r"row 2: .* have entries of different lengths",
    ),
    "another k": (
        lambda row: [row[name][-1].pop() for name in (columns.IDS, columns.LOG_PROBS)],
        r"row 2: target_top_k_ids has entries of \[4, 5\] ids",
    ),
    "nothing for a label": (
        lambda row: [row[name][-1].clear() for name in (columns.IDS, columns.LOG_PROBS)],
        r"row 2: token \d+ is labelled and has no stored distribution",
    ),
    "outside the vocabulary": (
        lambda row: row[columns.IDS][-1].__setitem__(1, V),
        r"row 2: target_top_k_ids holds 288, the vocabulary has 288 ids",
    ),
    "twice": (
        lambda row: row[columns.IDS][-1].__setitem__(1, row[columns.IDS][-1][0]),
        r"row 2: target_top_k_ids holds an id twice in one entry",
    ),
    "base two": (
        lambda row: row[columns.LOG_PROBS].__setitem__(
            -1, [x * 1.44 for x in row[columns.LOG_PROBS][-1]]
        ),
        r"row 2: exp of target_top_k_logprobs and target_tail_logprob sums to 0\.\d+, not",
    ),
    "NaN": (
        lambda row: row[columns.TAIL].__setitem__(-1, math.nan),
        r"row 2: exp of target_top_k_logprobs and target_tail_logprob sums to nan",
    ),
    "hotter": (
        lambda row: row.update({columns.TEMPERATURE: 2.0}),
        r"row 2: target_temperature is 2, temperature is 1; run stage",
    ),
    "labels": (
        lambda row: row["labels"].pop(),
        r"row 2: labels has 4 entries for 5 input_ids",
    ),
}


def altered(target: Any, change: Callable[[Row], Any]) -> datasets.Dataset:
    rows = entries(with_columns(completions(), target))
    change(rows[2])
    return datasets.Dataset.from_list(rows)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", MISSHAPEN)
def test_misshapen_columns_are_refused(trainer: Make, target: Any, case: str) -> None:
    change, message = MISSHAPEN[case]
    dataset = altered(target, change)
    with pytest.raises(ValueError, match=message):
        trainer(dataset, objective="kl")
    with pytest.raises(ValueError, match=message.replace("train data", "eval data")):
        trainer(with_columns(completions(), target), eval_dataset=dataset, objective="kl")


@pytest.mark.usefixtures("no_work")
class TestRefused:
    def test_an_objective_without_its_distribution(self, trainer: Make, target: Any) -> None:
        rows = datasets.Dataset.from_list(completions())
        message = r"objective 0.5 ce \+ 0.5 kl needs the target's distribution and the train data"
        with pytest.raises(ValueError, match=message):
            trainer(rows, objective="ce_kl")
        with pytest.raises(ValueError, match="distribution and the late dataset has no target_t"):
            trainer(
                with_columns(completions(), target),
                eval_dataset={"late": rows},
                objective="kl",
            )

    def test_two_sources(self, trainer: Make, target: Any) -> None:
        with pytest.raises(ValueError, match="both an online teacher and stored distributions"):
            trainer(with_columns(completions(), target), teacher_model=target, objective="kl")

    def test_another_temperature(self, trainer: Make, target: Any) -> None:
        dataset = with_columns(completions(), target, temperature=0.5)
        # A set that does not say it was made at 1.
        plain = dataset.remove_columns([columns.TEMPERATURE])
        with pytest.raises(ValueError, match=r"eval dataset, row 0: target_temperature is 1, t"):
            trainer(dataset, eval_dataset=plain, objective="kl", temperature=0.5)

    def test_heads_of_different_vocabularies(self, trainer: Make, tiny_model: Make) -> None:
        rows = datasets.Dataset.from_list(completions())
        with pytest.raises(ValueError, match="its head has 300 rows, the draft's 288: different"):
            trainer(rows, teacher_model=tiny_model(vocab_size=300), objective="kl")

    def test_no_rows(self, trainer: Make) -> None:
        rows, none = datasets.Dataset.from_list(completions()), datasets.Dataset.from_dict({})
        for empty in (none, datasets.IterableDataset.from_generator(lambda: iter(()))):
            with pytest.raises(FastDraftError, match=r"^train dataset: it has no rows"):
                trainer(empty)
        with pytest.raises(FastDraftError, match=r"^late dataset: it has no rows"):
            trainer(rows, eval_dataset={"late": none})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"max_steps": 3, "max_train_tokens": "1k"},
                "max_train_tokens: max_steps is another budget",
            ),
            ({"max_train_tokens": "1k", "warmup_steps": 5}, r"at least 0 and below 1, got 5"),
            ({"max_train_tokens": "lots"}, "max_train_tokens: .*write 5B, 200M or 50000"),
            ({"max_train_tokens": "1k", "save_steps": 0.5}, "save_steps: with max_train_tokens"),
            (
                {
                    "max_train_tokens": "1k",
                    "lr_scheduler_type": "reduce_lr_on_plateau",
                    "eval_strategy": "epoch",
                },
                "reduce_lr_on_plateau cannot follow a token budget",
            ),
            ({"objective": "klx"}, r"objective: there is no 'klx' \(did you mean 'kl'\?\); terms"),
        ],
    )
    def test_arguments(self, trainer: Make, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            trainer(datasets.Dataset.from_list(completions()), **settings)

    def test_a_custom_collator_beside_stored_columns(self, trainer: Make, target: Any) -> None:
        own = {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0)}
        with pytest.raises(ValueError, match="needs the trainer's own data_collator"):
            trainer(with_columns(completions(), target), objective="kl", given=own)

    @pytest.mark.parametrize(
        ("tied", "settings", "message"),
        [
            (False, {"target_modules": ["q_proj", "lm_head"]}, "target_modules: 'lm_head' is the"),
            (True, {"target_modules": r"model\..*"}, r"target_modules: .*\(tied to the embedding"),
            (True, {"target_modules": ["model.embed_tokens"]}, "target_modules: 'model.embed_tok"),
            (False, {"modules_to_save": ["lm_head"]}, "modules_to_save: 'lm_head' is the draft's"),
            (True, {"trainable_token_indices": [1, 2]}, "trainable_token_indices: 'model.embed"),
        ],
    )
    def test_adapters_on_the_head(
        self, trainer: Make, tiny_model: Make, tied: bool, settings: dict[str, Any], message: str
    ) -> None:
        rows = datasets.Dataset.from_list(completions())
        config = LoraConfig(r=2, **{"target_modules": ["q_proj"], **settings})
        model = tiny_model(tie_word_embeddings=tied)
        with pytest.raises(ValueError, match=rf"^peft_config\.{message}"):
            trainer(rows, model, given={"peft_config": config})


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "the cat and the hat " * 9, "completion": "then"}, {"max_length": 8}),
        ({"input_ids": [5, 6, 7], "labels": [-100] * 3}, {}),
        ({"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"packing": True, "max_length": 8}),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"max_length": 2}),
        ({"input_ids": [5], "labels": [5]}, SKIP),
    ],
)
def test_rows_without_a_label_left(trainer: Make, row: Row, settings: dict[str, Any]) -> None:
    bad = datasets.Dataset.from_list([row] * 8)
    message = "no row of the {} dataset has a label left; raise max_length"
    with pytest.raises(FastDraftError, match=message.format("train")):
        trainer(bad, **settings)
    good: Row = {"input_ids": [5, 6], "labels": [5, 6]}
    if "prompt" in row:
        good = {"prompt": "a", "completion": "b"}
    with pytest.raises(FastDraftError, match=message.format("eval")):
        trainer(datasets.Dataset.from_list([good] * 8), eval_dataset=bad, **settings)


# --- a loss that is not finite


class Spoil(TrainerCallback):
    """From a step on, makes the loss, or only a gradient, not finite."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what
        self.seen: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 != self.step:
            return
        model = kwargs["model"]
        norm = model.get_decoder().norm
        if self.what == "loss":
            norm.register_forward_hook(lambda module, given, output: output * math.nan)
        else:
            norm.weight.register_hook(lambda gradient: gradient * math.inf)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = {name: p.clone() for name, p in kwargs["model"].state_dict().items()}


NOT_PADDED = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd, cut": {"packing": True, "max_length": 8},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 6},
    "accumulated": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("case", NOT_PADDED)
def test_a_non_finite_number_stops_training(
    trainer: Make, target: Any, tmp_path: Path, case: str, what: str
) -> None:
    rows = with_columns(filtered(completions(20)), target)
    spoil = Spoil(3, what)
    batches: list[list[int]] = []

    class Watched(DraftDistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(inputs["input_ids"].flatten().tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    made = trainer(
        rows,
        objective="ce_kl",
        callbacks=[spoil],
        kind=Watched,
        save_strategy="steps",
        save_steps=1,
        max_steps=5,
        per_device_train_batch_size=2,
        logging_nan_inf_filter=False,
        **NOT_PADDED[case],
    )
    with pytest.raises(NonFiniteLossError) as caught:
        made.train()
    said = str(caught.value)
    kind = (
        r"the loss is not finite (ce nan, kl nan)" if what == "loss" else "the gradient is not fin"
    )
    assert said.startswith(f"step 3: {kind}")
    out = tmp_path / "out"
    assert f"the last good checkpoint is {out / 'checkpoint-2'}. Look at these rows" in said
    assert "lower the learning rate (learning_rate " in said
    # The first ids of every batch of the step are shown.
    of_step = (
        batches[-made.args.gradient_accumulation_steps :] if what == "gradient" else batches[-1:]
    )
    ids = "; ".join(", ".join(map(str, batch[:8])) for batch in of_step)
    assert f" on the rows that begin with the ids {ids}; " in said
    # Nothing of it reached the weights or the newest checkpoint.
    assert newest_complete(out) == out / "checkpoint-2"
    stored = load_file(out / "checkpoint-2" / "model.safetensors")
    for name, parameter in made.model.state_dict().items():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, spoil.seen[name])
        if name in stored:
            assert torch.equal(stored[name], parameter)


def test_a_non_finite_evaluation_is_reported(trainer: Make) -> None:
    rows = datasets.Dataset.from_list(completions())
    made = trainer(rows, eval_dataset=rows)
    made.train()
    with torch.no_grad():
        made.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"^evaluation after step 3: the loss is not fini"):
        made.evaluate()


# --- a budget of tokens


class Rates(TrainerCallback):
    """What was seen and what rate was used, step by step."""

    def __init__(self) -> None:
        self.before: list[int] = []
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(int(state.num_input_tokens_seen))
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def with_padding_ids(rows: list[Row]) -> list[Row]:
    """End every other row with the padding token, as where it is the end of text."""
    return [
        {"input_ids": [*row["input_ids"][:-1], 0], "labels": [*row["labels"][:-1], 0]}
        if number % 2
        else row
        for number, row in enumerate(filtered(rows))
    ]


COUNTED: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 16},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "accumulated": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", COUNTED)
def test_the_budget_ends_training_and_every_token_counts(trainer: Make, case: str) -> None:
    rows = datasets.Dataset.from_list(with_padding_ids(completions(30)))
    seen: list[int] = []

    class Watched(DraftDistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            seen.append(int(mask.sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    made = trainer(
        rows,
        kind=Watched,
        max_train_tokens="300",
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1000,
        save_strategy="steps",
        save_steps=1000,
        per_device_train_batch_size=2,
        **COUNTED[case],
    )
    made.train()
    accumulated = made.args.gradient_accumulation_steps
    assert made.state.num_input_tokens_seen == sum(seen)
    assert sum(seen) >= 300 > sum(seen[:-accumulated])
    epochs = made.state.epoch
    assert epochs is not None
    if epochs > 1:  # whole passes are known beforehand
        whole = sum(map(len, made.train_dataset["input_ids"]))
        passes = len(made.get_train_dataloader())
        assert sum(seen[:passes]) == whole
    # As at any end of training, the last step is evaluated and kept.
    last = made.state.global_step
    assert newest_complete(Path(made.args.output_dir)) == Path(
        made.args.output_dir, f"checkpoint-{last}"
    )
    assert [e["step"] for e in made.state.log_history if "eval_loss" in e] == [last]


@pytest.mark.parametrize(
    ("schedule", "warmup", "kwargs"),
    [
        ("cosine", 0.2, {}),
        ("linear", 0.0, {}),
        ("warmup_stable_decay", 0.1, {"min_lr_ratio": 0.1}),
        ("constant_with_warmup", 0.3, {}),
    ],
)
@pytest.mark.parametrize("muon", [False, True])
def test_the_rate_follows_the_tokens(
    trainer: Make, schedule: str, warmup: float, kwargs: dict[str, Any], muon: bool
) -> None:
    rates, budget = Rates(), 400
    made = trainer(
        datasets.Dataset.from_list(completions(30)),
        callbacks=[rates],
        max_train_tokens=str(budget),
        learning_rate=0.5e-3,
        muon_learning_rate=0.5e-3,
        use_muon=muon,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs={**kwargs, **({"num_decay_steps": 0.3} if "decay" in schedule else {})},
        warmup_steps=warmup,
        per_device_train_batch_size=2,
    )
    made.train()
    if schedule == "warmup_stable_decay":
        kwargs = {**kwargs, "num_decay_steps": round(0.3 * budget)}
    # transformers' own schedule, of one step a token.
    theirs = get_scheduler(
        schedule,
        torch.optim.SGD([torch.zeros(1)], lr=0.5e-3),
        num_warmup_steps=round(warmup * budget),
        num_training_steps=budget,
        scheduler_specific_kwargs=kwargs,
    )
    expected = [0.5e-3 * theirs.lr_lambdas[0](tokens) for tokens in rates.before]
    assert rates.rates == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert len(set(rates.rates)) > 3
    assert made.state.num_input_tokens_seen >= budget


# --- logs


@pytest.mark.parametrize("source", ["stored", "online", "none"])
def test_what_is_logged(trainer: Make, target: Any, source: str) -> None:
    stored = with_columns(completions(), target)
    dataset = stored if source == "stored" else stored.select_columns(["input_ids", "labels"])
    objective = {"ce": 0.5} if source == "none" else {"ce": 0.5, "kl": 0.25, "lk_hybrid": 2.0}
    made = trainer(
        dataset,
        eval_dataset={"a": dataset, "b": dataset} if source == "online" else dataset,
        teacher_model=target if source == "online" else None,
        objective=objective,
        max_train_tokens="150",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
    )
    made.train()
    names = {*objective, "mean_token_accuracy"}
    if source != "none":
        names |= {"expected_acceptance", "top1_agreement"}
    logs = made.state.log_history
    steps = [entry for entry in logs if "loss" in entry]
    assert len(steps) == made.state.global_step > 2
    for number, entry in enumerate(steps):
        assert names <= set(entry)
        assert ("tokens_per_second" in entry) == (number > 0)
        total = sum(weight * entry[name] for name, weight in objective.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-6)
        assert "num_tokens" not in entry
    *evaluations, summary = (entry for entry in logs if "loss" not in entry)
    assert len(evaluations) >= 2
    for entry in evaluations:
        assert {f"eval_{name}" for name in names} <= set(entry)
        assert "eval_tokens_per_second" not in entry
        (loss,) = (value for name, value in entry.items() if name.endswith("_loss"))
        total = sum(weight * entry[f"eval_{name}"] for name, weight in objective.items())
        assert loss == pytest.approx(total, rel=1e-6)
    assert "train_runtime" in summary
    assert "train_samples_per_second" not in summary
