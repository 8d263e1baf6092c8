"""`DraftDistillationTrainer`: TRL's `SFTTrainer` with the draft's objective computed in one pass.

Most of a draft is vocabulary: the head is nine tenths of its training time. This trainer keeps
everything of `SFTTrainer` (data preparation, packing, PEFT, checkpoints, reporting, scale-out) and
replaces the loss: the model runs up to its last hidden states, and `fused_head_loss` computes
values and gradients of every term from there, on the labelled tokens only.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate import DistributedType
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf._head import head_of, last_hidden_states
from fastdraft_hf.data import columns
from fastdraft_hf.train import checks
from fastdraft_hf.train.callbacks import (
    AlreadyTrainedError,
    MarkCompleteCheckpoints,
    SaveStreamState,
    TimeBudget,
    TokenBudget,
    TrainingProgress,
    newest_complete,
    open_checkpoint,
)
from fastdraft_hf.train.config import DraftDistillationConfig, has_fast_bf16, schedule_shape
from fastdraft_hf.train.distribution import TargetHead, TopK
from fastdraft_hf.train.head import HeadLoss, fused_head_loss
from fastdraft_hf.train.objectives import Objective
from fastdraft_hf.train.optimizer import MuonWithAdamW, clip_gradients
from fastdraft_hf.train.parallel import choose_mask, with_masks
from fastdraft_hf.train.rows import DraftCollator, SameLengthSampler
from fastdraft_hf.train.sampled import sample_head

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import (
        DataCollator,
        EvalPrediction,
        PreTrainedTokenizerBase,
        TrainerCallback,
    )

logger = logging.getLogger(__name__)


class DraftDistillationTrainer(SFTTrainer):
    """Trains a draft: pre-training, continued pre-training and alignment.

    The dataset holds ``input_ids`` and ``labels`` (-100 where no loss is taken), or anything else
    that `SFTTrainer` prepares into these. An objective with a term besides ``ce`` needs the
    target's distribution: from an online teacher, or stored in the columns that
    `fastdraft_hf.data.columns` describes. Rows are cut to ``max_length``, all columns alike.

    Logged with the loss, all of them means over the labelled tokens since the last log: every term
    under its name, ``mean_token_accuracy``, and where a distribution is known
    ``expected_acceptance`` (α, an upper bound when stored as top-k) and ``top1_agreement``. Also
    ``tokens_per_second``.

    One process uses one device; `accelerate launch` starts several, with the same results for the
    same batch over all of them.

    Args:
        model: the draft, or its name or folder.
        args: the config, which is copied; by default one with the draft's name in ``output_dir``.
        teacher_model: the online teacher (the target), or its name or folder; by default
            ``args.teacher_model_name_or_path``.
        train_dataset: rows to train on.
        eval_dataset: held-out rows, or several sets by name.
        processing_class: the tokenizer; by default ``model.tokenizer`` (`build_draft` sets it), or
            the one in the draft's folder.

    The other parameters are those of `SFTTrainer`.

    Raises:
        FastDraftError: before any work, saying what to change; docs/trainer.md lists the messages.
        NonFiniteLossError: while training, naming the step, the rows and the last good checkpoint.

    Example:
        ```python
        from datasets import load_from_disk
        from fastdraft_hf import DraftDistillationConfig, DraftDistillationTrainer

        trainer = DraftDistillationTrainer(
            model="runs/draft/pretrain",
            args=DraftDistillationConfig("runs/aligned", max_train_tokens="20M"),
            teacher_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            train_dataset=load_from_disk("answers"),
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
        args: DraftDistillationConfig | None = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
        if args is None:
            args = DraftDistillationConfig(f"{Path(name).name or 'draft'}-FastDraft")
        if not isinstance(args, DraftDistillationConfig):
            raise FastDraftError(
                f"args must be a DraftDistillationConfig, got {type(args).__name__}"
            )
        if train_dataset is None:
            raise FastDraftError("train_dataset is missing; give the rows to train on")
        args = copy.copy(args)
        if args.loss_type != "nll" or args.label_smoothing_factor:
            raise FastDraftError("loss_type must be 'nll' and label_smoothing_factor 0")
        checks.check_sharding(args)
        if args.n_gpu > 1:  # under `DataParallel` the loss cannot read the hidden states
            logger.warning(
                "%d GPUs are visible and this process trains on one; to use all of them, start "
                "with `accelerate launch`",
                args.n_gpu,
            )
            args._n_gpu = 1
        sets = checks.named_sets(train_dataset, eval_dataset)
        checks.check_rows(sets)
        stores = {name: columns.has_distribution(rows, name) for name, rows in sets.items()}
        stored = any(stores.values())
        teacher_model = teacher_model or args.teacher_model_name_or_path
        if args.objective == "auto":
            args.objective = "nla" if stored or teacher_model is not None else "ce"
        self.objective = Objective(args.objective)
        checks.check_sources(self.objective, teacher_model is not None, stores)
        if isinstance(model, str):  # loaded here, so that it can be checked before any work
            given = dict(args.model_init_kwargs or {})
            given.setdefault("trust_remote_code", args.trust_remote_code)
            given.setdefault("dtype", torch.float32)
            model = AutoModelForCausalLM.from_pretrained(model, **given)
            args.model_init_kwargs = None
        checks.check_adapter(model, peft_config)
        vocab_size = int(head_of(model).weight.shape[0])
        for set_name in (set_name for set_name, has in stores.items() if has):
            columns.check_distribution(
                sets[set_name], vocab_size=vocab_size, temperature=args.temperature, name=set_name
            )
        if stored and data_collator is not None:
            raise FastDraftError("a stored distribution needs the trainer's own data_collator")
        if args.max_train_tokens is not None:
            # `Trainer` needs a number: more than the budget has tokens.
            args.max_steps = int(args.max_train_tokens) + 1
        if processing_class is None:
            processing_class = getattr(model, "tokenizer", None)
        if processing_class is None and not name:
            raise FastDraftError("processing_class is missing; give the draft's tokenizer")
        processing_class = processing_class or AutoTokenizer.from_pretrained(
            name, trust_remote_code=args.trust_remote_code
        )
        self.teacher_model: PreTrainedModel | None = None
        if teacher_model is not None:
            self.teacher_model = checks.open_teacher(
                teacher_model, args, processing_class, vocab_size
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        checks.check_labels(checks.named_sets(self.train_dataset, self.eval_dataset), args)
        if isinstance(self.train_dataset, IterableDataset):
            # `Trainer` takes `max_steps` for the length of a pass, whatever the stream's is: after
            # a second pass it would resume at a wrong position. Endless, a stream has one pass.
            self.train_dataset = self.train_dataset.repeat(None)
        if type(self.data_collator) is DataCollatorForLanguageModeling:
            self.data_collator = DraftCollator(
                **vars(self.data_collator),
                vocab_size=vocab_size,
                max_length=args.max_length,
                keep_end=args.truncation_mode == "keep_end",
            )
        if args.num_parallel_tokens > 1:
            self.mask_token = choose_mask(args, self.model, processing_class)
        wanted = args.head_dtype
        if wanted == "auto":
            wanted = "bfloat16" if has_fast_bf16(self.accelerator.device) else "float32"
        self.head_dtype: torch.dtype = getattr(torch, wanted)
        self.optimizer: torch.optim.Optimizer | None
        self._log_time, self._log_tokens = time.monotonic(), 0
        self._step_inputs: list[dict[str, Any]] = []
        self._repeated: dict[str, Any] | None = None
        self._window: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._initial: dict[str, torch.Tensor] = {}
        self._tables_are_sparse = False
        if head_of(self.model).softcap is not None:
            # The correction for drawn ids belongs behind the cap.
            self.args.sampled_softmax = None
        if args.start_weight:
            weights = self.model.named_parameters()
            self._initial = {name: weight.detach().cpu().clone() for name, weight in weights}
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        present = {type(callback) for callback in self.callback_handler.callbacks}
        if args.max_minutes is not None:
            self.add_callback(TimeBudget())  # before the others, which read the budget
        for own in (MarkCompleteCheckpoints, TokenBudget):
            self.add_callback(own())
        if TrainingProgress not in present and not args.disable_tqdm:
            self.add_callback(TrainingProgress())

    # --- training

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as `Trainer.train` does.

        ``resume_from_checkpoint=True`` resumes from the last complete checkpoint in
        ``output_dir``, and starts from the beginning if there is none.

        Raises:
            FastDraftError: the folder in ``resume_from_checkpoint`` is not a checkpoint of this
                trainer, or a file in it is damaged.
        """
        output_dir = Path(str(self.args.output_dir))
        checkpoint = open_checkpoint(resume_from_checkpoint, output_dir)
        if checkpoint is not None:
            logger.info("resumed from %s", checkpoint)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, SaveStreamState):
                    callback.resume(self, checkpoint)
        # `Trainer` replaces special tokens by those of the tokenizer, which may have no BOS. A
        # draft's are its target's, and OpenVINO GenAI refuses a pair whose tokens differ.
        configs = (self.model.config, self.model.generation_config)
        names = ("bos_token_id", "eos_token_id")
        special = [(c, name, getattr(c, name, None)) for c in configs for name in names]
        try:
            output = super().train(checkpoint and str(checkpoint), *args, **kwargs)
        except AlreadyTrainedError:
            output = TrainOutput(self.state.global_step, 0.0, {})
        if self._tables_are_sparse:  # of no use to what reads the model next
            self.model.get_input_embeddings().sparse = False
        for config, name, token in special:
            setattr(config, name, token)
        # WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903).
        with torch.no_grad():
            for name, weight in self.accelerator.unwrap_model(self.model).named_parameters():
                if name in self._initial:
                    weight.lerp_(self._initial[name].to(weight.device), self.args.start_weight)
        return output

    # --- data

    # Private in `SFTTrainer`, whose version cuts ids and labels only, and drops every other column
    # when it packs. `test_trainer_data.py` fails when one of the private hooks here moves.
    def _prepare_dataset(
        self, dataset: Any, tokenizer: Any, args: Any, packing: bool, formatting: Any, name: str
    ) -> Any:
        present = columns.column_names(dataset)
        if not packing and {"input_ids", "labels"} <= set(present):  # the collator cuts
            return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        if not (packing and columns.has_distribution(dataset, name)):
            return super()._prepare_dataset(dataset, tokenizer, args, packing, formatting, name)
        uncut = copy.copy(args)
        uncut.max_length = None  # packing cuts
        dataset = super()._prepare_dataset(dataset, tokenizer, uncut, False, formatting, name)
        dataset = dataset.select_columns(["input_ids", "labels", *columns.LISTS])
        return pack_dataset(dataset, args.max_length, args.packing_strategy)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *columns.LISTS]))

    # Private in `Trainer`, which groups by the batch of one process.
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return SameLengthSampler(sampler, self.args.world_size, self.args.seed)
        return sampler

    # Private in `Trainer`, which counts a step's labels here before training on them.
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if batch_samples and isinstance(self.train_dataset, Dataset):
            # accelerate's own count is wrong in a loader that skips batches after a resume.
            step = self.args.train_batch_size * self.accelerator.num_processes
            last = 0 if self.args.dataloader_drop_last else len(self.train_dataset) % step
            batch_samples[-1] = self._without_repeats(batch_samples[-1], last)
        return super()._get_num_items_in_batch(batch_samples, device)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
        inputs = self._without_repeats(inputs, self.accelerator.gradient_state.remainder)
        return super().prediction_step(model, inputs, *args, **kw)

    def _without_repeats(self, inputs: dict[str, Any], remainder: int) -> dict[str, Any]:
        """Drop the rows that accelerate repeats to give every process a full last batch.

        ``remainder`` is the number of rows in the last batch over all processes, 0 if it is full.
        """
        state, rows = self.accelerator.gradient_state, len(inputs["input_ids"])
        if (
            self.accelerator.num_processes == 1
            or self.data_collator.__dict__.get("padding_free")  # rows are one flattened row
            or not state.end_of_dataloader
            or remainder <= 0
        ):
            return inputs
        own = min(rows, remainder - self.accelerator.process_index * rows)
        if own == rows:
            return inputs
        inputs = {name: value[: max(1, own)] for name, value in inputs.items()}
        if own <= 0:  # a forward pass needs a row; its loss is left out
            inputs["labels"] = torch.full_like(inputs["labels"], -100)
            self._repeated = inputs
        return inputs

    # Private in `Trainer`. In padding-free batches, which have no mask, its version takes ids equal
    # to the padding token for padding, and these may be end-of-text tokens.
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.args.include_num_input_tokens_seen != "non_padding":
            super()._track_num_input_tokens(inputs)
            return
        mask = inputs.get("attention_mask")
        count = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        if inputs is self._repeated:
            count = 0
        everywhere = self.accelerator.gather(torch.tensor(count, device=self.args.device))
        self.state.num_input_tokens_seen += int(everywhere.sum())

    # --- loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the objective's sum over labelled tokens, divided by ``num_items_in_batch``.

        `Trainer` gives the labelled tokens of a step, over accumulation and processes; by default
        it is the batch's own.
        """
        stored = {name: inputs[name] for name in columns.LISTS if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in stored}
        if return_outputs:  # the caller needs logits: an ordinary forward pass makes them
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
            loss = self.compute_loss(model, {**inputs, **stored}, False, num_items_in_batch)
            return loss, outputs
        labels = inputs.pop("labels")
        # Row and place of every token that carries loss, and the place of what predicts it.
        rows, tokens = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        places, tokens = tokens, tokens + 1
        read, text = inputs, len(rows)
        if model.training and self.args.num_parallel_tokens > 1:
            read, *more = with_masks(
                inputs["input_ids"],
                inputs.get("attention_mask"),
                labels,
                mask_token=self.mask_token,
                num_tokens=self.args.num_parallel_tokens,
                generator=torch.Generator().manual_seed(self._batch_seed("masks")),
            )
            rows, places, tokens = (
                torch.cat(pair) for pair in zip((rows, places, tokens), more, strict=True)
            )
        unwrapped = self.accelerator.unwrap_model(model)
        alone = self.accelerator.distributed_type == DistributedType.NO
        with self.accelerator.autocast():  # without a wrapper the decoder alone is called
            hidden = last_hidden_states(unwrapped, read, None if alone else model)[rows, places]
        head = head_of(unwrapped)
        weight, bias = head.weight, head.bias
        wanted, target = labels[rows, tokens], self._distribution(inputs, stored, rows, tokens)
        if model.training and self.args.sampled_softmax and not isinstance(target, TargetHead):
            _, weight, bias, wanted, target = sample_head(
                weight,
                wanted,
                self.args.sampled_softmax,
                bias,
                target=target,
                scale=head.scale,
                generator=torch.Generator().manual_seed(self._batch_seed()),
                shared=self.accelerator.num_processes > 1,
                sparse=self._tables_are_sparse,
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
        # The masks share the weight of the tokens that are counted.
        share = text / max(1, hidden.shape[0])
        loss = result.loss * share / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.args.average_tokens_across_devices:
            # The count is of all processes, and DDP averages the gradients over them.
            loss = loss * self.accelerator.num_processes
        return loss

    def _batch_seed(self, what: str = "") -> int:
        """Return a seed for the next batch: the same in all processes and in resumed runs."""
        batch = (self.state.global_step << 16) + len(self._step_inputs)
        return random.Random(f"{self.args.seed} {batch}{what}").getrandbits(63)

    def _distribution(
        self,
        inputs: dict[str, Any],
        stored: dict[str, Any],
        rows: torch.Tensor,
        tokens: torch.Tensor,
    ) -> TopK | TargetHead | None:
        """Return the teacher's distribution for the tokens at the places ``tokens`` of ``rows``."""
        if stored:
            ids, log_probs, tail = (stored[name][rows, tokens] for name in columns.LISTS)
            return TopK(ids, log_probs, tail)
        if self.teacher_model is None:
            return None
        with torch.no_grad():
            hidden = last_hidden_states(self.teacher_model, inputs)
        return TargetHead(hidden[rows, tokens - 1], head_of(self.teacher_model))

    def _take_notes(
        self, model: torch.nn.Module, inputs: dict[str, Any], result: HeadLoss, tokens: int
    ) -> None:
        """Add the batch's sums over all processes to the log; stop at a non-finite loss."""
        notes = {**result.terms, "mean_token_accuracy": result.correct}
        if result.acceptance is not None and result.agreement is not None:
            notes |= {"expected_acceptance": result.acceptance, "top1_agreement": result.agreement}
        vector = torch.stack([*notes.values(), result.correct.new_tensor(tokens)])
        sums = self.accelerator.gather(vector[None]).sum(0).tolist()
        if not np.isfinite(sums).all():
            values = ", ".join(
                f"{name} {value / max(1.0, sums[-1]):g}"
                for name, value in zip(result.terms, sums, strict=False)
            )
            self._fail(f"the loss is not finite ({values})", [inputs], model.training)
        window = self._window["train" if model.training else "eval"]
        for name, value in zip([*notes, ""], sums, strict=True):  # "": the tokens
            window[name] = window.get(name, 0.0) + value
        if model.training:
            self._step_inputs.append(inputs)

    # Private in `Trainer`. It is called between clipping and the optimizer's step: a non-finite
    # gradient must not reach the weights.
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._tables_are_sparse:
            grad_norm = self._clip_grad_norm(model)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)).all():
            what = f"the gradient is not finite (norm {float(norm):g})"
            self._fail(what, self._step_inputs)
        self._step_inputs.clear()
        return norm

    # Private in `Trainer`, whose norm takes no sparse gradients.
    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._tables_are_sparse:
            return super()._clip_grad_norm(model)
        return clip_gradients(model.parameters(), self.args.max_grad_norm or float("inf"))

    def _fail(self, what: str, batches: list[dict[str, Any]], training: bool = True) -> NoReturn:
        step, rates = self.state.global_step, f"learning_rate {self.args.learning_rate:g}"
        if self.args.use_muon:
            rates += f", muon_learning_rate {self.args.muon_learning_rate:g}"
        where = f"step {step + 1}" if training else f"evaluation after step {step}"
        ids = "; ".join(str(batch["input_ids"].flatten()[:8].tolist())[1:-1] for batch in batches)
        good = newest_complete(Path(str(self.args.output_dir)))
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise checks.NonFiniteLossError(
            f"{where}: {what} on the rows that begin with the ids {ids}; {kept}. Look at these "
            f"rows, or lower the learning rate ({rates})"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over the labelled tokens since the last log, and the rate."""
        training = self.model.training
        window = self._window["train" if training else "eval"]
        tokens = max(1.0, window.pop("", 0.0))
        means = {name: total / tokens for name, total in window.items()}
        window.clear()
        if means:
            loss = sum(weight * means[name] for name, weight in self.objective.weights.items())
            for name in [key for key in logs if key == "loss" or key.endswith("_loss")]:
                logs[name] = loss
            logs.update({name if training else f"eval_{name}": one for name, one in means.items()})
        if training and "loss" in logs:
            now, seen = time.monotonic(), self.state.num_input_tokens_seen
            if self._log_tokens:
                seconds = max(now - self._log_time, 1e-9)
                logs["tokens_per_second"] = round((seen - self._log_tokens) / seconds, 1)
            self._log_time, self._log_tokens = now, seen
        if self.args.max_train_tokens is not None:
            logs.pop("train_samples_per_second", None)  # computed from the upper bound of the steps
        super().log(logs, start_time)

    # --- optimizer

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As `Trainer`, or `MuonWithAdamW`."""
        if self.optimizer is not None or not self.args.use_muon:
            return self.optimizer or super().create_optimizer(*args, **kwargs)
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        in_tables = {id(p) for module in tables for p in module.parameters() if p.ndim == 2}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices = {id(p) for p in trained if p.ndim == 2} - in_tables
        if not matrices:
            raise FastDraftError("use_muon: the model has no trainable matrices; set it to false")
        # Where a step scores every id, every row has a gradient.
        if not self.args.sampled_softmax or self.teacher_model is not None:
            in_tables = set()
        # On a CPU dense gradients of 262k rows take a fifth of a step. DDP reduces dense ones.
        self._tables_are_sparse = (
            bool(in_tables)
            and self.accelerator.device.type == "cpu"
            and self.accelerator.distributed_type == DistributedType.NO
            and isinstance(tables[0], torch.nn.Embedding)
        )
        if self._tables_are_sparse:
            tables[0].sparse = True
        self.optimizer = MuonWithAdamW(
            [p for p in trained if id(p) in matrices],
            [p for p in trained if id(p) not in matrices | in_tables],
            [p for p in trained if id(p) in in_tables],
            muon_lr=self.args.muon_learning_rate,
            lr=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As `Trainer`, but by tokens when there is a budget of them."""
        if self.args.max_train_tokens is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer, shape = optimizer or self.create_optimizer(), schedule_shape(self.args)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda _: shape(self.state.num_input_tokens_seen / self.args.max_train_tokens),
            )
            # Private in `Trainer`, which saves only a scheduler it knows to be its own.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- the Hub

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: `Trainer` would push its pickled arguments and logs with the draft."""
        raise FastDraftError("push_to_hub: save the draft and run `fastdraft push` on its folder")
