"""Answers kept on disk, each under the digest of all that it depends on.

Comes in: what is asked, and of which model. Goes out: the answer that was kept for exactly that, or nothing. An entry
that is damaged, edited or moved is not used and is replaced by a new answer; how many there were is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import check_writable, write_bytes
from .answer import Answer, Question
from .items import digest

FORMAT = "aletheia-answer/1"


class AnswerCache:
    """A folder of answers of one model under one way of asking."""

    def __init__(self, folder: Path, context: Mapping[str, Any]) -> None:
        """Open or make the folder.

        Args:
            folder: May be shared by models, adapters and tasks.
            context: Everything besides the question that an answer depends on, as JSON types: digests of weights,
                adapter and tokenizer, lengths, batch size, versions.

        Raises:
            OutputError: If the folder cannot be written.
        """
        self.folder = check_writable(folder)
        self.context = {"format": FORMAT, **context}
        self.num_found = 0
        self.num_refused = 0

    def get(self, question: Question) -> Answer | None:
        """The answer kept for exactly this question, or None."""
        key = self._key(question)
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        try:
            entry = json.loads(content)
            if entry["key"] == key and entry["digest"] == digest({"key": key, "answer": entry["answer"]}):
                answer = Answer.from_dict(entry["answer"])
                self.num_found += 1
                return answer
        except (ValueError, TypeError, KeyError):
            pass
        self.num_refused += 1
        return None

    def put(self, question: Question, answer: Answer) -> None:
        """Keep an answer.

        Raises:
            OutputError: If the disk is full; what was kept before stands.
        """
        key, record = self._key(question), answer.to_dict()
        entry = {"key": key, "answer": record, "digest": digest({"key": key, "answer": record})}
        write_bytes(self._path(key), json.dumps(entry).encode())

    def _key(self, question: Question) -> dict[str, Any]:
        asked = json.loads(json.dumps({"kind": question.kind, "requests": question.requests}))
        return {**self.context, "question": asked}

    def _path(self, key: Mapping[str, Any]) -> Path:
        name = digest(key)
        return self.folder / name[:2] / f"{name}.json"
