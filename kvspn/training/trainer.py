"""Hugging Face's Trainer with a loss of several named parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from kvspn.training.checkpoints import Sealing, last_whole
from kvspn.training.optimizer import MuonAdamW

Batch = Mapping[str, Tensor]
Losses = Callable[[Any, Batch], dict[str, Tensor]]


class LossTrainer(Trainer):
    """Minimises the sum of what `losses(model, batch)` returns and logs each part.

    A part whose name begins with "_" is only logged. The evaluation set is a list of ready batches.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, losses: Losses, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self._losses = losses
        self._parts: dict[str, list[float]] = defaultdict(list)

    def create_optimizer(self, model: nn.Module | None = None) -> MuonAdamW:
        """Muon and AdamW, whatever the arguments name."""
        optimizer = MuonAdamW((model or self.model).named_parameters(), self.args.learning_rate)
        self.optimizer = optimizer
        return optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> torch.autocast:
        """bf16 in the losses: Accelerate casts a model's forward alone, and they call its parts too."""
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=cache_enabled)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        parts = self._losses(model, inputs)
        if model.training:
            for name, value in parts.items():
                self._parts[name].append(value.item())
        loss = torch.stack([value for name, value in parts.items() if not name.startswith("_")]).sum()
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Means of the loss's parts over the held-out batches, logged as `eval_...`."""
        model = self.model.eval()
        totals: dict[str, float] = defaultdict(float)
        for batch in self.eval_dataset:
            with self.compute_loss_context_manager():
                for name, value in self._losses(model, self._prepare_inputs(dict(batch))).items():
                    totals[f"eval_{name.lstrip('_')}"] += value.item() / len(self.eval_dataset)
        metrics = {name: round(value, 4) for name, value in totals.items()}
        self.log(metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[name.lstrip("_")] = round(sum(values) / len(values), 4)
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def fit(
    model: nn.Module,
    folder: Path,
    dataset: torch.utils.data.Dataset,
    collator: Callable[..., Batch],
    losses: Losses,
    held_out: Sequence[Batch],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    every: int = 400,
    sampling: str = "group_by_length",
    told: TrainerCallback | None = None,
) -> None:
    """Trains in place: Muon and AdamW, linear warm-up and cosine decay, bf16 autocast.

    Keeps checkpoints in `folder`, one `every` so many steps, each evaluated on the `held_out` batches; goes
    on from the last whole one.

    Args:
        sampling: "group_by_length", or "random": a run that goes on then has the batches of one without an
            interruption.
        told: gets what is logged, in place of Trainer's bar and prints.
    """
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 12),
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy=sampling,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=min(50, every),
        save_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        disable_tqdm=told is not None,
        save_total_limit=2,
        seed=seed,
        report_to=[],
    )
    trainer = LossTrainer(
        model,
        args,
        losses,
        train_dataset=dataset,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[Sealing()] if told is None else [Sealing(), told],
    )
    if told is not None:
        trainer.remove_callback(PrinterCallback)
    with args.main_process_first():
        checkpoint = last_whole(folder)
    if checkpoint is not None and args.world_size > 1 and args.device.type == "cpu":  # Trainer cannot
        raise ValueError(f"processes must be one to go on from {checkpoint} on a CPU, got {args.world_size}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
