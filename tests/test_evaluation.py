"""Base and adapters on the same items: equal to the harness's own loop, kept, resumed, recomputed, refused."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from aletheia_lora.errors import AdapterError, AletheiaError, ConfigError, DataError, OutputError, SandboxError
from aletheia_lora.evaluation import answer_cache
from aletheia_lora.evaluation.adapters import labels, weights_digest, with_adapter
from aletheia_lora.evaluation.evaluate import EvaluationOptions, evaluate, prepare
from aletheia_lora.evaluation.items import ItemResult, read_items, write_items
from aletheia_lora.evaluation.sandbox import Verdict
from aletheia_lora.evaluation.tasks import _definition, documents, load_tasks, quiet
from evaluation_inputs import TEMPLATE, byte_model, byte_tokenizer, write_rows

TASKS = ("gsm8k", "humaneval", "mmlu_anatomy", "wikitext")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "recompute_evaluation.py"


class FakeSandbox:
    """Runs nothing: the first program passes, the others do not."""

    programs: tuple[Any, ...] = ()

    checked = None

    def check_self(self):
        self.checked = {"fork bomb": "stopped"}

    def describe(self):
        return {"checked": self.checked}

    def run_all(self, programs, *, workers=2):
        self.programs = tuple(programs)
        reasons = ["passed", *["wrong answer"] * (len(self.programs) - 1)]
        verdict = {"mode": "split", "seconds": 0.0, "output_tail": ""}
        return [Verdict(passed=reason == "passed", reason=reason, **verdict) for reason in reasons]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapters") / "tuned")


def save_adapter(folder, *, base="tiny", seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = get_peft_model(byte_model(), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def options(rows, tasks=TASKS, **changes):
    return EvaluationOptions(**{"tasks": tasks, "data_dir": rows, "max_new_tokens": 12, "allow_code": True, **changes})


@pytest.fixture(scope="module")
def prepared(rows):
    return prepare(options(rows), sandbox=FakeSandbox())


@pytest.fixture(scope="module")
def done(prepared, adapter, tmp_path_factory):
    """One evaluation of base and adapter, with every connection refused."""
    output = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
        record = evaluate(byte_model(), byte_tokenizer(), prepared, output, adapters=[adapter], model_names=["tiny"])
    return record, read_items(output / "items.jsonl"), output


# --- the same numbers as the harness ----------------------------------------------------------------------------


def test_scores_equal_those_of_the_harness_item_by_item(done, prepared):
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM

    plain = {name: task for name, task in prepared.loaded.tasks.items() if name not in prepared.loaded.code_tasks}
    tokenizer = byte_tokenizer()
    with quiet(), pytest.MonkeyPatch.context() as patch:
        for task in plain.values():
            task.set_fewshot_seed(seed=1234)
            if task.config.generation_kwargs:
                patch.setitem(task.config.generation_kwargs, "max_gen_toks", 12)
        theirs = harness(
            lm=HFLM(pretrained=byte_model(), tokenizer=tokenizer, batch_size=8),
            task_dict={"tasks": plain, "groups": {}},
            bootstrap_iters=0,
        )
    record, items, _ = done
    values = {(row["task"], row["metric"]): row["values"]["base"]["value"] for row in record["table"]}
    for name in plain:
        for key, value in theirs["results"][name].items():
            if "," in key and "stderr" not in key:
                metric = key.removesuffix(",none")
                assert values[name, metric] == pytest.approx(value, rel=1e-5), (name, key)  # float32
        ours = [item for item in items if item.label == "base" and item.task == name]
        samples = [sample for sample in theirs["samples"][name] if sample["filter"] in ("none", "strict-match")]
        assert len(samples) == len(ours)
        for item, sample in zip(ours, sorted(samples, key=lambda sample: sample["doc_id"]), strict=True):
            answers = [answer[0] for answer in sample["resps"]]
            if item.stop_reason != "scored":
                assert [item.response] == answers
            else:
                likelihoods = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
                assert list(item.choice_loglikelihoods) == pytest.approx(likelihoods, rel=1e-5)  # float32


@pytest.fixture(scope="module")
def both():
    """Our language model and the harness's, in float64."""
    with quiet():
        from lm_eval.models.huggingface import HFLM

        from aletheia_lora.evaluation.language_model import LanguageModel
    model = byte_model(max_length=96).double()
    theirs = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=3)
    return LanguageModel(model, byte_tokenizer(), batch_size=3), theirs


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, n, metadata=("task", n, 1)) for n, args in enumerate(arguments)]


