"""A model, adapters and tasks -> a record of scores, and a file with every answer behind them.

Comes in: a loaded model, adapter folders and options. Goes out: ``items.jsonl`` and ``evaluation.json`` in a folder.
Base and adapters are asked the very same questions. Consent and the box for programs are settled before the first one.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError, DataError
from ..files import check_writable, write_json
from ..loss import evaluating
from .adapters import adapter_digest, check_base, labels, weights_digest, with_adapter
from .answer import Answer, Question
from .answer_cache import AnswerCache
from .items import BASE, ItemResult, digest, item_id, write_items
from .sandbox import CodeProblem, Sandbox, Verdict
from .summary import rates, table, warnings_of
from .tasks import PERPLEXITIES, LoadedTasks, load_tasks, quiet

FORMAT = "aletheia-eval/1"
VERSIONS = ("torch", "transformers", "peft", "datasets", "lm_eval")
IDENTITY = (
    "model_digest",
    "config_digest",
    "tokenizer_digest",
    "template_digest",
    "dtype",
    "device",
    "attention",
    "versions",
)
"""What a record says of the base model, its tokenizer and the way they run; answers that are compared share it."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """What is asked, and how."""

    tasks: tuple[str, ...]
    """Tasks and groups of lm-evaluation-harness."""
    data_dir: Path | None = None
    """Folder with the rows of the tasks; None: the hub."""
    limit: int | None = None
    """Items of each leaf task, the first ones; None: all."""
    num_fewshot: int | None = None
    """Worked examples in a prompt; None: as the task says."""
    fewshot_seed: int = 1234
    """Seed of the choice of examples; the harness's own default."""
    eval_batch_size: int = 8
    """Prompts read at once."""
    chat_template: bool = False
    """Ask in the tokenizer's chat template."""
    fewshot_as_multiturn: bool = False
    """With a chat template: each worked example is a turn of its own."""
    max_new_tokens: int | None = None
    """Generate at most so many tokens, also where a task allows more."""
    allow_code: bool = False
    """Consent to run programs that the model wrote, in the sandbox."""
    any_base: bool = False
    """Take adapters whose recorded base model has another name."""

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("limit", "eval_batch_size", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value}, expected at least 1.")
        for name in ("num_fewshot", "fewshot_seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"{name}={value}, expected 0 or more.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tasks that were loaded and may be run."""

    options: EvaluationOptions
    loaded: LoadedTasks
    sandbox: Sandbox | None
    """Where programs run, checked; None where no task has any."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of one task, as it is asked of every model."""

    task: str
    item_id: str
    doc: Any
    instances: tuple[Any, ...]
    """The harness's request objects, in order."""
    question: Question


def prepare(options: EvaluationOptions, *, sandbox: Sandbox | None = None) -> Prepared:
    """Load the tasks, ask for consent and try the sandbox: all that can fail before a model is there.

    Args:
        options: What to ask.
        sandbox: Where programs are to run; by default the ordinary one.

    Raises:
        ConfigError: If a task is unknown, or runs programs and ``allow_code`` was not given.
        DataError: If the rows of a task cannot be had.
        SandboxError: If programs would have to run and cannot be contained.
    """
    loaded = load_tasks(
        options.tasks,
        data_dir=options.data_dir,
        num_fewshot=options.num_fewshot,
    )
    if not loaded.code_tasks:
        return Prepared(options, loaded, None)
    if not options.allow_code:
        raise ConfigError(
            f"{', '.join(loaded.code_tasks)} runs programs that the model writes. Give allow_code to agree: they run "
            "in a sandbox without network. Nothing was generated."
        )
    sandbox = Sandbox() if sandbox is None else sandbox
    sandbox.check_self()
    return Prepared(options, loaded, sandbox)


def evaluate(
    model: Any,
    tokenizer: Any,
    prepared: Prepared,
    output: Path,
    *,
    adapters: Sequence[Path] = (),
    model_names: Sequence[str] = ("model",),
    with_base: bool = True,
    say: Say = lambda _line: None,
) -> dict[str, Any]:
    """Ask a model, and the model with each adapter, the same questions; write every answer and the scores.

    Answers are kept in ``answers`` inside the output folder as they come: an evaluation that was interrupted goes on
    where it stopped when it is started again.

    Args:
        model: Base model without adapters; left as found.
        tokenizer: Its tokenizer.
        prepared: What ``prepare`` gave.
        output: Folder for ``items.jsonl`` and ``evaluation.json``.
        adapters: Adapter folders.
        model_names: The base model's name, and others that adapters may have recorded.
        with_base: Ask the base model, too.
        say: Called with a line of progress now and then.

    Returns:
        The record that is also written as ``evaluation.json``.

    Raises:
        AdapterError: If an adapter is broken or was made for another base model; found out before anything is asked.
        ConfigError: If a chat template is wanted and there is none, or a task cannot be asked of this model.
        DataError: If a log-likelihood is not a finite number.
        OutputError: If the disk is full; answers that were kept are found again.
    """
    options = prepared.options
    check_writable(output)
    if options.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template. Leave chat_template out, or name an instruct model.")
    folders = labels(adapters)
    for folder in folders.values():
        check_base(folder, model, model_names=model_names, any_base=options.any_base)
    base: dict[str, str | None] = {BASE: None} if with_base else {}
    digests = {**base, **{label: adapter_digest(folder) for label, folder in folders.items()}}
    identity = _identity(model, tokenizer)
    found: list[ItemResult] = []
    seconds: dict[str, float] = {}
    caches: dict[str, dict[str, int]] = {}
    items: list[Item] = []
    for label in digests:
        started = time.perf_counter()
        with _on(model, folders.get(label)) as subject, evaluating(subject):
            with quiet():
                lm = language_model(subject, tokenizer, options)
                items = items or build_items(prepared.loaded, lm, options)
            asking = {"adapter": digests[label], "batch_size": lm.batch_size, "max_new_tokens": options.max_new_tokens}
            cache = AnswerCache(output / "answers", {**identity, **asking, "max_length": lm.max_length})
            say(f"{label}: {len(items)} items")
            answers = _answers(lm, items, cache, say)
        with quiet():
            found += judge(prepared, items, answers, label=label, digest_of_adapter=digests[label])
        seconds[label] = time.perf_counter() - started
        caches[label] = {"found": cache.num_found, "refused": cache.num_refused, "asked": len(items) - cache.num_found}
    write_items(output / "items.jsonl", found)
    record = {
        "format": FORMAT,
        "model": model_names[0],
        **identity,
        "options": _shown(options),
        "adapters": digests,
        **_what_was_asked(prepared, items),
        "table": table(found, prepared.loaded.groups),
        "rates": rates(found),
        "warnings": warnings_of(rates(found)),
        "answers": caches,
        "seconds": seconds,
    }
    write_json(output / "evaluation.json", record)
    return record


# --- what is asked ----------------------------------------------------------------------------------------------


def language_model(model: Any, tokenizer: Any, options: EvaluationOptions) -> Any:
    """The model as the harness wants it."""
    from .language_model import LanguageModel  # slow to import

    return LanguageModel(model, tokenizer, batch_size=options.eval_batch_size, max_new_tokens=options.max_new_tokens)


def build_items(loaded: LoadedTasks, lm: Any, options: EvaluationOptions) -> list[Item]:
    """The items of all tasks with their prompts, as the harness makes them."""
    items = []
    for name, task in loaded.tasks.items():
        task.set_fewshot_seed(seed=options.fewshot_seed)  # here, so that asking twice draws the same examples twice
        task.build_all_requests(
            limit=options.limit,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            chat_template=lm.apply_chat_template if options.chat_template else None,
            tokenizer_name=lm.tokenizer_name if options.chat_template else "",
        )
        by_doc: dict[int, list[Any]] = defaultdict(list)
        for instance in task.instances:
            by_doc[instance.doc_id].append(instance)
        seen: Counter[str] = Counter()
        for instances in by_doc.values():
            instances.sort(key=lambda instance: instance.idx)
            doc, kind = instances[0].doc, instances[0].request_type
            requests = tuple(instance.args for instance in instances)
            identity = item_id(doc)
            seen[identity] += 1
            unique = identity if seen[identity] == 1 else f"{identity}-{seen[identity]}"
            items.append(Item(name, unique, doc, tuple(instances), Question(kind, requests)))
    return items


def _what_was_asked(prepared: Prepared, items: Sequence[Item]) -> dict[str, Any]:
    """Tasks, rows and box, for the record."""
    loaded = prepared.loaded
    return {
        "tasks": {
            name: {
                "definition": loaded.definitions[name],
                "num_items": count,
                "num_fewshot": loaded.tasks[name].get_config("num_fewshot"),
            }
            for name, count in Counter(item.task for item in items).items()
        },
        "groups": {name: list(members) for name, members in loaded.groups.items()},
        "sources": dict(loaded.sources),
        "notes": list(loaded.notes),
        "sandbox": None if prepared.sandbox is None else prepared.sandbox.describe(),
    }


def _answers(lm: Any, items: Sequence[Item], cache: AnswerCache, say: Say) -> list[Answer]:
    """An answer for every item: the ones that are kept, and new ones, which are kept as they come."""
    answers = [cache.get(item.question) for item in items]
    missing = [place for place, answer in enumerate(answers) if answer is None]
    if len(missing) < len(items):
        say(f"{len(items) - len(missing)} of them were answered before")
    for done, (n, answer) in enumerate(lm.answers([items[place].question for place in missing]), 1):
        item = items[missing[n]]
        if not all(map(math.isfinite, answer.loglikelihoods)):
            raise DataError(
                f"item {item.item_id} of {item.task}: its log-likelihood is {answer.loglikelihoods}, expected finite "
                "numbers. The model is broken, or its dtype too narrow."
            )
        cache.put(item.question, answer)
        answers[missing[n]] = answer
        if done % max(len(missing) // 10, 1) == 0:
            say(f"{done} of {len(missing)} answered")
    return [answer for answer in answers if answer is not None]


@contextlib.contextmanager
def _on(model: Any, folder: Path | None) -> Iterator[Any]:
    if folder is None:
        yield model
        return
    with with_adapter(model, folder) as twin:
        yield twin


# --- what the answers are worth ---------------------------------------------------------------------------------


def judge(
    prepared: Prepared, items: Sequence[Item], answers: Sequence[Answer], *, label: str, digest_of_adapter: str | None
) -> list[ItemResult]:
    """Score the answers as the harness's tasks do; programs are run in the sandbox."""
    for item, answer in zip(items, answers, strict=True):
        for instance, result in zip(item.instances, answer.results(), strict=True):
            instance.resps, instance.filtered_resps = [result] * instance.repeats, {}
    for task in {item.task for item in items}:
        prepared.loaded.tasks[task].apply_filters()
    verdicts = _verdicts(prepared, items)
    results = []
    for n, (item, answer) in enumerate(zip(items, answers, strict=True)):
        task = prepared.loaded.tasks[item.task]
        scores, details = _program_scores(task, verdicts[n]) if n in verdicts else (_scores(task, item), {})
        results.append(
            ItemResult(
                label=label,
                adapter_digest=digest_of_adapter,
                task=item.task,
                item_id=item.item_id,
                prompt_sha256=digest([_asked(request) for request in item.question.requests]),
                response=answer.response,
                extracted=_extracted(task, item, answer),
                scores=scores,
                num_prompt_tokens=answer.num_prompt_tokens,
                num_response_tokens=answer.num_response_tokens,
                stop_reason=answer.stop_reason,
                prompt_truncated=answer.prompt_truncated,
                choice_loglikelihoods=answer.loglikelihoods,
                details=details,
            )
        )
    return results


def _verdicts(prepared: Prepared, items: Sequence[Item]) -> dict[int, Verdict]:
    """A verdict for each item whose answer is a program."""
    programs = {}
    for n, item in enumerate(items):
        if item.task in prepared.loaded.code_tasks:
            problem = CodeProblem.from_row(item.doc)
            programs[n] = problem, _program(item).removeprefix(problem.prompt)
    if not programs:
        return {}
    if prepared.sandbox is None:
        raise ConfigError("programs are to be run, but there is no sandbox. Call prepare with allow_code.")
    return dict(zip(programs, prepared.sandbox.run_all(programs.values()), strict=True))


def _program(item: Item) -> str:
    """What the task's filter made of the answer: a program, by itself or as the only one of a list."""
    (filtered,) = item.instances[0].filtered_resps.values()
    return str(filtered[0] if isinstance(filtered, list) else filtered)


def _program_scores(task: Any, verdict: Verdict) -> tuple[dict[str, float], dict[str, Any]]:
    (metric,) = task.aggregation()
    name = {"pass_at_k": "pass@1"}.get(metric, metric)
    details = {"reason": verdict.reason, "detail": verdict.detail, "forgeable": verdict.forgeable}
    return {name: float(verdict.passed)}, details


def _scores(task: Any, item: Item) -> dict[str, float]:
    """The task's own scores of one item; with several filters a score is named ``metric,filter``, as in the harness."""
    scores: dict[str, float] = {}
    for name in item.instances[0].filtered_resps:
        results = task.process_results(item.doc, [instance.filtered_resps[name] for instance in item.instances])
        for metric, value in results.items():
            if metric in PERPLEXITIES:
                scores["loglikelihood"], scores[PERPLEXITIES[metric]] = map(float, value)
            else:
                scores[metric if name == "none" else f"{metric},{name}"] = float(value)
    return scores


def _extracted(task: Any, item: Item, answer: Answer) -> str:
    """What the task read out of the answer; of several filters, what each one read."""
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(item.doc)
        best = answer.loglikelihoods[: len(choices)]
        return str(choices[best.index(max(best))])
    if task.OUTPUT_TYPE != "generate_until":
        return ""
    filtered = item.instances[0].filtered_resps
    if len(filtered) == 1:
        return _program(item)
    return json.dumps({name: str(value) for name, value in filtered.items()}, ensure_ascii=False)


def _asked(request: Any) -> Any:
    """The text of a request; how it is to be generated is not a part of the prompt."""
    return [part for part in request if isinstance(part, str)]


# --- who was asked ----------------------------------------------------------------------------------------------


def _identity(model: Any, tokenizer: Any) -> dict[str, Any]:
    """All that an answer depends on besides adapter and question."""
    return {
        "model_digest": weights_digest(model),
        "config_digest": digest({**model.config.to_dict(), "_name_or_path": ""}),
        "tokenizer_digest": tokenizer_digest(tokenizer),
        "generation_digest": _generation_digest(model),  # not in IDENTITY: records from before it lack it
        "template_digest": digest(getattr(tokenizer, "chat_template", None)),
        "dtype": str(next(model.parameters()).dtype),
        "device": next(model.parameters()).device.type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "versions": {"aletheia_lora": __version__, **{name: version(name) for name in VERSIONS}},
    }


def _generation_digest(model: Any) -> str:
    """Digest of the model's own defaults of generation: where an answer ends, penalties."""
    config = getattr(model, "generation_config", None)
    defaults = {} if config is None else config.to_diff_dict()
    return digest({key: value for key, value in defaults.items() if key[0] != "_" and key != "transformers_version"})


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's words and rules, whatever it was last used for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return digest([type(tokenizer).__name__, rules, tokenizer.special_tokens_map])


def _shown(options: EvaluationOptions) -> dict[str, Any]:
    """The options as JSON types; of a folder, its name."""
    return {key: value.name if isinstance(value, Path) else value for key, value in asdict(options).items()}
