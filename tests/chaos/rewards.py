"""A reward function for runs that meet faults."""


def brevity(prompts: list[str], responses: list[str], metadata: list[dict]) -> list[float]:
    return [-len(response) / 50 for response in responses]
