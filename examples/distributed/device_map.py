"""A model too large for one GPU, its layers spread over all of them by device_map: plan and train in one process."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from aletheia_lora import plan
from aletheia_lora.data import tokenize
from aletheia_lora.rows import load_rows
from aletheia_lora.training.run import TrainOptions, train_adapter


def main(model_name: str, data: str, output: str, steps: int = 100) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_name, device_map="auto", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    rows = tokenize(load_rows(data), tokenizer, max_length=512)
    made = plan(model, rows, tokenizer=tokenizer)
    print(made)
    train_adapter(
        model, tokenizer, made, rows, Path(output), TrainOptions(steps=steps), model_name=model_name, say=print
    )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python device_map.py MODEL DATA OUTPUT [STEPS]")
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