def test_likelihoods_equal_the_harness_for_shared_long_and_empty_contexts(both):
    ours, theirs = both
    asked = requests(
        "loglikelihood",
        *(("Which letter is it? Answer:", choice) for choice in (" A", " B", " a long one", " a longer one yet")),
        *(("Another question, with other choices:", choice) for choice in (" yes", " no", " no")),
        *(("One token:", choice) for choice in "xyz"),
        ("", "without a context"),
        ("w" * 150, " beyond the length"),
    )
    with quiet():
        expected = theirs.loglikelihood(asked, disable_tqdm=True)
        found = ours.loglikelihood(asked, disable_tqdm=True)
    for mine, other in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-10) and mine[1] == other[1]


def test_a_text_longer_than_the_model_is_scored_as_by_the_harness(both):
    ours, theirs = both
    asked = requests("loglikelihood_rolling", ("short",), ("long " * 60,), ("b" * 96,))
    with quiet():
        expected, found = theirs.loglikelihood_rolling(asked), ours.loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-10)


def test_generated_texts_equal_the_harness_where_rows_stop_at_different_times(both):
    ours, theirs = both
    free = theirs.generate_until(requests("generate_until", ("abc", {"max_gen_toks": 40})), disable_tqdm=True)[0]
    prompts = ["abc", "a longer prompt than that", "x", "y" * 80, "something else"]
    stops = [free[4:6], "q"]
    arguments = {"until": stops, "max_gen_toks": 40, "do_sample": False}
    asked = requests("generate_until", *((prompt, arguments) for prompt in prompts))
    with quiet():
        expected, found = (lm.generate_until(asked, disable_tqdm=True) for lm in (theirs, ours))
        own_loop, ours._own_loop = ours._own_loop, False
        slow = ours.generate_until(asked, disable_tqdm=True)
        ours._own_loop = own_loop
    assert own_loop and found == expected == slow
    assert len(set(map(len, found))) > 1


def test_why_an_answer_ended_is_counted(both):
    ours, _ = both
    from aletheia_lora.evaluation.answer import Question

    ask = {"until": ["\n\n\n\n"], "max_gen_toks": 5}
    long = "y" * 200
    (short_answer, long_answer) = (
        answer for _, answer in sorted(ours.answers([Question("generate_until", ((p, ask),)) for p in ("abc", long)]))
    )
    assert short_answer.stop_reason == long_answer.stop_reason == "length"
    assert short_answer.num_response_tokens == 5
    assert (short_answer.prompt_truncated, long_answer.prompt_truncated) == (False, True)
    assert long_answer.num_prompt_tokens == 96 - 5
    ours._eos = frozenset(range(258))
    ((_, stopped),) = ours.answers([Question("generate_until", (("abc", ask),))])
    ours._eos = frozenset({1})
    assert (stopped.stop_reason, stopped.num_response_tokens) == ("eos", 1)


# --- items, tables, and the script that computes them anew ------------------------------------------------------


def test_base_and_adapter_answer_the_same_items_and_differ(done):
    record, items, _ = done
    by_label = {label: [item for item in items if item.label == label] for label in record["adapters"]}
    base, tuned = by_label["base"], by_label["tuned"]
    assert [(i.task, i.item_id, i.prompt_sha256) for i in base] == [(i.task, i.item_id, i.prompt_sha256) for i in tuned]
    assert len(base) == 4 + 2 + 3 + 2
    assert any(one.choice_loglikelihoods != other.choice_loglikelihoods for one, other in zip(base, tuned, strict=True))
    assert {item.adapter_digest for item in base} == {None}
    assert len({item.adapter_digest for item in tuned} - {None}) == 1
    assert {item.num_response_tokens for item in base if item.task == "gsm8k"} <= set(range(1, 13))


