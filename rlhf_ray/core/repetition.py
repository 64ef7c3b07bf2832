"""How much a response repeats itself: the first sign that a policy is paid for length or for a phrase."""

import numpy as np


def repeated_ngrams(ids: np.ndarray, n: int = 3) -> tuple[int, int]:
    """(n-grams that occurred earlier in the same response, all n-grams of it); (0, 0) for fewer than n tokens.

    ids int [L]: the tokens of one response; n >= 1. Of n-grams that overlap each counts: five times the same token are
    three 3-grams, two of them repeated. Add both numbers up over responses before dividing: the share is of n-grams,
    and 0 means that no response says anything twice.
    """
    count = len(ids) - n + 1
    if count < 1:
        return 0, 0
    # Number the n-grams densely, a token at a time: numbers stay below L, so the products below L * L.
    tokens = np.unique(ids, return_inverse=True)[1]
    kinds, number = int(tokens.max()) + 1, tokens[:count]
    for k in range(1, n):
        number = np.unique(number * kinds + tokens[k : k + count], return_inverse=True)[1]
    return count - (int(number.max()) + 1), count
