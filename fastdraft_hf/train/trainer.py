"""`DraftDistillationTrainer`: TRL's `SFTTrainer` with the draft's objective done in one pass.

A draft is mostly vocabulary: the head is nine tenths of its training time. This trainer keeps
everything of `SFTTrainer` (data preparation, packing, PEFT, checkpoints, reporting, scale-out) and
replaces the loss: the model runs up to its last hidden states, and `fused_head_loss` takes values
and gradients of every term from there, on the labelled tokens only.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastdraft_hf._head import head_of, last_hidden_states
from fastdraft_hf.data import columns
from fastdraft_hf.train import checks, publish
from fastdraft_hf.train.arguments import DraftDistillationConfig, has_fast_bf16
from fastdraft_hf.train.budget import TokenBudget, token_schedule
from fastdraft_hf.train.checkpoints import MarkCompleteCheckpoints
from fastdraft_hf.train.collator import DraftCollator
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.failures import NonFiniteLossError
from fastdraft_hf.train.head import HeadLoss, fused_head_loss
from fastdraft_hf.train.modules import check_whole, keep_head_whole
from fastdraft_hf.train.objectives import Objective
from fastdraft_hf.train.optimizer import MuonWithAdamW
from fastdraft_hf.train.progress import TrainingProgress
from fastdraft_hf.train.sampled import sample_head


class DraftDistillationTrainer(SFTTrainer):
    """Trains a draft: pre-training, continued pre-training and alignment alike.

    The dataset holds ``input_ids`` and ``labels`` of equal length (``labels`` are -100 where no
    loss is taken), or anything else that `SFTTrainer` prepares into these. An objective with a
    term besides ``ce`` needs the target's distribution: from an online target, or stored in the
    columns that `fastdraft_hf.data.columns` describes.

    Logged with the loss: every term under its name, ``mean_token_accuracy``,
    ``tokens_per_second``, and where a distribution is known ``expected_acceptance`` (α, an upper
    bound when stored as top-k) and ``top1_agreement``, all means over labelled tokens.

    Args:
        model: the draft, or its name or folder.
        args: a `DraftDistillationConfig`.
        target_model: the online target, or its name or folder; by default the one of
            ``args.teacher_model_name_or_path``, if any.
        **kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: before any work, saying what to change: ``args`` of another kind, columns that
            are missing or misshapen, ids outside the vocabulary, an objective without the
            distribution it needs, two sources of it, another vocabulary, an adapter on the head,
            a budget below one batch, a stream without rows, DeepSpeed ZeRO-3 or the first FSDP.
        NonFiniteLossError: while training, naming the step, the rows and the last good checkpoint.

    Example:
        ```python
        from datasets import load_from_disk
        from fastdraft_hf import DraftDistillationConfig, DraftDistillationTrainer

        trainer = DraftDistillationTrainer(
            model="runs/draft/pretrain",
            args=DraftDistillationConfig(
                output_dir="runs/aligned", objective={"ce": 0.5, "kl": 0.5}, max_train_tokens="20M"
            ),
            train_dataset=load_from_disk("answers"),
            target_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        )
        trainer.train()
        ```
    """

    data_collator: Any
    lr_scheduler: Any
    train_dataset: Any
    _signature_columns: Any
    _tag_names = ["trl", "fastdraft", "speculative-decoding"]
    _name = "FastDraft"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DraftDistillationConfig,
        *,
        target_model: str | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DraftDistillationConfig):
            raise ValueError(f"args must be a DraftDistillationConfig, got {type(args).__name__}")
        if args.loss_type != "nll" or args.label_smoothing_factor:
            raise ValueError("loss_type must be 'nll' and label_smoothing_factor 0")
        checks.check_sharding(args)
        checks.check_stream(kwargs.get("train_dataset"))
        self.objective = Objective("ce" if args.objective is None else args.objective)
        if isinstance(model, str):  # loaded here, so that it can be looked at before any work
            given = dict(args.model_init_kwargs or {})
            given.setdefault("trust_remote_code", args.trust_remote_code)
            given.setdefault("dtype", torch.float32)
            model = AutoModelForCausalLM.from_pretrained(model, **given)
            args.model_init_kwargs = None
        checks.check_adapter(model, kwargs.get("peft_config"))
        vocab_size = int(head_of(model).weight.shape[0])
        target_model = target_model or args.teacher_model_name_or_path
        stored = checks.check_sources(
            self.objective,
            target_model,
            checks.named_sets(kwargs.get("train_dataset"), kwargs.get("eval_dataset")),
            vocab_size=vocab_size,
            temperature=args.temperature,
        )
        if stored and kwargs.get("data_collator") is not None:
            raise ValueError("a stored distribution needs the trainer's own data_collator")
        if args.token_budget is not None:
            args.max_steps = checks.most_steps(args, kwargs.get("train_dataset"))
        self.target_model: PreTrainedModel | None = None
        if target_model is not None:
            self.target_model = checks.open_target(
                target_model,
                args,
                kwargs.get("processing_class"),
                vocab_size,
                model.config.name_or_path,
            )
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(self.train_dataset, IterableDataset):
            # `Trainer` takes `max_steps` for the length of a pass, whatever the stream's is: after
            # a second pass it would resume at a wrong place. Endless, a stream has one pass.
            self.train_dataset = self.train_dataset.repeat(None)
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = DraftCollator(
                **vars(self.data_collator),
                stored=stored,
                vocab_size=vocab_size,
                keep_end=args.truncation_mode == "keep_end",
            )
        wanted = args.head_dtype
        if wanted == "auto":
            wanted = "bfloat16" if has_fast_bf16(self.accelerator.device) else "float32"
        self.head_dtype: torch.dtype = getattr(torch, wanted)
        self.optimizer: torch.optim.Optimizer | None
        self._log_time, self._log_tokens = time.monotonic(), 0
        rows = kwargs["train_dataset"]
        # As they were given, so that a message's numbers are those of the caller's rows.
        self._given_rows = rows if "input_ids" in columns.column_names(rows) else self.train_dataset
        self._step_inputs: list[dict[str, Any]] = []
        self._add_own_callbacks()

    def _add_own_callbacks(self) -> None:
        """Our progress instead of `Trainer`'s, the budget's end, marks on whole checkpoints."""
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        given = {type(callback) for callback in self.callback_handler.callbacks}
        if MarkCompleteCheckpoints not in given:
            self.add_callback(MarkCompleteCheckpoints())
        if self.args.token_budget is not None:
            self.add_callback(TokenBudget(self.args.token_budget))
        if TrainingProgress not in given and not self.args.disable_tqdm:
            self.add_callback(TrainingProgress("training", self.args.token_budget))

    # ------------------------------------------------------------------------------------ data

    # Private in `SFTTrainer`; `test_trainer_data.py` fails when it moves. Its own version drops
    # every column but ids and labels when it packs.
    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        if not (packing and args.max_length and columns.has_distribution(dataset, dataset_name)):
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False  # packing cuts, after shuffling
        dataset = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting_func, dataset_name
        )
        dataset = dataset.select_columns(["input_ids", "labels", *columns.LISTS])
        if args.packing_strategy == "wrapped":
            # One row runs on into the next, and a row's first token stores no distribution.
            dataset = dataset.map(
                lambda labels: {"labels": [-100, *labels[1:]] if labels else []},
                input_columns=["labels"],
            )
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    # Private in `Trainer`; `test_trainer_data.py` fails when it moves.
    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *columns.LISTS]))

    # Private in `Trainer`; `test_trainer_data.py` fails when it moves. Without a mask (padding-free
    # batches) its own version takes ids equal to the padding token for padding; where that is the
    # end-of-text token the count would be short.
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen == "non_padding" and (
            "attention_mask" not in inputs
        ):
            count = torch.tensor(inputs["input_ids"].numel(), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(count).sum())
            return
        super()._track_num_input_tokens(inputs)

    # ------------------------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean objective of the labelled tokens.

        With ``num_items_in_batch`` (labelled tokens of the whole step, over accumulation and
        processes) the sum is divided by it, as `Trainer` expects.
        """
        stored = {name: inputs[name] for name in columns.LISTS if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in stored}
        if return_outputs:  # somebody wants logits: an ordinary forward pass makes them
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
            loss = self.compute_loss(model, {**inputs, **stored}, False, num_items_in_batch)
            return loss, outputs
        labels = inputs.pop("labels")[:, 1:]
        labelled = labels != -100
        unwrapped = self.accelerator.unwrap_model(model)
        keep_head_whole(unwrapped)
        hidden = last_hidden_states(model, unwrapped, inputs)[:, :-1][labelled]
        head = head_of(unwrapped)
        weight, bias = check_whole(head.weight), head.bias
        wanted, target = labels[labelled], self._distribution(inputs, stored, labelled)
        if (
            model.training
            and self.args.sampled_softmax
            and head.softcap is None  # what a drawn id stands for belongs behind the cap
            and not isinstance(target, TargetHead)
        ):
            _, weight, bias, wanted, target = sample_head(
                weight, wanted, self.args.sampled_softmax, bias, target=target, scale=head.scale
            )
        result = fused_head_loss(
            hidden,
            weight,
            wanted,
            bias,
            objective=self.objective,
            target=target,
            temperature=self.args.temperature,
            scale=head.scale,
            softcap=head.softcap,
            dtype=self.head_dtype,
        )
        self._take_notes(model, inputs, result, int(hidden.shape[0]))
        if num_items_in_batch is None:
            return result.loss / max(1, hidden.shape[0])
        loss = result.loss / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:
            # The count is of all processes, and DDP averages the gradients over them.
            loss = loss * self.accelerator.num_processes
        return loss

    def _distribution(
        self, inputs: dict[str, Any], stored: dict[str, Any], labelled: torch.Tensor
    ) -> TopK | TargetHead | None:
        """Return the target's distribution for every labelled token."""
        if stored:
            ids, log_probs, tail = (stored[name][:, 1:][labelled] for name in columns.LISTS)
            return TopK(ids, log_probs, tail)
        if self.target_model is None:
            return None
        with torch.no_grad():
            hidden = last_hidden_states(self.target_model, self.target_model, inputs)
        return TargetHead(hidden[:, :-1][labelled], head_of(self.target_model))

    def _take_notes(
        self, model: torch.nn.Module, inputs: dict[str, Any], result: HeadLoss, tokens: int
    ) -> None:
        """Add the batch to the log, over all processes, and stop at a loss that is no number."""
        notes = {**result.terms, "mean_token_accuracy": result.correct}
        if result.acceptance is not None and result.agreement is not None:
            notes |= {"expected_acceptance": result.acceptance, "top1_agreement": result.agreement}
        vector = torch.stack([*notes.values(), result.correct.new_tensor(tokens)])
        sums = self.accelerator.gather(vector[None]).sum(0).tolist()
        count = max(1.0, sums.pop())
        means = [value / count for value in sums]
        if not all(map(torch.isfinite, torch.tensor(means))):
            values = ", ".join(
                f"{name} {mean:g}" for name, mean in zip(result.terms, means, strict=False)
            )
            what = f"the loss is no number ({values})"
            raise self._failure(what, [inputs], model.training)
        mode = "train" if model.training else "eval"
        for name, mean in zip(notes, means, strict=True):
            self._metrics[mode][name].append(mean)
        if model.training:
            self._step_inputs.append(inputs)

    # Private in `Trainer`; `test_trainer_data.py` fails when it moves. It is called between
    # clipping and the optimizer's step: a gradient that is no number must not reach the weights,
    # since the next checkpoint would hold them.
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)).all():
            what = f"the gradient is no number (norm {float(norm):g})"
            raise self._failure(what, self._step_inputs)
        self._step_inputs.clear()
        return norm

    def _failure(
        self, what: str, batches: list[dict[str, Any]], training: bool = True
    ) -> NonFiniteLossError:
        rows = self._given_rows if training else None
        return NonFiniteLossError.of(what, self.args, self.state.global_step, rows, batches)

    # ------------------------------------------------------------------------------- optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `Trainer`, with an optimizer and a learning rate of their own for the matrices."""
        given: torch.optim.Optimizer | None = self.optimizer
        if given is not None:
            return given
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        in_tables = {id(p) for module in tables for p in module.parameters()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = {id(p) for p in trained if p.ndim == 2} - in_tables
        rate = self.args.matrix_learning_rate or self.args.learning_rate
        if self.args.matrix_optimizer == "muon":
            if not matrices:
                raise ValueError("matrix_optimizer='muon': the model has no trainable matrices")
            self.optimizer = muon = MuonWithAdamW(
                [p for p in trained if id(p) in matrices],
                [p for p in trained if id(p) not in matrices],
                matrix_lr=rate,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            return muon
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        for group in list(optimizer.param_groups):
            chosen = [p for p in group["params"] if id(p) in matrices]
            if chosen:
                group["params"] = [p for p in group["params"] if id(p) not in matrices]
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As `Trainer`, but by tokens when there is a budget of them."""
        budget = self.args.token_budget
        if budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = token_schedule(
                self.args,
                optimizer or self.create_optimizer(),
                lambda: self.state.num_input_tokens_seen / budget,
            )
            # Private in `Trainer`, which saves only a scheduler it knows to be its own.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the rate and, instead of TRL's count of this run, the tokens seen over all runs."""
        if self.model.training and "loss" in logs:
            now, seen = time.monotonic(), self.state.num_input_tokens_seen
            if self._log_tokens:
                logs["tokens_per_second"] = round(
                    (seen - self._log_tokens) / max(now - self._log_time, 1e-9), 1
                )
            self._log_time, self._log_tokens = now, seen
            self._metrics["train"].pop("num_tokens", None)
        if self.args.token_budget is not None:
            logs.pop("train_samples_per_second", None)  # counted from the most steps there could be
        super().log(logs, start_time)

    # --------------------------------------------------------------------------------- the Hub

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        target: str | None = None,
    ) -> None:
        """Write ``README.md`` by the package's own template; ``target`` is the target's id."""
        if not self.is_world_process_zero():
            return
        card = publish.trainer_card(
            self,
            model_name=model_name,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            target=target,
        )
        card.save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer`, but of the output folder only the draft: no pickles, no logs.

        Returns when the commit is made, whatever ``blocking`` says. ``private`` holds for a
        repository that is made now; ``kwargs`` are those of `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:  # called with push_to_hub=False
            if private is not None:
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = str(self.hub_model_id or self.args.output_dir)
        self.create_model_card(**{"model_name": Path(name).name, **kwargs})
        revision = revision or self.args.hub_revision
        return publish.push_folder(self, commit_message or "End of training", token, revision)


__all__ = [
    "DraftDistillationConfig",
    "DraftDistillationTrainer",
    "NonFiniteLossError",
    "has_fast_bf16",
]
