"""The reward of this recipe, to be replaced by your own: texts in, one finite number for each response out."""

_READER = {"you", "your", "yours", "yourself", "you're", "you'll", "you've"}


def speaks_to_the_reader(prompts: list[str], responses: list[str]) -> list[float]:
    """Return the share of words that address the reader, times 10 and at most 1: higher is better.

    Args:
        prompts: The whole conversation before each response, as text.
        responses: What was written.
    """
    rewards = []
    for response in responses:
        words = [word.strip(".,!?;:\"'").lower() for word in response.split()]
        share = sum(word in _READER for word in words) / max(len(words), 1)
        rewards.append(min(1.0, 10 * share))
    return rewards
