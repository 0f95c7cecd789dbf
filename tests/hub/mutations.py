"""Files with small faults, from a seed."""

import random
import tracemalloc
from collections.abc import Callable, Iterable, Mapping

from jaxformer.errors import CheckpointError
from jaxformer.hub.tensors import Stored


def outcomes(
    files: Iterable[object], read: Callable[[], Mapping[str, Stored]], longest: int
) -> tuple[int, int]:
    """How many of the mutated `files`, each written as it is taken, are sound and how many refused
    in at most `longest` characters; none may be anything else, or need more memory than its size
    warrants."""
    sound = refused = 0
    tracemalloc.start()
    for _ in files:
        try:
            found = read()
        except CheckpointError as e:
            assert len(str(e)) < longest
            refused += 1
            continue
        sound += 1
        for tensor in found.values():
            array = tensor.read()
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
            array.tobytes()
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()
    return sound, refused


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes replaced, a few cut out, doubled or put in, or the end cut off."""
    edited = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        # Mostly near the start, where headers are.
        at = rng.randrange(min(len(edited), rng.choice([16, 300, 10**6])) or 1)
        run = rng.randrange(1, 20)
        match rng.randrange(6):
            case 0 if edited:
                edited[at] ^= 1 << rng.randrange(8)
            case 1:
                edited[at : at + 1] = rng.choice(
                    [b"\0", b"\xff", b"9", b"-", b'"', b"]", b"R", b"t"]
                )
            case 2:
                del edited[at : at + run]
            case 3:
                edited[at:at] = edited[at : at + run]
            case 4:
                edited[at:at] = rng.randbytes(run)
            case 5:
                del edited[at:]
    return bytes(edited)
