"""The glue to TRL's ``SFTTrainer``: attach by plan, do no work that the plan does not need, stop on a NaN."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback

from ..adapter import attach, check_census, dead_adapters, weights_of
from ..data import TokenizedRows, tokenize
from ..errors import NonFiniteLossError, PlanError
from ..fast_lora import FastLora
from ..loss import labelled_loss
from ..padding import trl_skips_unlabelled, why_padded
from ..placement import input_device
from ..planning import Plan
from ..processes import check_same, digest, gather, is_main, on_any
from ..quantized import check_gradients_pass, gradients_kept, trainable_format
from .compiled import CompiledLayers, check_compiles
from .engine import check_engine, engine_of, in_forward_of, local, sharded_loading
from .prefix_cache import PrefixCache, PrefixCacheOptions, check_lowest
from .prefix_forecast import expected_lines
from .rerank import ReRank
from .truncation import Truncation, backward_depth
from .unpadded import TRIED_ROWS, Unpadded


class SFTTrainer(trl.SFTTrainer):
    """TRL's ``SFTTrainer`` that adapts the layers of a plan and saves the time which that allows.

    Same losses and gradients as PEFT under any other trainer; what differs is the work that is not done: no graph
    below the lowest adapted layer, activation checkpointing (when on) from there up only, logits only where a label
    is, no padding, each adapter in one pass forward and one backward. After :meth:`train`, ``lowest_backward_layer``
    says where backward really stopped, ``dead_adapters`` names adapters that got no gradient in the first step,
    ``slow_adapters`` those that run as PEFT runs them, with the reason, and ``padding_record`` what was not computed.
    ``engine`` says who ran the steps (one process, DDP, FSDP2, ...) and ``engine_limits`` what that took away, and why.
    With :class:`~aletheia_lora.training.rerank.ReRank` among the callbacks, ``plan`` and ``lowest_layer`` follow the
    layers that train, and ``lowest_backward_layer`` is measured anew after each change.
    """

    model: Any
    args: Any
    plan: Plan
    lowest_layer: int
    lowest_backward_layer: int | None
    dead_adapters: list[str] | None
    engine_limits: dict[str, str]
    slow_adapters: dict[str, str]
    padding_record: dict[str, Any] | None
    prefix_cache_record: dict[str, Any] | None

    def __init__(
        self,
        model: Any,
        args: trl.SFTConfig | None = None,
        *,
        plan: Plan,
        train_dataset: Dataset | TokenizedRows | Sequence[Mapping[str, Any]],
        eval_dataset: Dataset | TokenizedRows | Sequence[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        completion_only: bool = True,
        fast_adapters: bool = True,
        compile_layers: bool = False,
        prefix_cache: PrefixCacheOptions | None = None,
        **trl_arguments: Any,
    ) -> None:
        """Attach the plan's adapters to ``model`` and set up TRL's trainer around it.

        Args:
            model: The base model, or a ``PeftModel`` that already carries exactly the plan's adapters.
            args: TRL's configuration.
            plan: What to adapt, with which ranks.
            train_dataset: Rows in TRL's formats, or tokenized (``input_ids``, ``labels``).
            eval_dataset: Likewise.
            processing_class: The tokenizer; found beside the model if left out.
            completion_only: Put the loss on completions and assistant turns only.
            fast_adapters: Run adapters by :class:`~aletheia_lora.fast_lora.FastLora` while training.
            compile_layers: Run each layer through ``torch.compile`` while training.
            prefix_cache: Keep what the layers below the lowest adapted one compute, and replay it in later epochs;
                ``prefix_cache_record`` says afterwards what that did.
            **trl_arguments: Everything else that ``trl.SFTTrainer`` takes.

        Raises:
            PlanError: If the plan was made for another model, or adapts layer 0 and a prefix cache is wanted.
            CensusError: If the adapters on the model are not those of the plan.
            DataError: If the rows cannot be tokenized or carry no label.
            ConfigError, ProcessError: If the engine cannot run this, or the processes hold different things.
        """
        if prefix_cache is not None:
            check_lowest(plan.selection.lowest)
        args = trl.SFTConfig(use_cpu=input_device(model).type == "cpu") if args is None else args
        check_engine(args, model)
        if compile_layers:
            check_compiles(model, checkpointing=args.gradient_checkpointing)
        if "peft_config" in trl_arguments:
            raise PlanError("peft_config was given beside a plan. Leave it out: the plan says what to adapt.")
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        train_dataset, eval_dataset = (
            None if rows is None else _dataset(rows, processing_class, args.max_length, completion_only)
            for rows in (train_dataset, eval_dataset)
        )
        check_same(lambda: _held(model, plan, train_dataset), "Start every process from one plan, model and data.")
        self.plan, self.lowest_layer, self.prefix_cache = plan, plan.selection.lowest, prefix_cache
        self.engine_limits, self.slow_adapters, self.dead_adapters = {}, {}, []
        self.lowest_backward_layer = self.padding_record = self.prefix_cache_record = None
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        already_attached = isinstance(model, PeftModel)
        originals = [(weight, weight.detach().clone()) for weight in weights_of(model, plan.rewritten_modules)]
        model = _adapted(model, plan, args)
        try:
            with warnings.catch_warnings(), _on_packed_weights(model):
                warnings.filterwarnings("ignore", category=FutureWarning)
                super().__init__(
                    model=model,
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    **trl_arguments,
                )
            check_census(self.model, plan.ranks, plan.options.adapter_options)
            self.engine = engine_of(self.accelerator, self.model)
        except BaseException:
            if not already_attached:
                _give_back(model, originals, flags)
            raise
        self._shortcuts = _Shortcuts(self, fast_adapters, compile_layers)
        self.add_callback(self._shortcuts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; whatever was hooked onto the model is removed afterwards, also on failure."""
        check_gradients_pass(self.model)
        try:
            with gradients_kept(self.model):
                return super().train(*args, **kwargs)
        finally:
            self._shortcuts.remove()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward; raises before the optimizer sees a loss that is NaN or infinite.

        Raises:
            NonFiniteLossError: Names the step; the weights are those of the step before.
        """
        if self.lowest_backward_layer is None:
            with backward_depth(self.model.get_base_model()) as reached:
                loss = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
            self.lowest_backward_layer = min(reached, default=-1)
            self.dead_adapters = self._dead_adapters()
            self._say_if_backward_went_deeper()
        else:
            loss = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        finite = bool(torch.isfinite(loss))
        if on_any(not finite):
            what = "not finite on another process" if finite else float(loss)
            raise NonFiniteLossError(
                f"the loss of step {self.state.global_step + 1} is {what}; training stopped before the update. "
                "Lower the learning rate, clip gradients, or look at the rows of that batch."
            )
        return loss

    def _dead_adapters(self) -> list[str] | None:
        """Adapters without a gradient on any process; None where the engine keeps gradients to itself."""
        if self.engine.keeps_gradients:
            return None
        first, *others = gather(lambda: dead_adapters(self.model), "looking for dead adapters")
        return [name for name in first if all(name in other for other in others)]

    def _say_if_backward_went_deeper(self) -> None:
        """Warn, once, if something makes backward run below the lowest adapted layer."""
        lowest, reached = self.lowest_layer, self.lowest_backward_layer
        if reached is not None and 0 <= reached < lowest and is_main():
            warnings.warn(
                f"backward ran down to layer {reached}, though the lowest adapted layer is {lowest}: something makes "
                "hidden states below it require gradients (a hook of another library, input gradients for reentrant "
                "checkpointing). The result is right, but the time that the selection could save is not saved. "
                "Use non-reentrant checkpointing, or remove that hook.",
                stacklevel=3,
            )

    def _computes_the_loss(self, device: torch.device) -> bool:
        """True where the loss is ours to compute; otherwise it is TRL's affair."""
        return bool(
            self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and not trl_skips_unlabelled(device)
            and self.engine.name != "ZeRO-3"
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean next-token loss with logits where a label is; TRL's fused head wherever its kernel does that already."""
        if return_outputs or not self._computes_the_loss(inputs["input_ids"].device):
            return super().compute_loss(  # type: ignore[no-untyped-call]
                model, inputs, return_outputs, num_items_in_batch
            )
        mode = "train" if self.model.training else "eval"
        if mode == "train" and "attention_mask" in inputs:
            self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

        def loss_of(inner: Any) -> torch.Tensor:
            unpadded = self._shortcuts.unpadded
            batch = inputs if unpadded is None else unpadded.batch(inner, inputs)
            return labelled_loss(inner, batch, num_labels=num_items_in_batch)

        loss = in_forward_of(model, loss_of)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the engine takes the mean over processes of gradients
        return loss


class _Shortcuts(TrainerCallback):
    """Cut the graph and speed the adapters up while training runs; late, since trainers add hooks of their own."""

    def __init__(self, trainer: SFTTrainer, fast_adapters: bool, compile_layers: bool) -> None:
        self.trainer, self.fast_adapters, self.compile_layers = trainer, fast_adapters, compile_layers
        self.installed: list[Truncation | FastLora | CompiledLayers | Unpadded | PrefixCache] = []
        self.unpadded: Unpadded | None = None
        self.reentrant = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut, speed up, and open the prefix cache.

        Raises:
            PlanError: If a prefix cache is to be kept below layers that re-ranking looks into.
        """
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ReRank):
                if self.trainer.prefix_cache is not None:
                    raise PlanError(
                        "a prefix cache replays the layers below the lowest adapted one, and re-ranking probes them "
                        "and may adapt them. Leave out one of the two."
                    )
                callback.connect(self.paused, functools.partial(self.follow, callback))
        self.reentrant = (
            bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant")) and args.gradient_checkpointing
        )
        self._cut_and_speed_up()
        base_model = self.trainer.model.get_base_model()
        engine = self.trainer.engine
        limits = self.trainer.engine_limits = engine.limits(reentrant=self.reentrant)
        if "truncation" in limits and is_main():
            warnings.warn(limits["truncation"], stacklevel=2)
        reason = why_padded(
            self.trainer.plan.anatomy,
            base_model,
            trl_loss=not self.trainer._computes_the_loss(input_device(base_model)),
            engine=limits.get("padding"),
        )
        self.unpadded = Unpadded(base_model, unsupported=reason)
        self.installed.append(self.unpadded)
        if self.trainer.prefix_cache is not None:
            self.installed.append(self._prefix_cache(args, state, self.trainer.prefix_cache))

    def _prefix_cache(self, args: Any, state: Any, options: PrefixCacheOptions) -> PrefixCache:
        """Open it, with a forecast of what this run will keep."""
        trainer = self.trainer
        several = trainer.engine.name != "one process" or args.torch_compile or self.compile_layers
        evaluates = args.eval_strategy != "no" or args.eval_on_start
        with trainer.accelerator.autocast():
            return PrefixCache(
                trainer.model.get_base_model(),
                trainer.lowest_layer,
                options,
                expected=expected_lines(
                    trainer.train_dataset,
                    trainer.eval_dataset if evaluates else None,
                    num_drawn=state.max_steps * args.train_batch_size * args.gradient_accumulation_steps,
                    num_tried=0 if self.unpadded is None or self.unpadded.turned_off else TRIED_ROWS,
                ),
                unsupported="it is made for one process on one device, without torch.compile" if several else None,
                in_vain=_in_vain(trainer.train_dataset, args, state),
            )

    def _cut_and_speed_up(self) -> None:
        base_model = self.trainer.model.get_base_model()
        self.installed.append(Truncation(base_model, self.trainer.lowest_layer, reentrant=self.reentrant))
        if self.fast_adapters:
            fast = FastLora(self.trainer.model)
            self.installed.append(fast)
            self.trainer.slow_adapters = dict(fast.skipped)
        if self.compile_layers:
            self.installed.append(CompiledLayers(base_model))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While open, the model runs without cut and speed-ups; afterwards with those of its layers by then."""
        own = Truncation | FastLora | CompiledLayers
        for shortcut in [entry for entry in self.installed if isinstance(entry, own)]:
            shortcut.remove()
            self.installed.remove(shortcut)
        try:
            yield
        finally:
            self._cut_and_speed_up()

    def follow(self, rerank: ReRank) -> None:
        """Other layers train from now on: cut there when the pause ends, and measure again where backward stops."""
        self.trainer.plan, self.trainer.lowest_layer = rerank.plan, min(rerank.layers)
        self.trainer.lowest_backward_layer = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before the update if a gradient is NaN or infinite, also under a finite loss.

        Raises:
            NonFiniteLossError: Not where a loss scaler (fp16) skips the update by itself: overflow is how it finds its
                scale. Below a scale of 1 the gradient itself overflows.
        """
        bad = next(
            (
                name
                for name, parameter in self.trainer.model.named_parameters()
                if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all())
            ),
            None,
        )
        scaler = self.trainer.accelerator.scaler
        if on_any(bad is not None) and not (scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1):
            raise NonFiniteLossError(
                f"the gradient of {bad or 'a weight on another process'} in step {state.global_step + 1} is not "
                "finite; training stopped before the update. Lower the learning rate, or look at the rows of that "
                "batch."
            )

    def remove(self) -> None:
        """Put the model back as TRL expects it."""
        while self.installed:
            shortcut = self.installed.pop()
            shortcut.remove()
            if isinstance(shortcut, Unpadded):
                self.trainer.padding_record, self.unpadded = shortcut.record(), None
            if isinstance(shortcut, PrefixCache):
                self.trainer.prefix_cache_record = shortcut.record()


@contextlib.contextmanager
def _on_packed_weights(model: Any) -> Iterator[None]:
    """Refuse a format that cannot train; undo that TRL rounds adapters to bfloat16, which PEFT trains in float32."""
    trainable = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    with trainable_format(model):
        yield
    for parameter, data in trainable:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


def attach_plan(model: Any, plan: Plan, seed: int, *, full_precision: bool = True) -> PeftModel:
    """The plan's adapters, on the model itself."""
    options = plan.options.adapter_options
    return attach(model, plan.anatomy, plan.ranks, options, seed=seed, full_precision=full_precision)


def _in_vain(rows: Any, args: Any, state: Any) -> str | None:
    """Why a prefix cache replays nothing of what this run writes, if the run ends within the first epoch."""
    if state.num_train_epochs > 1 or not hasattr(rows, "__len__"):
        return None
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps
    return (
        f"{state.max_steps} steps of {rows_per_step} rows meet none of the {len(rows):,} rows twice, so what the "
        f"prefix cache writes is not replayed in this run. Take more than {-(-len(rows) // rows_per_step):,} steps, "
        "share a folder with another run (prefix_cache_dir), or leave the prefix cache out."
    )


def _give_back(
    model: PeftModel, originals: Sequence[tuple[torch.Tensor, torch.Tensor]], flags: Sequence[tuple[torch.Tensor, bool]]
) -> None:
    """Take the adapters off again; the weights that their start rewrote, and every flag, are as they were."""
    model.unload()
    for weight, original in originals:
        weight.data = original
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _dataset(rows: Any, tokenizer: Any, max_length: int | None, completion_only: bool) -> Dataset:
    if isinstance(rows, TokenizedRows):
        return rows.to_dataset()
    if isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names):
        return rows
    return tokenize(rows, tokenizer, max_length=max_length or sys.maxsize, completion_only=completion_only).to_dataset()


def _adapted(model: Any, plan: Plan, args: trl.SFTConfig) -> PeftModel:
    """The model with the plan's adapters, attached now or, as the census shows, before."""
    if isinstance(model, PeftModel):
        check_census(model, plan.ranks, plan.options.adapter_options)
        return model
    plan.check_fits(model)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    return attach_plan(model, plan, args.seed, full_precision=not zero3)  # ZeRO-3 gathers weights of one dtype only


def _held(model: torch.nn.Module, plan: Plan, rows: Dataset) -> dict[str, object]:
    """What every process has to hold alike, in digests: the weights, the plan, and some rows of the data."""
    spread = range(0, len(rows), max(len(rows) // 64, 1))
    ids = [("row", torch.tensor(rows[index]["input_ids"])) for index in spread]
    weights = "loaded by process 0" if sharded_loading() else digest(model.named_parameters(), most=64)
    return {"plan": str(plan.ranks), "number of rows": len(rows), "rows": digest(ids), "weights": weights}
