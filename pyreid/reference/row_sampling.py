"""Random bank rows, in the order of a Feistel network keyed by Philox4x32-10 (Salmon, SC 2011)."""

import numpy as np


def sample_rows(groups, targets, *, positives, negatives, seed, exclude_self=None):
    """(B, P) and (B, K) bank rows."""
    by_group = np.argsort(groups, kind="stable")
    drawn = (
        np.empty((len(targets), positives), np.int64),
        np.empty((len(targets), negatives), np.int64),
    )
    for sample, target in enumerate(targets):
        inside = (groups[by_group] == target) & (target >= 0)
        own, others = by_group[inside], by_group[~inside]
        if exclude_self is not None:
            others = others[others != exclude_self[sample]]
            if len(own) > 1:
                own = own[own != exclude_self[sample]]
        for purpose, rows in enumerate((own, others)):
            count = drawn[purpose].shape[1]
            if len(rows) == 0:
                drawn[purpose][sample] = -1
            else:
                order = random_order(seed, sample, purpose, len(rows), min(count, len(rows)))
                drawn[purpose][sample] = rows[np.resize(order, count)]
    return drawn


def random_order(seed, stream, purpose, size, count):
    """The first `count` of a random order of range(size)."""
    keys = [key for i in range(3) for key in philox(seed, (i, stream, purpose, 0))]
    bits = max(8, int(size - 1).bit_length())
    high_bits = bits // 2
    low_bits = bits - high_bits

    def network(x):
        high, low = x >> low_bits, x & (1 << low_bits) - 1
        for i in range(0, len(keys), 2):
            high = high ^ mixed(low + keys[i]) >> 32 - high_bits
            low = low ^ mixed(high + keys[i + 1]) >> 32 - low_bits
        return high << low_bits | low

    x = network(np.arange(count, dtype=np.uint64))
    while (outside := x >= size).any():
        x[outside] = network(x[outside])
    return x


def mixed(x):
    """The finaliser of MurmurHash3 on 32 bits."""
    x = x & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def philox(seed, counter):
    """Four random 32-bit words of a 64-bit seed and a counter of four words."""
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p, q = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = q >> 32 ^ c1 ^ key0, q & 0xFFFFFFFF, p >> 32 ^ c3 ^ key1, p & 0xFFFFFFFF
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3
