"""How many rows the joined model's embedding has: arithmetic, without torch."""

# A grown embedding gets a multiple of this many rows: matrix products are faster, and it divides over GPUs.
_ROWS_MULTIPLE = 64


def num_embeddings(vocab_size: int, image_token_id: int) -> int:
    """Return the rows that the embedding needs: as many as it has, unless `<image>` does not fit."""
    if image_token_id < vocab_size:
        return vocab_size
    return (image_token_id // _ROWS_MULTIPLE + 1) * _ROWS_MULTIPLE
