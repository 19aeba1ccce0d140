"""``Trainer`` with steps of forward passes only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from zoext.integrations.transformers import _tasks
from zoext.integrations.transformers._arguments import RECIPES, ZOArgumentsMixin, build
from zoext.integrations.transformers._callbacks import TrajectoryCallback
from zoext.integrations.transformers._compact import CompactForward
from zoext.integrations.transformers._tasks import TaskLoss
from zoext.losses import repeat
from zoext.optimizer import ZerothOrderOptimizer, unwrap
from zoext.tasks import Objective
from zoext.updates import SGD

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class ZOTrainerMixin(_Trainer):
    """Makes a subclass of ``Trainer`` train with a zoext optimizer, without a backward pass.

        class ZOSeq2SeqTrainer(ZOTrainerMixin, Seq2SeqTrainer):
            pass

    The optimizer is one of these:

    - that of ``args``, if these are ``ZOTrainingArguments`` or have the ``ZOArgumentsMixin``;
    - ``optimizer_cls_and_kwargs=(zoext.MeZO, {"lr": 1e-6})``, built from the model, ``args.weight_decay`` and
      ``args.seed``;
    - ``optimizers=(zoext.MeZO(model, lr=1e-6), None)``.

    A step makes one estimate, with the loss of the whole batch: the micro-batches of
    ``gradient_accumulation_steps`` are evaluated one after the other in the closure, so any recipe takes the
    step of a single large batch (with AGZO, up to its basis, which merges those of the micro-batches). With
    several processes, each loss is averaged over them, so all take the same step. The model is not wrapped in
    DistributedDataParallel, which would allocate memory for gradients.

    The log has, beside the mean ``loss`` of the probes:

    - ``projected_gradient``: the norm of the estimate's coefficients in the last step. For a single direction
      this is the derivative of the loss along it, without its sign;
    - ``step_length``: ``learning_rate * projected_gradient``, the distance that the weights moved in the last
      step, in units of a direction. Only for updates along the estimate, so not for AdaMeZO;
    - ``forwards``: how many times the loss of a batch has been evaluated in the run.

    ``max_grad_norm`` has no effect, because there are no gradients.

    For a language model, losses come from ``zoext.CompactLoss``, which makes logits for labelled tokens only,
    unless ``compute_loss`` is overridden, a ``compute_loss_func`` or ``label_smoothing_factor`` is given, or
    ``zo_compact_loss`` is False. A model that it refuses is told of once, and makes all logits.

    Args:
        objective: that of a task of ``zoext.tasks``, with data sets of its examples. It collates them, is the
            loss, a mean over the predictions of the whole batch, and is what ``evaluate`` finds: "eval_loss"
            and its metrics, such as "eval_accuracy". Default None: the loss is the model's own.

    Raises:
        ValueError: for fp16 with a gradient scaler, DeepSpeed, FSDP, several GPUs in one process, and an
            optimizer of other parameters than the model's or, with several processes, without a process
            group; with ``objective``, for what it takes the place of, such as a ``data_collator``.
        TypeError: without an optimizer, and for one that is not zoext's.
    """

    _batch: tuple[Any, ...] = ()  # the prepared micro-batches of the current step
    _forwards = 0
    _are_shares: bool | None = None  # what compute_loss returns, once it has been tried
    _forward: CompactForward | nn.Module | None = None  # of the prepared model, as compute_loss gets it
    _task: TaskLoss | None = None

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        if objective is not None:
            args, kwargs = (), _tasks.arguments(type(self), objective, args, kwargs)
            self._task = TaskLoss(self, objective)
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(ZOTrainerMixin)]:
            if issubclass(base, Trainer) and not issubclass(base, ZOTrainerMixin):
                raise TypeError(
                    f"class {cls.__name__}: name ZOTrainerMixin before {base.__name__} among its bases; "
                    "behind it, the mixin has no effect and the trainer computes gradients"
                )

    def create_accelerator_and_postprocess(self) -> None:
        _check_arguments(self.args)
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            raise ValueError(_SCALER)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(_sharded("DeepSpeed" if self.is_deepspeed_enabled else "FSDP"))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.n_gpu > 1:  # Trainer sets it to 1 for a model whose parts are on several
            raise ValueError(
                f"one process has {self.args.n_gpu} GPUs, which Trainer uses by nn.DataParallel; start one "
                f"process per GPU with `torchrun --nproc_per_node {self.args.n_gpu}`, or choose one GPU by "
                "CUDA_VISIBLE_DEVICES"
            )
        target: Any = self.model if model is None else model
        if self.optimizer is None and (chosen := self._chosen()):
            recipe, options = chosen
            self.optimizer = build(recipe, target, self.get_decay_parameter_names(target), options)
        optimizer = super().create_optimizer(model)
        _check_optimizer(optimizer, target, self.accelerator.num_processes)
        self._are_shares = None
        self._forwards = _forwards_before(self.state.log_history, self.state.global_step)
        return optimizer

    def _chosen(self) -> tuple[type[ZerothOrderOptimizer], dict[str, Any]] | None:
        """The optimizer that the arguments choose, and its options."""
        args = self.args
        common = {"weight_decay": args.weight_decay, "seed": args.seed}
        if isinstance(args, ZOArgumentsMixin):
            common["mu"] = args.zo_mu
        if self.optimizer_cls_and_kwargs is not None:
            recipe, options = self.optimizer_cls_and_kwargs
            if isinstance(recipe, type) and issubclass(recipe, ZerothOrderOptimizer):
                return recipe, {**common, **options}
        elif isinstance(args, ZOArgumentsMixin):
            assert isinstance(args.zo_options, dict)
            own = {"lr": args.learning_rate, **common, **args.zo_options}
            return RECIPES[args.zo_optimizer], own
        return None

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Prepares the model as Trainer does, but never in DistributedDataParallel."""
        model = super()._wrap_model(model, training, dataloader)
        if not training or self.accelerator.num_processes == 1:
            return model
        _broadcast(model)
        prepared: nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        return prepared

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)
            unwrap(self.optimizer).merge()  # for those who read the weights without a forward
            return result
        finally:
            self._batch, self._forward = (), None
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TrajectoryCallback):
                    callback.close()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self._task is not None:  # not in the closure, because it runs the model
            self._task.prepare(model)
        elif self._forward is None:
            self._forward = CompactForward.of(self, model) or model
        model.train()
        self._batch = (*self._batch, self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)  # Trainer sums what the micro-batches return
        # Only the micro-batches of this step: a callback may have ended the last epoch within a step.
        batch, self._batch = self._batch[-self.current_gradient_accumulation_steps :], ()
        if self._task is not None:
            closure = self._task.closure(model, batch)
        else:
            closure = self._closure(model, batch, num_items_in_batch)
        estimate = unwrap(self.optimizer).estimate(closure)
        self._forwards += estimate.forwards
        return estimate.loss.to(self.args.device)

    def _closure(
        self, model: nn.Module, batch: Sequence[Any], num_items_in_batch: Tensor | int | None
    ) -> Callable[..., Any]:
        """The closure of a step by ``compute_loss``."""
        is_sum = self._returns_shares(model, batch, num_items_in_batch)
        counted = num_items_in_batch if is_sum else None  # given one, Trainer scales by the processes

        def closure(copies: int | None = None) -> Tensor:
            losses = [self._loss_of(model, micro_batch, counted, copies) for micro_batch in batch]
            total = losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
            return total if is_sum else total / len(batch)

        return closure

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self._task is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        whole: Any = self.model
        model = self._wrap_model(whole, training=False, dataloader=dataloader)
        model.eval()
        examples = _tasks.examples_of(dataloader.dataset)
        if not examples:
            raise ValueError("eval_dataset: has no examples; give some, or none at all")
        metrics = self._task.evaluate(model, examples, metric_key_prefix)
        answers: Any = None  # of objective.answers(model, examples, device)
        return EvalLoopOutput(answers, label_ids=None, metrics=metrics, num_samples=len(examples))

    def _loss_of(
        self,
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: Tensor | int | None,
        copies: int | None = None,
    ) -> Tensor:
        """The loss of a micro-batch, [], or those of its copies, [copies]."""
        if copies is not None:
            if not isinstance(self._forward, CompactForward):
                raise ValueError(
                    "probe='batched' needs a loss for each copy of the batch, which compute_loss, "
                    "compute_loss_func and label smoothing do not return; use probe='streamed', and leave "
                    "zo_compact_loss on"
                )
            inputs = repeat(inputs, copies)
        if isinstance(self._forward, CompactForward):
            self._forward.copies = copies
        with self.compute_loss_context_manager():
            # A copy, because compute_loss may take entries out.
            loss: Any = self.compute_loss(
                self._forward or model,  # type: ignore[arg-type]
                copy.copy(inputs),
                num_items_in_batch=num_items_in_batch,
            )
        if not isinstance(loss, Tensor):
            loss = torch.tensor(loss, dtype=torch.float64)
        wide: Tensor = loss.to(torch.promote_types(loss.dtype, torch.float32))
        return wide

    def _returns_shares(
        self, model: nn.Module, batch: Sequence[Any], num_items_in_batch: Tensor | int | None
    ) -> bool:
        """Whether ``compute_loss`` returns a share of the batch's loss, and not the mean of a micro-batch.

        Trainer guesses from signatures, but a model that takes any keyword may ignore ``num_items_in_batch``,
        as an own ``compute_loss`` may. So it is tried, once, with two numbers.
        """
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        if num_items_in_batch is None:
            return self.compute_loss_func is not None
        if len(batch) == 1 and self.accelerator.num_processes == 1:
            return True
        if self._are_shares is None:
            model.eval()  # no dropout, no running statistics
            try:
                with torch.no_grad():
                    numbers = (num_items_in_batch, 2 * num_items_in_batch)
                    once, twice = (float(self._loss_of(model, batch[0], number)) for number in numbers)
            finally:
                model.train()
            if once == twice == 0:  # this micro-batch has no label: the next one will tell
                return True
            self._are_shares = abs(once - twice) > 0.01 * abs(once)
        return self._are_shares

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        is_of_training = "loss" in logs and "learning_rate" in logs
        estimate = unwrap(self.optimizer).last_estimate if is_of_training else None
        if estimate is not None:
            logs.pop("grad_norm", None)  # of gradients, which do not exist
            projected = float(torch.linalg.vector_norm(estimate.coefficients))
            logs["projected_gradient"] = projected
            if unwrap(self.optimizer).engine.axes.update == SGD():
                logs["step_length"] = logs["learning_rate"] * projected
            logs["forwards"] = self._forwards
        super().log(logs, *args, **kwargs)


