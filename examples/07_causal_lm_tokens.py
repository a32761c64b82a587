"""Train a causal language model on its hardest tokens. Padding is ignored; the model is not patched."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from _data import VOCABULARY, command_line, questions
from batchtrim.integrations.transformers import TrimmedTrainer  # was: from transformers import Trainer


def main(epochs: int = 3, rows: int | None = 1000) -> float:
    torch.manual_seed(0)
    data = questions(rows=rows)
    for row in data:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[],
            save_strategy="no", logging_steps=50,
        )  # fmt: skip
        trainer = TrimmedTrainer(  # was: Trainer(
            model=GPT2LMHeadModel(config),
            args=args,
            train_dataset=data[:-100],
            eval_dataset=data[-100:],
            keep=0.6,  # +
            trim_options={"unit": "element"},  # + tokens, not sequences
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]  # the plain mean over all tokens
    print(f"loss of a held-out token {before:.2f} -> {after:.2f}")
    return before - after


if __name__ == "__main__":
    command_line(main)
