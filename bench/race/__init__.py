"""Side by side: our training step against the usual way."""