class ZOTrainer(ZOTrainerMixin, Trainer):
    """``Trainer`` with a zoext optimizer and without a backward pass; see ``ZOTrainerMixin``.

        args = ZOTrainingArguments("out", zo_optimizer="MeZO", learning_rate=1e-6)
        ZOTrainer(model, args, train_dataset=dataset).train()

    Its arguments are those of ``Trainer``.
    """


_SCALER = (
    "fp16=True scales gradients, and a forward-only optimizer has none; use bf16=True, or load the weights "
    "in float16 and leave fp16 out"
)


def _sharded(name: str) -> str:
    return (
        f"{name} shards the weights, and zoext displaces whole weights; start the script with torchrun and "
        "without it: a step needs about the memory of inference"
    )


def _check_arguments(args: TrainingArguments) -> None:
    if args.fp16:
        raise ValueError(_SCALER)
    if args.deepspeed:
        raise ValueError(_sharded("DeepSpeed"))
    if args.fsdp:
        raise ValueError(_sharded("FSDP"))


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, processes: int) -> None:
    try:
        ours = unwrap(optimizer)
    except TypeError:
        raise TypeError(
            f"ZOTrainer needs an optimizer of zoext, not {type(optimizer).__name__}: ZOTrainingArguments "
            "as args, optimizers=(zoext.MeZO(model, lr=...), None), or "
            'optimizer_cls_and_kwargs=(zoext.MeZO, {"lr": ...})'
        ) from None
    known = {id(parameter) for parameter in model.parameters()}
    moved = [each for group in ours.param_groups for each in group["params"] if each.requires_grad]
    if strange := sum(id(parameter) not in known for parameter in moved):
        raise ValueError(
            f"optimizers: {strange} of the {len(moved)} parameters that the optimizer moves are not the "
            "model's; build it from the model that the trainer gets, after adapters were added to it"
        )
    if ours.engine.ranks.probes is not None:
        raise ValueError(
            "optimizers: Trainer gives every process a batch of its own, and the ranks of probe_group (the "
            "dimension 'probe' of a mesh) need the same one; leave it out, which averages the losses over "
            "all processes, or write the loop yourself"
        )
    if processes > 1 and ours.engine.ranks.data is None:
        raise ValueError(
            f"optimizers: process_group=None lets each of the {processes} processes train a model of its "
            "own; leave it out"
        )


def _forwards_before(log_history: Sequence[dict[str, Any]], step: int) -> int:
    """The forwards of a run that is resumed at ``step``: it had as many per step as up to its last log."""
    logs = [entry for entry in log_history if "forwards" in entry and entry["step"]]
    return round(logs[-1]["forwards"] / logs[-1]["step"] * step) if logs else 0


@torch.no_grad()
def _broadcast(model: nn.Module) -> None:
    """Gives every process the trainable weights and the buffers of the first."""
    trainable = (parameter.detach() for parameter in model.parameters() if parameter.requires_grad)
    for tensor in chain(trainable, model.buffers()):
        torch.distributed.broadcast(tensor, 0)