def test_programs_are_judged_by_the_sandbox_alone(done):
    record, items, _ = done
    code = [item for item in items if item.task == "humaneval" and item.label == "base"]
    assert [item.scores for item in code] == [{"pass@1": 1.0}, {"pass@1": 0.0}]
    assert code[1].details["reason"] == "wrong answer"
    assert all(item.extracted.endswith(item.response) and item.extracted.startswith("def double") for item in code)
    assert record["sandbox"] == {"checked": {"fork bomb": "stopped"}}


def test_a_script_without_the_package_computes_every_number_again(done, tmp_path):
    _, _, output = done
    run = [sys.executable, "-I", str(SCRIPT)]
    passed = subprocess.run([*run, str(output)], capture_output=True, text=True)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    record = json.loads((output / "evaluation.json").read_text())
    for spoil in ("table", "rates"):
        spoiled = json.loads(json.dumps(record))
        if spoil == "table":
            spoiled["table"][-1]["values"]["tuned"]["value"] += 1e-6
        else:
            spoiled["rates"][0]["capped"] = 0.123
        shutil.copy(output / "items.jsonl", tmp_path / "items.jsonl")
        (tmp_path / "evaluation.json").write_text(json.dumps(spoiled))
        failed = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True)
        assert failed.returncode == 1 and "from the items" in failed.stdout


def test_capped_answers_are_counted_and_said(done):
    record, items, _ = done
    base = [item for item in items if item.label == "base" and item.task == "gsm8k"]
    (rate,) = [rate for rate in record["rates"] if (rate["label"], rate["task"]) == ("base", "gsm8k")]
    assert rate["capped"] == sum(item.stop_reason == "length" for item in base) / len(base) > 0
    assert any("base, gsm8k" in line and "length limit" in line for line in record["warnings"])


def test_items_come_back_as_they_were_written_and_broken_lines_are_refused(done, tmp_path):
    _, items, _ = done
    file = write_items(tmp_path / "items.jsonl", items)
    assert read_items(file) == items
    with pytest.raises(DataError, match="repeats base / "):
        read_items(write_items(file, [items[0], items[0]]))
    file.write_text('{"label": "base"}\n')
    with pytest.raises(DataError, match=r"row 1 of .*missing or unknown"):
        read_items(file)
    with pytest.raises(DataError, match="expected a finite number"):
        ItemResult(**{**vars(items[0]), "scores": {"acc": float("nan")}})


def test_a_group_is_the_mean_over_all_items_of_its_tasks(rows, tmp_path):
    for split in ("dev", "test"):
        source = rows / "mmlu" / f"{split}.jsonl"
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        assert {line["subject"] for line in lines} == {"anatomy", "virology"}
    from aletheia_lora.evaluation.summary import table

    made = {"label": "base", "adapter_digest": None, "prompt_sha256": "", "response": "", "extracted": "A"}
    made |= {"num_prompt_tokens": 1, "num_response_tokens": 1, "stop_reason": "scored"}
    items = [
        ItemResult(**made, task=task, item_id=str(n), scores={"acc": float(n < right)})
        for task, count, right in (("a", 4, 4), ("b", 2, 0))
        for n in range(count)
    ]
    (group,) = [row for row in table(items, {"both": ("a", "b")}) if row["task"] == "both"]
    assert group["num_items"] == 6 and group["values"]["base"]["value"] == pytest.approx(4 / 6)


# --- kept answers -----------------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k(rows):
    return prepare(options(rows, tasks=("gsm8k",), max_new_tokens=3))


def test_an_interrupted_evaluation_goes_on_without_asking_twice(gsm8k, tmp_path, monkeypatch):
    written = []

    def full_after_two(path, content):
        if len(written) == 2:
            raise OutputError("cannot write: No space left on device.")
        written.append(path)
        return keep(path, content)

    keep = answer_cache.write_bytes
    monkeypatch.setattr(answer_cache, "write_bytes", full_after_two)
    with pytest.raises(OutputError, match="No space left"):
        evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path)
    assert not (tmp_path / "items.jsonl").exists()
    monkeypatch.setattr(answer_cache, "write_bytes", keep)
    resumed = evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path)
    assert resumed["answers"]["base"] == {"found": 2, "refused": 0, "asked": 2}
    items = (tmp_path / "items.jsonl").read_bytes()
    again = evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path)
    assert again["answers"]["base"] == {"found": 4, "refused": 0, "asked": 0}
    assert (tmp_path / "items.jsonl").read_bytes() == items


