"""Who runs, who died: the processes of a run, and their workers."""
