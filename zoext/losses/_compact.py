"""The cross-entropy of language models at labelled tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zoext._runtime.arguments import check_count
from zoext.losses import _agreement
from zoext.losses._architectures import Parts
from zoext.losses._refusals import CompactLossError
from zoext.losses._rows import RowFinder, Rows

#: Logits that are made at a time, unless ``chunk`` is given: 128 MiB in float32.
_LOGITS = 2**25


class CompactLoss:
    """The loss of a language model of transformers, with logits only for the tokens that have a label.

    The hidden states of labelled tokens are gathered to rows before the head runs, and the head runs on
    ``chunk`` rows at a time:

    ``loss = sum_i -log softmax(head(h_i))[label_i] / n``

    over the ``n`` labelled tokens ``i``. It equals ``model(**batch).loss`` up to rounding, makes ``n`` rows
    of logits instead of ``B T``, and never holds more than a chunk of them.

        >>> loss = zoext.CompactLoss(model)
        >>> optimizer.step(lambda: loss(batch))

    The constructor compares logits and loss with the model's own, on a few made-up tokens in eval mode. A
    call raises a CompactLossError if the loss of the model may be another one since: after forward hooks were
    registered on it, or its ``forward`` or its ``loss_function`` was replaced. Settings of the config that
    scale or cap the logits are read by every call.

    Without ``rows``, each new ``labels`` tensor on a device makes the host wait for it once, to learn how
    many labels there are. With ``rows`` nothing waits, which a captured CUDA graph needs.

    Args:
        model: a causal, masked or sequence-to-sequence language model of transformers; in peft's adapters or
            DistributedDataParallel as well. It is not copied, and its modules are called as modules.
        rows: the largest number of labelled tokens in a batch (in one copy of it), at least 1. Default: as
            many as there are. Where there are more, a ValueError is raised on the CPU, and the loss is NaN on
            a device.
        chunk: how many rows the head gets at a time, at least 1. Fewer take less memory, but a streamed probe
            displaces the head for each chunk. Default: 2^25 logits.
        ignore_index: the label of tokens that do not count. Default -100, as in transformers.
        label_smoothing: the share of the loss that all tokens of the vocabulary have, in [0, 1). Default 0.

    Raises:
        CompactLossError: for a model whose loss it would not equal; the message names the cause. Use
            ``model(**batch).loss`` then.
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int | None = None,
        chunk: int | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        for name, value in (("rows", rows), ("chunk", chunk)):
            if value is not None:
                check_count(name, value)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing!r}")
        self._ignore_index = ignore_index
        self._label_smoothing = label_smoothing
        agreement = _agreement.find(model)
        self._parts: Parts = agreement.parts
        self._scales = agreement.scales
        self._takes_shifted = agreement.takes_shifted
        self._chunk = chunk or max(1, _LOGITS // self._parts.head.vocabulary)
        shift = int(self._parts.kind == "causal")
        self._finder = RowFinder(shift, ignore_index, rows)
        self._shifted_finder = RowFinder(0, ignore_index, rows)

    @property
    def kind(self) -> str:
        """ "causal", whose labels are predicted from the token before; "masked"; or "seq2seq"."""
        return self._parts.kind

    @property
    def follows_num_items(self) -> bool:
        """Whether the model itself divides its loss by ``num_items_in_batch``, as most causal ones do."""
        return self._scales

    def __call__(
        self,
        batch: Mapping[str, Any],
        copies: int | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of the labelled tokens of a batch.

        Args:
            batch: the arguments of the model, with ``labels``: int64 [B, T]. ``shift_labels``, labels at the
                positions where they are predicted, replace them, as in most causal models.
            copies: the batch is one of so many copies, made by ``zoext.repeat``, and the loss of each is
                wanted. Default None: a single loss.
            num_items_in_batch: what the sum of the losses is divided by. Default: ``num_items_in_batch`` of
                the batch if the model follows it (``follows_num_items``), or the number of labelled tokens.

        Returns:
            [], or [copies]; float32, or float64 for a model in float64. NaN without a label.

        Raises:
            CompactLossError: for an entry of the batch that only the forward or the loss of the whole model
                would use, and for a model that was changed, see above.
            ValueError: for labels of another shape, or more of them than ``rows``.
        """
        losses, rows = self._losses(batch, 1 if copies is None else copies)
        counts: Tensor | int | None = num_items_in_batch
        if counts is None and self._scales:  # T5, BART, BERT and others take it and ignore it
            counts = batch.get("num_items_in_batch")
        if counts is None:
            counts = self._counts(rows.targets)
        elif isinstance(counts, Tensor):
            counts = counts.to(losses.device, non_blocking=True)
        means = losses.sum(1) / counts
        return means[0] if copies is None else means

    def per_example(self, batch: Mapping[str, Any], copies: int = 1) -> Tensor:
        """The mean loss of the labelled tokens of each example, [copies B]. NaN for one without a label."""
        losses, rows = self._losses(batch, copies)
        counts = rows.spread(self._counted(rows.targets).to(losses.dtype))
        return rows.spread(losses).sum(1) / counts.sum(1)

    def per_token(self, batch: Mapping[str, Any], copies: int = 1) -> Tensor:
        """The loss of each token at the position of its label, [copies B, T]; 0 for those without one."""
        losses, rows = self._losses(batch, copies)
        return rows.spread(losses)

    def logits(self, batch: Mapping[str, Any], copies: int = 1) -> Tensor:
        """The logits of the labelled tokens, from which a choice among some tokens is scored.

        Returns:
            [copies, R, vocabulary] for R labelled tokens in a copy, in their order in the flattened labels;
            float32, or float64 for a model in float64. All of them are made at once: label few tokens.
        """
        hidden, _ = self._labelled(batch, copies)
        return self._logits_of(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:2], -1)

    def _losses(self, batch: Mapping[str, Any], copies: int) -> tuple[Tensor, Rows]:
        """The losses of the labelled tokens of each copy, [C, R]; 0 for rows that do not count."""
        hidden, rows = self._labelled(batch, copies)
        width = max(1, self._chunk // copies)
        losses = [
            self._losses_of(hidden[:, first : first + width], rows.targets[:, first : first + width])
            for first in range(0, hidden.shape[1], width)
        ]
        joined = torch.cat(losses, 1) if losses else hidden.new_zeros(copies, 0, dtype=torch.float32)
        return (joined if rows.overflow is None else joined + rows.overflow), rows

    def _labelled(self, batch: Mapping[str, Any], copies: int) -> tuple[Tensor, Rows]:
        """The hidden states [C, R, d] that predict the labels, and where these are."""
        check_count("copies", copies)
        if "labels" not in batch:
            raise ValueError("batch needs an entry 'labels'")
        if self._parts.is_replicated and torch.is_grad_enabled():
            raise CompactLossError(
                "the model is in DistributedDataParallel, whose forward CompactLoss leaves out, so gradients "
                "would not be averaged; call it under torch.no_grad(), as zoext calls closures"
            )
        rows = self._rows(batch, copies)
        return rows.of(self._parts.hidden_states(dict(batch), batch["labels"])), rows

    def _rows(self, batch: Mapping[str, Any], copies: int) -> Rows:
        """The labelled tokens, by the keywords that the loss of the model takes beside the labels."""
        ignored = batch.get("ignore_index", self._ignore_index)
        if ignored != self._ignore_index:
            raise CompactLossError(
                f"batch['ignore_index'] is {ignored!r}, but this loss ignores {self._ignore_index}; build "
                f"CompactLoss(model, ignore_index={ignored!r}), or use the loss of the model"
            )
        shifted = batch.get("shift_labels")
        if shifted is None:
            return self._finder.find(batch["labels"], copies)
        if not self._takes_shifted:
            raise CompactLossError(
                "batch['shift_labels']: the loss of this model does not take them; leave them out, or use "
                "the loss of the model"
            )
        return self._shifted_finder.find(shifted, copies, "shift_labels")

    def _losses_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The losses [C, r] of hidden states [C, r, d]. The head gets [C r, d], one copy after the other."""
        logits = self._logits_of(hidden.reshape(-1, hidden.shape[-1]))
        targets = targets.to(logits.device).reshape(-1)
        losses = cross_entropy(
            logits,
            targets,
            ignore_index=self._ignore_index,
            reduction="none",
            label_smoothing=self._label_smoothing,
        )
        return losses.reshape(hidden.shape[:2])

    def _logits_of(self, rows: Tensor) -> Tensor:
        logits = self._parts.head.logits(rows.contiguous())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # as transformers does

    def _counted(self, targets: Tensor) -> Tensor:
        return targets != self._ignore_index

    def _counts(self, targets: Tensor) -> Tensor:
        return self._counted(targets).sum(1)
