"""How many buckets a round has, and how a factorised count is numbered."""

from math import prod

#: Buckets a round: an explicit count, or the two factors of a factorised one.
Buckets = int | tuple[int, int]

#: Above this an automatic count is factorised: two small rotations instead of one large.
LARGEST_UNFACTORISED = 128
#: Bucket ids and positions are kept as 32-bit integers for the backward pass.
LARGEST_COUNT = 2**31 - 2


def factors(n_buckets: Buckets) -> tuple[int, ...]:
    """The factors of a bucket count, fastest first; one factor if it is not factorised."""
    return n_buckets if isinstance(n_buckets, tuple) else (n_buckets,)


def total(n_buckets: Buckets) -> int:
    """Number of buckets a round."""
    return prod(factors(n_buckets))


def bits(n_buckets: Buckets) -> int:
    """Bits of a bucket id, for a count that is a power of two."""
    return total(n_buckets).bit_length() - 1


def automatic(*, max_length: int, chunk_length: int) -> Buckets:
    """The bucket count for sequences of up to `max_length` tokens: about two buckets a chunk.

    Largest power of two ≤ 2·max(1, max_length // chunk_length), factorised above 128.
    """
    power = (2 * max(1, max_length // chunk_length)).bit_length() - 1
    if 1 << power <= LARGEST_UNFACTORISED:
        return 1 << power
    return (1 << power // 2, 1 << (power - power // 2))


def check(n_buckets: Buckets) -> None:
    """Refuse counts that no family can make.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    _check_type(n_buckets)
    even = tuple(max(2, factor + factor % 2) for factor in factors(n_buckets))
    if even != factors(n_buckets):
        what, mend = ("each factor", even) if isinstance(n_buckets, tuple) else ("it", even[0])
        raise ValueError(
            f"n_buckets={n_buckets}: {what} must be an even number ≥ 2 (a bucket is a signed axis of a "
            f"rotation); use {mend} or None for the automatic count"
        )
    if total(n_buckets) > LARGEST_COUNT:
        raise ValueError(f"n_buckets={n_buckets}: more than {LARGEST_COUNT} buckets; use fewer")


def _check_type(n_buckets: object) -> None:
    """Refuse what is not an int or two: no type checker stands between a user's call and the family."""
    counts = n_buckets if isinstance(n_buckets, tuple) and len(n_buckets) == 2 else (n_buckets,)
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
        raise ValueError(
            f"n_buckets={n_buckets!r}: must be an int or a tuple of two; use one even number or None for the "
            "automatic count, or give a tuple of two even factors"
        )


def check_power_of_two(n_buckets: Buckets, *, family: str) -> None:
    """Refuse counts that a family of independent bits cannot make.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    check(n_buckets)
    count = total(n_buckets)
    if count & (count - 1):
        raise ValueError(
            f"n_buckets={n_buckets}: the {family} family makes powers of two; "
            f"use {2 ** (count.bit_length() - 1)} or {2 ** count.bit_length()}"
        )