def test_answers_of_another_model_or_edited_ones_are_never_used(gsm8k, tmp_path):
    first = evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path)
    other = evaluate(byte_model(seed=5), byte_tokenizer(), gsm8k, tmp_path)
    assert first["model_digest"] != other["model_digest"]
    assert other["answers"]["base"] == {"found": 0, "refused": 0, "asked": 4}
    own = evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path)
    assert own["answers"]["base"]["found"] == 4
    entries = sorted((tmp_path / "answers").glob("*/*.json"))
    for number, entry in enumerate(entries):
        if number % 2:
            entry.write_text(entry.read_text().replace('"response": "', '"response": "18'))
        else:
            shutil.copy(entries[number - 1], entry)  # whole, but the answer to something else
    poisoned = evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path)
    assert poisoned["answers"]["base"] == {"found": 0, "refused": 4, "asked": 4}
    assert poisoned["table"] == first["table"]


def test_answers_under_other_defaults_of_generation_are_not_used(gsm8k, tmp_path):
    model = byte_model()
    first = evaluate(model, byte_tokenizer(), gsm8k, tmp_path)
    model.generation_config.transformers_version = "0.0.1"
    again = evaluate(model, byte_tokenizer(), gsm8k, tmp_path)
    assert again["generation_digest"] == first["generation_digest"] and again["answers"]["base"]["asked"] == 0
    model.generation_config.eos_token_id = [1, 5]
    other = evaluate(model, byte_tokenizer(), gsm8k, tmp_path)
    assert other["config_digest"] == first["config_digest"]
    assert other["answers"]["base"] == {"found": 0, "refused": 0, "asked": 4}


# --- adapters ---------------------------------------------------------------------------------------------------


