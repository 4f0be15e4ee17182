"""How fast a GPU trains the published sizes: with and without each measure of ours, and the usual way beside it."""
