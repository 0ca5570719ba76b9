"""Quick start: score the layers of a tiny random model, adapt the chosen ones, train. CPU only, nothing to download.

The model is random and the task is a toy, so the numbers below say nothing about real models. The calls are the real
ones: put your own model, tokenizer and rows in their place.
"""

import tempfile

import torch
import transformers
import trl
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

import aletheia_lora as aletheia
from aletheia_lora import apply_aletheia_lora, gradient_probe, select_layers
from aletheia_lora.adapter import census
from aletheia_lora.data import tokenize

# 1. A model, a tokenizer and rows. The task: add two numbers. Only the completion carries a label.
words = ["<pad>", "<eos>", "<unk>", "plus", "is", *(str(number) for number in range(41))]
backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
)
config.pad_token_id, config.bos_token_id, config.eos_token_id = tokenizer.pad_token_id, None, tokenizer.eos_token_id
model = transformers.LlamaForCausalLM(config)
rows = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}"} for a in range(21) for b in range(21)]
train_dataset = tokenize(rows, tokenizer)

# 2. The documented calls: score, choose, build a peft.LoraConfig, attach it.
layer_scores = gradient_probe(model=model, dataset=train_dataset, probe_batches=5)
for (layer, score), error in zip(layer_scores.items(), layer_scores.standard_errors(), strict=True):
    print(f"layer {layer}: score {score:.2f}, standard error {error:.2f}")
selected_layers = select_layers(layer_scores, top_pct=50)
print("selected layers:", selected_layers)
peft_config = apply_aletheia_lora(model=model, selected_layers=selected_layers, r=4, lora_alpha=8)
peft_model = get_peft_model(model, peft_config)
print("adapters attached:", len(census(peft_model)))
model = peft_model.unload()  # back to the plain model, for the second way

# 3. The same in one call, which also weighs what each layer costs: probe, score, cost, choose, rank.
plan = aletheia.plan(model, train_dataset, tokenizer=tokenizer, time_budget=0.75, rank=4, probe_batches=8)
print(plan)

# 4. Train by the plan. The trainer attaches the adapters, takes the census, and stops backward at the lowest layer.
with tempfile.TemporaryDirectory() as folder:
    args = trl.SFTConfig(
        output_dir=folder,
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = aletheia.SFTTrainer(model, args, plan=plan, train_dataset=train_dataset, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    for entry in census(trainer.model):
        print(f"census: {entry.name}, rank {entry.rank}, alpha {entry.alpha:g}")
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses:", " ".join(f"{loss:.3f}" for loss in losses))
print("backward stopped at layer", trainer.lowest_backward_layer)
