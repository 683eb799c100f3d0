"""Scores of the miniature."""


def found(prediction, answers):
    """The share of answers in a text."""
    return sum(answer in prediction for answer in answers) / len(answers)
