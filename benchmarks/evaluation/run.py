"""Our language model against the harness's own on the same requests; see README.md for the question and the rule."""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
TOLERANCE = 1e-4
TASKS = ("mmlu", "gsm8k", "humaneval", "wikitext")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the tasks' rows")
    for task in TASKS:
        parser.add_argument(f"--{task}", type=int, default=0, help="items (of each subject); 0 leaves the task out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the records")
    parser.add_argument("--print", action="store_true", help="print the table from the records")
    options = parser.parse_args()
    records_file = options.output / "records.jsonl"
    if not options.print:
        sys.path.insert(0, str(CHECKOUT / "src"))
        from aletheia_lora.environment import environment

        options.output.mkdir(parents=True, exist_ok=True)
        with records_file.open("w") as stream:
            for record in measure(options):
                stream.write(json.dumps(record) + "\n")
                stream.flush()
                print(json.dumps(record), file=sys.stderr)
        (options.output / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    report([json.loads(line) for line in records_file.read_text().splitlines()])


def measure(options):
    """One record for each task, way and round; the second way of a round also says how far the answers agree."""
    from lm_eval.models.huggingface import HFLM

    from aletheia_lora.embedded import load_embedded_model
    from aletheia_lora.evaluation.evaluate import EvaluationOptions, build_items
    from aletheia_lora.evaluation.language_model import LanguageModel
    from aletheia_lora.evaluation.tasks import load_tasks, quiet

    model, tokenizer = load_embedded_model()
    ways = {
        "harness": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
        "ours": LanguageModel(model, tokenizer, batch_size=options.batch_size),
    }
    for task in TASKS:
        limit = getattr(options, task)
        if not limit:
            continue
        asked = EvaluationOptions(tasks=(task,), data_dir=options.data, limit=limit, allow_code=True)
        with quiet():
            items = build_items(load_tasks(asked.tasks, data_dir=asked.data_dir), ways["ours"], asked)
        requests = [capped(instance, options.max_new_tokens) for item in items for instance in item.instances]
        kind = requests[0].request_type
        for lm in ways.values():
            ask(lm, kind, requests[:1])
        for number in range(options.rounds):
            answers = {}
            for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
                with quiet():
                    started = time.perf_counter()
                    answers[way] = ask(ways[way], kind, requests)
                    seconds = time.perf_counter() - started
                record = {"task": task, "round": number, "way": way, "num_items": len(items), "seconds": seconds}
                if len(answers) == len(ways):
                    sizes = [len(item.instances) for item in items]
                    record |= agreement(kind, answers["harness"], answers["ours"], sizes)
                yield record | {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}


def capped(instance, max_new_tokens):
    """The request with a limit on new tokens that holds for both ways."""
    if instance.request_type == "generate_until":
        prompt, arguments = instance.args
        length = min(arguments.get("max_gen_toks", max_new_tokens), max_new_tokens)
        instance.arguments = (prompt, {**arguments, "max_gen_toks": length})
    return instance


def ask(lm, kind, requests):
    """The answers to all requests, as the harness's own loop would ask for them."""
    import torch

    with torch.no_grad():
        return getattr(lm, kind)(requests)


def agreement(kind, theirs, ours, sizes):
    """Items whose answer is the same, and the largest difference of a log-likelihood, relative."""
    if kind == "generate_until":
        return {"num_equal": sum(map(str.__eq__, theirs, ours)), "max_relative_difference": None}
    first, second = ([answer[0] if isinstance(answer, tuple) else answer for answer in some] for some in (theirs, ours))
    largest = max(abs(one - other) / abs(one) for one, other in zip(first, second, strict=True))
    equal = start = 0
    for size in sizes:
        one, other = first[start : start + size], second[start : start + size]
        close = all(math.isclose(*pair, rel_tol=TOLERANCE) for pair in zip(one, other, strict=True))
        equal += close and one.index(max(one)) == other.index(max(other))
        start += size
    return {"num_equal": equal, "max_relative_difference": largest}


def report(records):
    """The table of README's rule."""
    print("| task | items | harness, s | ours, s | ratio | equal items | largest difference |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for task in dict.fromkeys(record["task"] for record in records):
        mine = [record for record in records if record["task"] == task]
        seconds = {
            way: {record["round"]: record["seconds"] for record in mine if record["way"] == way}
            for way in ("harness", "ours")
        }
        ratio = statistics.median(seconds["ours"][n] / seconds["harness"][n] for n in seconds["ours"])
        compared = [record for record in mine if "num_equal" in record]
        differences = [record["max_relative_difference"] for record in compared]
        known = [difference for difference in differences if difference is not None]
        print(
            f"| {task} | {mine[0]['num_items']} | {statistics.median(seconds['harness'].values()):.1f} "
            f"| {statistics.median(seconds['ours'].values()):.1f} | {ratio:.2f} "
            f"| {min(record['num_equal'] for record in compared)} | {f'{max(known):.1e}' if known else '-'} |"
        )


if __name__ == "__main__":
    main()
