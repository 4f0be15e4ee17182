"""From a record to token ids and labels."""
