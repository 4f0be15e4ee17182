"""Model folders: the one reader of tensors, the one writer of folders, and the check of what was written."""
