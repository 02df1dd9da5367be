"""Group sizes along K: a group is `group_size` neighbouring weights of one row that share a scale.

K = 100, group_size = 32:   [ 32 | 32 | 32 | 4 ]     the last group may be short
"""


def num_groups(k: int, group_size: int) -> int:
    """Groups in a row of K weights: ceil(K / group_size)."""
    return -(-k // group_size)


def group_size_candidates(k: int, min_group_size: int) -> tuple[int, ...]:
    """What a rule may choose among, coarsest first: K (one scale per column), then powers of two.

    Powers of two that do not divide K would leave a short last group; they are offered only where
    no power of two from `min_group_size` up divides K.

        (384, 32) -> (384, 128, 64, 32)        (100, 32) -> (100, 64, 32)
    """
    powers = [2**e for e in reversed(range(k.bit_length())) if min_group_size <= 2**e < k]
    divisors = [g for g in powers if k % g == 0]
    return (k, *(divisors or powers))


def bits_per_weight(bits: int, n: int, k: int, group_size: int, scale_bits: int) -> float:
    """Stored bits of an N x K weight, scales and the padding of rows to whole bytes included."""
    row_bits = 8 * -(-k * bits // 8) + scale_bits * num_groups(k, group_size)
    return n * row_bits / (n * k)
