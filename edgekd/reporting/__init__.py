"""What became of the teacher: the ledger, and verdicts in numbers and words."""
