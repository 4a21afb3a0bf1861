"""A data set format: rows of a question and an answer."""

from attrs import frozen

from lorakit import hookimpl
from lorakit.options import DataOptions
from lorakit.protocols import Conversation, Message
from lorakit.records import DatasetFormat


@frozen(kw_only=True)
class QuizOptions(DataOptions):
    """`[data]` with `name = "quiz"`.

    Attributes:
        greeting: Put before each question.
    """

    greeting: str = "Q:"


def example(row, options):
    try:
        question, answer = str(row["question"]), str(row["answer"])
    except KeyError as error:
        raise ValueError(f"no key {error}") from None
    return Conversation(
        (Message("user", f"{options.greeting} {question}"), Message("assistant", answer))
    )


@hookimpl
def lorakit_datasets():
    return [DatasetFormat(name="quiz", summary="quizzes", options=QuizOptions, example=example)]
