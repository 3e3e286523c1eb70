"""What the verbs of `polymamba bytes` do: from flags to files."""
