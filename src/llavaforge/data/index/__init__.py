"""The prepared data: tokenised once, memory-mapped."""
