"""From raw rows to padding-free packs."""
