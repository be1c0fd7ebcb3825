"""The Trainer of transformers with the optimizers it knows by name."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import bitsandbytes as bnb
from integration.models import load

# Name for the Trainer -> the class it builds, and the width of its state.
OPTIMIZERS = {
    "adamw_8bit": (bnb.optim.AdamW, 8),
    "paged_adamw_8bit": (bnb.optim.AdamW, 8),
    "paged_adamw_32bit": (bnb.optim.AdamW, 32),
    "lion_8bit": (bnb.optim.Lion, 8),
    "paged_lion_8bit": (bnb.optim.Lion, 8),
    "rmsprop_bnb_8bit": (bnb.optim.RMSprop, 8),
    "ademamix_8bit": (bnb.optim.AdEMAMix, 8),
}


class Sequences(torch.utils.data.Dataset):
    """The same two sequences over and over, so that a few steps must lower the loss."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens.cpu()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index % len(self.tokens)]
        return {"input_ids": row, "labels": row}


def trainer(model, tokens: torch.Tensor, folder, device: str, optim: str, **options) -> transformers.Trainer:
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        **options,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), optim=optim, **settings)
    return transformers.Trainer(model=model, args=arguments, train_dataset=Sequences(tokens))


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def underlying(optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


@pytest.fixture(autouse=True)
def fresh_overrides():
    """The Trainer registers its embeddings with a manager that outlives it."""
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    yield
    manager.initialize()


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_training_lowers_the_loss(optim, model_folder, tokens, device, tmp_path):
    run = trainer(load(model_folder, device), tokens, tmp_path, device, optim)
    run.train()

    family, bits = OPTIMIZERS[optim]
    optimizer = underlying(run.optimizer)
    assert isinstance(optimizer, family)
    assert optimizer.args.optim_bits == bits
    assert losses(run)[-1] < losses(run)[0]


def test_embeddings_keep_32_bit_state(model_folder, tokens, device, tmp_path):
    """The Trainer asks for it after the optimizer was built; the first step must honour it."""
    model = load(model_folder, device)
    run = trainer(model, tokens, tmp_path, device, "adamw_8bit", max_steps=1)
    run.train()

    state = underlying(run.optimizer).state
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert state[embedding]["state1"].dtype == torch.float32
    assert state[head]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(optim, model_folder, tokens, device, tmp_path):
    whole = trainer(load(model_folder, device), tokens, tmp_path / "whole", device, optim)
    whole.train()

    saving = {"save_strategy": "steps", "save_steps": 2}
    broken = trainer(
        load(model_folder, device), tokens, tmp_path / "broken", device, optim, max_steps=2, **saving
    )
    broken.train()
    resumed = trainer(load(model_folder, device), tokens, tmp_path / "broken", device, optim, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))

    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(name), msg=name)


def test_an_adapter_on_4_bit_weights_trains(model_folder, tokens, device, tmp_path):
    """QLoRA as users run it: 4-bit base, adapter, paged 8-bit optimizer, Trainer."""
    peft = pytest.importorskip("peft")
    base = peft.prepare_model_for_kbit_training(load(model_folder, device, "nf4-double"))
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)

    run = trainer(model, tokens, tmp_path, device, "paged_adamw_8bit", learning_rate=1e-2)
    run.train()

    assert losses(run)[-1] < losses(run)[0]
