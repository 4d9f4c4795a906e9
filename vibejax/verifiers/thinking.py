"""What of a completion is addressed to the reader: the text after the model's thinking."""


def after_thinking(completion: str) -> str | None:
    """Returns the text after the last `</think>`, the whole text if there is no thinking.

    Args:
        completion: the decoded completion; a template may have put the opening `<think>` into
            the prompt, so a closing tag alone counts.

    Returns:
        The text without surrounding blank space, or None if thinking was opened and never closed:
        such a completion was cut before it answered.
    """
    _, closed, rest = completion.rpartition("</think>")
    if not closed and "<think>" in completion:
        return None
    return rest.strip()
