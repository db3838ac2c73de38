"""Train a tiny random Llama with 8-bit AdamW in the Hugging Face Trainer, and print the loss and what the states take.

    python examples/huggingface_trainer.py [folder]

Needs the `hf` extra (transformers, accelerate); downloads nothing. With a folder, checkpoints go there, and a second
run continues from the last one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from octavo.optim import AdamW8bit


def make_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def make_data(rows: int = 64, length: int = 16) -> list[dict[str, torch.Tensor]]:
    """Counting: every token is the one before plus a step of the row's own."""
    first, step = torch.randint(128, (rows, 1)), torch.randint(1, 4, (rows, 1))
    ids = (first + step * torch.arange(length)) % 128
    return [{"input_ids": row, "labels": row} for row in ids]


def main(folder: Path, steps: int = 30) -> transformers.Trainer:
    model = make_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        weight_decay=0.01,
        max_grad_norm=0.0,  # the optimizer clips, on its way through the gradients
        logging_steps=max(steps // 3, 1),
        save_steps=max(steps // 2, 1),
        disable_tqdm=True,
        report_to=[],
    )
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "max_grad_norm": 1.0}
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=make_data(),
        optimizer_cls_and_kwargs=(AdamW8bit, options),
    )
    trainer.train(resume_from_checkpoint=transformers.trainer_utils.get_last_checkpoint(str(folder)))
    return trainer


def state_bytes(trainer: transformers.Trainer) -> int:
    optimizer = trainer.optimizer.optimizer  # under accelerate's
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        trained = main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
    count = sum(p.numel() for p in trained.model.parameters())
    print("loss:", [round(entry["loss"], 3) for entry in trained.state.log_history if "loss" in entry])
    print(f"states: {state_bytes(trained) / count:.2f} bytes per parameter, 8 in 32 bit")
