"""The loop of transformers' Trainer around a run's own loss, parameters and batches: what a step takes in it."""

import time
from typing import Any

from torch import Tensor, nn

from mitrain.core.errors import need_extra
from mitrain.tasks.base import Batch
from mitrain.training.trainer import Trainer


class Loss(nn.Module):
    """The mean loss of a batch; holds what is trained and nothing frozen, which has its place already."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.adapter, self.head = trainer.model.adapter, trainer.model.task
        self.compute = trainer.loss

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        total, count = self.compute(batch)
        return {"loss": total / float(count)}


def steps(trainer: Trainer, count: int, folder: str) -> list[tuple[float, float]]:
    """(loss, seconds) of so many steps; the run's optimizer is afterwards the loop's, for what is counted on it.

    Losses are the run's own as long as optimizer, rate and clipping are: AdamW, constant, by the norm.
    """
    need_extra("accelerate", "dev", "the loop of transformers' Trainer")
    import transformers

    train, taken = trainer.config.train, []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken.append(time.perf_counter() - self.begun)

    class Loop(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
            loss = model(**inputs)["loss"]
            losses.append(loss.detach())
            return loss

    losses: list[Tensor] = []
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=count,
        per_device_train_batch_size=train.batch,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        max_grad_norm=train.optimizer.clip or 0.0,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=trainer.model.text.device.type == "cpu",
        seed=trainer.config.seed,
    )
    batch = lambda _: {"batch": trainer.batches.of(trainer.batches.next())}  # noqa: E731 - the run's own order
    rows = list(range(count * train.batch))
    loop = Loop(Loss(trainer), arguments, data_collator=batch, train_dataset=rows, callbacks=[Clock()])
    loop.remove_callback(transformers.PrinterCallback)  # it prints where a benchmark's document goes
    loop.train()
    trainer.engine.optimizer = getattr(loop.optimizer, "optimizer", loop.optimizer)
    return list(zip(map(float, losses), taken, strict=True))
