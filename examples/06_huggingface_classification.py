"""Hugging Face Trainer: change the class and pass a schedule. Accumulation and several ranks are scaled correctly."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import batchtrim  # +
from _data import VOCABULARY, command_line, questions
from batchtrim.integrations.transformers import TrimmedTrainer  # was: from transformers import Trainer


def main(epochs: int = 3, rows: int | None = 2000) -> float:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, num_labels=10,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            learning_rate=2e-3, report_to=[], save_strategy="no", logging_steps=50,
        )  # fmt: skip
        trainer = TrimmedTrainer(  # was: Trainer(
            model=BertForSequenceClassification(config),
            args=args,
            train_dataset=questions(rows=rows),
            eval_dataset=questions(train=False),
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
            keep=batchtrim.linear(1.0, 0.2),  # +
        )
        trainer.train()
        metrics = trainer.evaluate()
    print(f"test accuracy {metrics['eval_accuracy']:.3f}")
    return float(metrics["eval_accuracy"])


if __name__ == "__main__":
    command_line(main)