def test_an_adapter_is_on_the_twin_and_the_model_stays_as_it_was(adapter):
    model = byte_model()
    before = weights_digest(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    ids = torch.arange(2, 30)[None]
    from peft import PeftModel

    with torch.no_grad():
        plain = model(ids).logits
        expected = PeftModel.from_pretrained(byte_model(), str(adapter))(ids).logits
        with with_adapter(model, adapter) as twin:
            assert torch.equal(twin(ids).logits, expected)
            assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(expected, plain)
    assert weights_digest(model) == before and "lora" not in " ".join(dict(model.named_modules()))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_an_adapter_of_another_base_is_refused_before_anything_is_asked(gsm8k, adapter, tmp_path):
    def error_of(folder, **changes):
        with pytest.raises(AdapterError) as caught:
            evaluate(byte_model(), byte_tokenizer(), gsm8k, tmp_path, adapters=[folder], **changes)
        return str(caught.value)

    assert "made for 'tiny', but the model is 'large'" in error_of(adapter, model_names=["large"])
    marked = shutil.copytree(adapter, tmp_path / "marked")
    (marked / "record.json").write_text('{"fingerprint": "0123"}')
    assert "fingerprint 0123" in error_of(marked, model_names=["tiny"])
    with pytest.raises(AdapterError, match="is given twice"):
        labels([adapter, adapter])
    assert not list(tmp_path.glob("answers/*/*.json"))


def test_an_adapter_that_would_load_in_part_is_refused(adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    broken = {
        "renamed": {name.replace("layers.1", "layers.7"): value for name, value in tensors.items()},
        "missing": dict(list(tensors.items())[2:]),
        "reshaped": {name: value[:, :1].contiguous() for name, value in tensors.items()},
    }
    for kind, content in broken.items():
        folder = shutil.copytree(adapter, tmp_path / kind)
        save_file(content, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=f"adapter '{kind}'"), with_adapter(byte_model(), folder):
            pytest.fail("a broken adapter was used")
    (tmp_path / "renamed" / "adapter_model.safetensors").rename(tmp_path / "renamed" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="can run code when it is read"):
        labels_and_digest(tmp_path / "renamed")


def labels_and_digest(folder):
    from aletheia_lora.evaluation.adapters import adapter_digest

    return labels([folder]), adapter_digest(folder)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ()}, ConfigError, "no task was given"),
        ({"tasks": ("gsm8k", "gsm8k")}, ConfigError, "given twice"),
        ({"allow_code": False}, ConfigError, "humaneval runs programs.*Nothing was generated"),
        ({"data_dir": Path("nowhere")}, DataError, "'nowhere' is not a folder"),
        ({"tasks": ("mbpp",)}, DataError, "no rows of 'google-research-datasets/mbpp'.*mbpp/test.jsonl"),
        ({"limit": 0}, ConfigError, "limit=0, expected at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(rows, changes, error, message):
    with pytest.raises(error, match=message):
        prepare(options(rows, **changes), sandbox=FakeSandbox())


@pytest.mark.slow
def test_an_unknown_task_is_answered_with_the_nearest_name(rows):
    with pytest.raises(ConfigError, match=r"unknown task 'gsm8'. Did you mean 'gsm8k'"):
        load_tasks(("gsm8",), data_dir=rows)


def test_a_file_with_other_columns_is_named(rows, tmp_path):
    folder = shutil.copytree(rows, tmp_path / "rows")
    (folder / "gsm8k" / "test.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"row 1 of .*has the columns 'prompt', 'answer', expected 'question'"):
        load_tasks(("gsm8k",), data_dir=folder)


def test_a_sandbox_that_does_not_hold_stops_all_before_the_first_question(rows):
    class Broken(FakeSandbox):
        def check_self(self):
            raise SandboxError("bubblewrap is missing.")

    with pytest.raises(SandboxError, match="bubblewrap"):
        prepare(options(rows), sandbox=Broken())


def test_a_program_never_runs_in_the_harness(prepared):
    task = prepared.loaded.tasks["humaneval"]
    with pytest.raises(ConfigError, match="outside the sandbox"):
        task.process_results(task.eval_docs[0], [["def double(x): return 4"]])


def test_what_a_task_says_is_the_same_in_every_process(prepared):
    said = {name: "\n".join(map(str, _definition(task).values())) for name, task in prepared.loaded.tasks.items()}
    assert "<function build_predictions>" in said["humaneval"]  # by name: where it lies differs by process
    assert not any(" at 0x" in text for text in said.values())


def test_a_missing_chat_template_is_said_and_a_given_one_is_used(rows, tmp_path):
    chat = prepare(options(rows, tasks=("mmlu_anatomy",), chat_template=True))
    with pytest.raises(ConfigError, match="no chat template"):
        evaluate(byte_model(), byte_tokenizer(), chat, tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    record = evaluate(byte_model(), tokenizer, chat, tmp_path / "chat")
    plain = evaluate(byte_model(), tokenizer, prepare(options(rows, tasks=("mmlu_anatomy",))), tmp_path / "plain")
    items = [read_items(tmp_path / name / "items.jsonl") for name in ("chat", "plain")]
    prompts = [{item.prompt_sha256 for item in some} for some in items]
    assert record["options"]["chat_template"] and not plain["options"]["chat_template"]
    assert len(prompts[0]) == 3 and not prompts[0] & prompts[1]


def test_a_model_too_short_for_the_answers_is_told_what_to_do(rows, tmp_path):
    asked = prepare(options(rows, tasks=("gsm8k",), max_new_tokens=None))
    with pytest.raises(ConfigError, match="up to 256 new tokens, but the model reads 128"):
        evaluate(byte_model(max_length=128), byte_tokenizer(), asked, tmp_path)


def test_a_broken_model_is_an_error_and_not_a_score(rows, tmp_path):
    model = byte_model()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    asked = prepare(options(rows, tasks=("mmlu_anatomy",)))
    with pytest.raises(AletheiaError, match="expected finite numbers"):
        evaluate(model, byte_tokenizer(), asked, tmp_path)


def test_wikitext_is_cut_at_first_level_headings():
    pages = documents("\n = One = \n \n text \n = = Part = = \n more \n = Two = \n end\n")
    assert [page["page"].split()[1] for page in pages] == ["One", "Two"]
    assert "Part" in pages[0]["page"]
