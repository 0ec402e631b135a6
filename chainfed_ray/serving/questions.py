"""Answers questions to encoders that come at about the same time in one pass for each base model, whatever their stacks."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Condition, Thread
from typing import Any, TypeVar

from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.messages import ModelKey, Question, Work

Answer = TypeVar("Answer")
Asked = list[tuple[SavedStack | None, list[str]]]
"""Texts, each part of them with its stack, or for the base model alone."""


class Answering:
    """Answers questions in a thread of its own. Those that come while it is at work are answered together afterwards.

    So a question that comes alone does not wait for others, and the more come, the more of them share a pass.
    """

    def __init__(self, most_texts: int) -> None:
        self._most_texts = most_texts
        self._waiting = deque[tuple[Work, Question, Future[Any]]]()
        self._asked = Condition()
        Thread(target=self._run, name="answering", daemon=True).start()

    def ask(self, work: Work, question: Question) -> "Future[Any]":
        """The answer of ``work`` to ``question``, once it is there. Who no longer wants it cancels it."""
        answer = Future[Any]()
        with self._asked:
            self._waiting.append((work, question, answer))
            self._asked.notify()
        return answer

    def _run(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._waiting)
            self._answer()

    def _answer(self) -> None:
        """Answer what waits: of the first kind of work, as many texts as may be answered at once."""
        work, taken = self._waiting[0][0], list[tuple[Question, Future[Any]]]()
        texts = 0
        with self._asked:
            while self._waiting and self._waiting[0][0] == work:
                _, question, answer = self._waiting[0]
                if taken and texts + len(question.texts) > self._most_texts:
                    break
                self._waiting.popleft()
                if answer.set_running_or_notify_cancel():
                    taken.append((question, answer))
                    texts += len(question.texts)
        try:
            found = work([question for question, _ in taken]) if taken else []
        except Exception as error:
            found = [error] * len(taken)
        for (_, answer), result in zip(taken, found, strict=True):
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)


def answer_together(
    questions: Sequence[Question],
    stack_of: Callable[[ModelKey], SavedStack | None],
    answer: Callable[[str, str, Asked], Sequence[Answer | Exception]],
) -> list[Answer | Exception]:
    """The answer to each question, or the error because of which it has none.

    ``stack_of`` loads the stack of a model, and ``answer`` answers with a base model in a dtype. What they raise for a question
    fails that question, and no others.
    """
    answers: dict[int, Answer | Exception] = {}
    loaded = defaultdict[tuple[str, str], dict[int, SavedStack | None]](dict)
    for place, question in enumerate(questions):
        try:
            loaded[question.model.base, question.model.dtype][place] = stack_of(question.model)
        except Exception as error:
            answers[place] = error
    for (base, dtype), stacks in loaded.items():
        answers |= _of_one_base(stacks, questions, partial(answer, base, dtype))
    return [answers[place] for place in range(len(questions))]


def _of_one_base(
    stacks: Mapping[int, SavedStack | None],
    questions: Sequence[Question],
    answer: Callable[[Asked], Sequence[Answer | Exception]],
) -> dict[int, Answer | Exception]:
    """The answers by the questions' places. If a text cannot be answered, its question fails alone, and others are answered."""
    try:
        found = answer([(saved, questions[place].texts) for place, saved in stacks.items()])
        return dict(zip(stacks, found, strict=True))
    except Exception as error:
        # A text that is at fault fails its own question. What fails all, such as a disk, would fail each again.
        if len(stacks) == 1 or not isinstance(error, InvalidJob):
            return dict.fromkeys(stacks, error)
    answers: dict[int, Answer | Exception] = {}
    for place, saved in stacks.items():
        answers |= _of_one_base({place: saved}, questions, answer)
    return answers
